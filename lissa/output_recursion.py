"""LiSSA in the space of outputs, for parameters that a loss sees only through products with what its batches hold.

A step changes an iterate by `v` and by what its batch's inputs span. So what a stretch of steps sees follows from the
outputs that `v` and the first iterate give for these inputs, and the iterate itself is formed once, at the end. Knows
losses and expansions of them, and when a run has failed; knows nothing of modules or data.
"""

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from lissa import checks, host, outcome, tree
from lissa.iterates import Squares
from lissa.last_layer import Expansion, LastLayer
from lissa.outcome import RUNNING
from lissa.recursion import CHECK_EVERY, GROWTH_LIMIT, LissaRun
from lissa.stacked import judged, start_stacked
from lissa.stretches import Expanded, Graphs, Stretch, in_lists, of_expansions
from lissa.types import Batch, LossFn, Params, Solution, Status


def solve_lissa_in_outputs(
    loss_fn: LossFn,
    params: Params,
    v: Params,
    batches: Iterable[Batch],
    *,
    damping: float = 0.0,
    scale: float = 1.0,
    at_once: int | None = None,
    steps_at_once: int = 32,
    throw: bool = True,
) -> Solution:
    """`x_k ~ (H + damping I)^-1 v_k` by `h_k <- v_k + h_k - (H_t h_k + damping h_k) / scale`, `x_k = h_k / scale`.

    The same as `solve_lissa_stacked` with `StackedHvp(loss_fn, params)`, up to rounding. It is several times as fast on
    a CPU where most parameters are those of embeddings and of linear layers that are given the data, and vectors are so
    many and long that passing over them is what takes time: `solve_lissa_stacked` passes over all of them eight times a
    step, this one over those of such layers about eight times a stretch of steps.

    Args:
        loss_fn: `loss_fn(params, batch) -> ()`, the mean loss. It must be deterministic.
        params: Where the Hessian is taken.
        v: K right-hand sides, stacked.
        batches: One batch a step; each has equal weight.
        damping: In the units of `H`.
        scale: In the units of `H`. The step size is `1 / scale`; it never changes the answer.
        at_once: Right-hand sides that take a stretch together, so that they stay in a cache; all, if not given.
        steps_at_once: Most steps in a stretch. Their graphs are held together.
        throw: Whether a failure raises `SolverError`. If False, it is data: `status` names it, `value` is all NaN.

    Returns:
        See `solve_lissa_last_layer`.

    Raises:
        ValueError: If `scale` is not > 0 or `damping` is not >= 0, or the loss is not a scalar or draws random numbers.
        RuntimeError: If the loss has an operation that cannot be differentiated twice.
        SolverError: If the recursion diverges or meets NaN, and `throw` is True.

    Example:
        >>> def loss_fn(params, x):
        ...     return (torch.nn.functional.linear(x, params["w"]) ** 2).mean() / 2
        >>> params, v = {"w": torch.zeros(1, 2)}, {"w": torch.tensor([[[2.0, 8.0]], [[4.0, 4.0]]])}
        >>> batches = [torch.tensor([[2.0, 0.0], [0.0, 2.0]])] * 100  # H = diag(2, 2)
        >>> solve_lissa_in_outputs(loss_fn, params, v, batches, damping=2.0, scale=5.0).value["w"].squeeze(1)
        tensor([[0.5000, 2.0000],
                [1.0000, 1.0000]])

    Source: as `solve_lissa`.
    """
    call = "solve_lissa_in_outputs"
    checks.point(call, params)
    checks.count(call, "steps_at_once", steps_at_once)
    checks.stacked_vectors(call, params, v, "v")
    graphs = Graphs(call, loss_fn, params)

    def stretches(c: float, rate: float) -> Iterator[Stretch]:
        for some in in_lists(map(graphs.of, batches), c, steps_at_once):
            yield graphs.stretch(some, c, rate)

    return _solve(call, v, stretches, damping=damping, scale=scale, at_once=at_once, throw=throw)


def numbers_in_outputs(loss_fn: LossFn, params: Params, batch: Batch) -> int:
    """How many numbers of a vector `solve_lissa_in_outputs` does not pass over at each step, of batches like this one.

    Args:
        loss_fn: As there.
        params: As there.
        batch: A small one will do.

    Raises:
        ValueError: If the loss is not a scalar or draws random numbers.

    Example:
        >>> params = {"w": torch.zeros(1, 2), "b": torch.zeros(1)}
        >>> def loss_fn(params, x):
        ...     return torch.nn.functional.linear(x, params["w"], params["b"]).exp().mean()
        >>> numbers_in_outputs(loss_fn, params, torch.ones(3, 2))
        2
    """
    layers = Graphs("numbers_in_outputs", loss_fn, params).of(batch).layers
    return sum(params[key].numel() for key in layers)


def solve_lissa_last_layer(
    layer: LastLayer,
    v: Params,
    batches: Iterable[Expansion],
    *,
    damping: float = 0.0,
    scale: float = 1.0,
    at_once: int | None = None,
    throw: bool = True,
) -> Solution:
    """`x_k ~ (H + damping I)^-1 v_k` by `h_k <- v_k + h_k - (H_t h_k + damping h_k) / scale`, `x_k = h_k / scale`.

    The same as `solve_lissa_stacked(layer, ...)`, up to rounding. Be `a_j` the inputs and `D_j` the Hessians of the B
    examples of step j, `e = 1 - damping / scale` and `s_j = 1 + e + ... + e^(j-1)`. Then a stretch of steps from `h` is

        h_n = e^n (h - x_0 - ... - x_(n-1)) + s_n v,    x_j = y_j a_j^T / scale
        y_j = D_j (u_j + (s_j / e^j) v a_j) / (B e)
        u_j = (h - x_0 - ... - x_(j-1)) a_j = h a_j - sum_(i < j) y_i (a_i . a_j) / scale

    and `|h_n|` and `|h_n - h_(n-1)|` follow from `|h|`, `|v|`, `<h, v>` and the inner products of each `x_j` with
    itself, `v` and the `h - x_0 - ...` before it. See also blocked triangular solves, which go about it in this way.

    Args:
        layer: What the losses are expanded in.
        v: K right-hand sides, stacked.
        batches: One batch a step; each has equal weight.
        damping: In the units of `H`.
        scale: In the units of `H`. The step size is `1 / scale`; it never changes the answer.
        at_once: Right-hand sides that take a stretch together, so that they stay in a cache; all, if not given.
        throw: Whether a failure raises `SolverError`. If False, it is data: `status` names it, `value` is all NaN.

    Returns:
        The `Solution` of each right-hand side, stacked. The residual is the latest batch's, as in `solve_lissa`; of
        less than about `sqrt(eps) |v|` only that is known. Divergence is looked for at the steps 1, 4, 16, 32, ...

    Raises:
        ValueError: If `scale` is not > 0 or `damping` is not >= 0.
        SolverError: If the recursion diverges or meets NaN, and `throw` is True.

    Example:
        >>> from lissa import expansion_of_graph
        >>> z = torch.tensor([[1.0, 2.0]], requires_grad=True)  # W a with W = [[1], [2]], a = [1]
        >>> batch = expansion_of_graph((z**3).sum(1), z, torch.ones(1, 1))  # H = diag(6, 12)
        >>> layer, v = LastLayer("W", None), {"W": torch.tensor([[[7.0], [26.0]]])}
        >>> solution = solve_lissa_last_layer(layer, v, [batch] * 100, damping=1.0, scale=13.0)
        >>> solution.value["W"].flatten().round(decimals=4).tolist()
        [1.0, 2.0]

    Source: as `solve_lissa`.
    """
    call = "solve_lissa_last_layer"

    def stretches(c: float, rate: float) -> Iterator[Stretch]:
        for some in in_lists(map(Expanded, batches), c, sys.maxsize):
            yield of_expansions(layer, some, c, rate)

    return _solve(call, v, stretches, damping=damping, scale=scale, at_once=at_once, throw=throw)


def _solve(
    call: str,
    v: Params,
    stretches: Callable[[float, float], Iterable[Stretch]],
    *,
    damping: float,
    scale: float,
    at_once: int | None,
    throw: bool,
) -> Solution:
    """Stretch after stretch, until they or all right-hand sides have ended."""
    checks.params(call, v, "v")
    checks.non_negative(call, "damping", damping)
    checks.positive(call, "scale", scale)
    if at_once is not None:
        checks.count(call, "at_once", at_once)
    v = tree.map(Tensor.detach, v)
    K = len(next(iter(v.values())))
    size = at_once or max(1, K)
    parts = [slice(k, k + size) for k in range(0, K, size)]
    run, h, trace = start_stacked(v), v, list[Tensor]()
    for stretch in stretches(damping / scale, 1 / scale):
        onward = tree.map(lambda t: t.new_empty(t.shape), v) if h is v else h
        found = []
        for part in parts:
            of_part = {id(x): {k: t[part] for k, t in x.items()} for x in (h, v, onward)}
            found.append(stretch.take(*(of_part[id(x)] for x in (h, v, onward))))
        taken = sum(map(len, trace))
        squares = Squares(*(torch.cat(t, 1) for t in zip(*found, strict=True)))
        steps = len(squares.residuals)
        run, h = _judged(run, *_norms(squares, run.length, taken), trace, taken), onward
        if (taken + steps) // CHECK_EVERY > taken // CHECK_EVERY and not host.any_true(run.status == RUNNING):
            break
    solution = outcome.solution(
        {},
        status=run.status,
        residual_norm=run.state.residual_norm,
        length=run.length,
        steps=run.state.step,
        trace=[*torch.cat(trace)] if trace else [],
        random=True,
    )
    factor = torch.where(solution.status < Status.DIVERGED, torch.full_like(run.length, 1 / scale), torch.nan)
    scaled = torch.mul if h is v else Tensor.mul_
    x = tree.map(lambda t: scaled(t, factor.reshape(-1, *[1] * (t.ndim - 1))), h)
    solution = solution._replace(value=x, residual_trace=solution.residual_trace.mT)
    if throw:
        outcome.raise_on_failure(f"{call}(damping={damping:g}, scale={scale:g})", solution)
    return solution


def _norms(squares: Squares, length: Tensor, before: int) -> tuple[Tensor, Tensor]:
    """`|h_(j+1) - h_j|` and `|h_(j+1)|` of the steps that come after `before` others.

    An iterate that is no number is infinite, if others had grown too large before; else it has met one.
    """
    residuals, iterates = squares.residuals.sqrt(), squares.iterates.sqrt()
    steps = torch.arange(before + 1, before + 1 + len(iterates), device=iterates.device).unsqueeze(1)
    grown = (iterates > GROWTH_LIMIT * (steps + 1) * length).cumsum(0) > 0
    return residuals, torch.where(iterates.isnan() & grown, torch.inf, iterates)


def _judged(run: LissaRun, residual_norms: Tensor, sizes: Tensor, trace: list[Tensor], before: int) -> LissaRun:
    """After a stretch that came after `before` steps: judged at its end and where `solve_lissa_stacked` does."""
    last = before + len(sizes)
    looks = [step for step in range(before + 1, last + 1) if step in (1, 4, last) or step % CHECK_EVERY == 0]
    for start, step in itertools.pairwise([before, *looks]):
        some = residual_norms[start - before : step - before]
        trace.append(torch.where(run.status == RUNNING, some, torch.nan))
        run = judged(run, some[-1], sizes[step - before - 1], step)
    return run
