"""Many right-hand sides at once: products and LiSSA on K stacked vectors, with no `vmap` around the loop.

`torch.vmap` of `hvp` and of `solve_lissa` computes the same. Here the K vectors are a dimension of every tensor, so a
step costs one gradient, one batched pull-back and a few passes over `K P` numbers, and no transform is entered or left.
Knows the recursion of `lissa.recursion`; knows nothing of where batches come from.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from lissa import checks, host, outcome, tree
from lissa.hvp import gradient_of_graph, pulled_back
from lissa.kernels import twice_differentiable
from lissa.lstm import with_directional_lstm
from lissa.outcome import RUNNING
from lissa.recursion import CHECK_EVERY, LissaRun, LissaState, judge_step
from lissa.types import Batch, LossFn, Params, Solution, Status

StackedMatvec: TypeAlias = Callable[[Batch, Params], Params]
"""`matvec(batch, vectors) -> H_batch v_k` for each k: tensors of shape `(K, *shape)`, there and back."""


@runtime_checkable
class Linearising(Protocol):
    """A stacked matvec that does what a batch's products have in common once, as `StackedHvp` does."""

    def __call__(self, batch: Batch, vectors: Params, /) -> Params:
        """`H_batch v_k`."""
        ...

    def at(self, batch: Batch) -> Callable[[Params], Params]:
        """`vectors -> H_batch v_k`."""
        ...


def stacked_hvp(loss_fn: LossFn, params: Params, batch: Batch, vectors: Params) -> Params:
    """`H v_k` for K stacked vectors: the gradient's graph is built once, and all vectors are pulled back through it.

    By `torch.autograd` on leaf copies, so it takes losses that `torch.func` does not (packed sequences, branches on the
    data). On a CPU it is 1.5 to 3 times as fast as `torch.vmap` of `hvp` for small models and batches, where a product
    is all overhead.

    Args:
        loss_fn: `loss_fn(params, batch) -> ()`, the mean loss. It must be deterministic.
        params: Where the Hessian is taken.
        batch: Passed to `loss_fn` as it is.
        vectors: Shaped like `params`, each tensor with one more dimension in front.

    Returns:
        The products, stacked. Parameters that the loss does not use, or uses linearly, get zeros. A constant to
        autograd.

    Raises:
        ValueError: If the loss is not a scalar or draws random numbers.
        RuntimeError: If the loss has an operation that cannot be differentiated twice (EmbeddingBag); `hvp` may then
            have another way.

    Example:
        >>> def loss_fn(params, batch):
        ...     return (params["w"] ** 3 * batch).sum()
        >>> stacked_hvp(loss_fn, {"w": torch.tensor([1.0, 2.0])}, torch.ones(2), {"w": torch.eye(2)})
        {'w': tensor([[ 6.,  0.],
                [ 0., 12.]])}

    Source: B. A. Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6 (1994), eq. 3.
    """
    return linearised_stacked_hvp(loss_fn, params, batch)(vectors)


def linearised_stacked_hvp(loss_fn: LossFn, params: Params, batch: Batch) -> Callable[[Params], Params]:
    """`vectors -> H v_k` at one batch, as `stacked_hvp`, with the gradient's graph built once, for many products.

    The graph stays in memory with the returned function.

    Args:
        loss_fn: See `stacked_hvp`.
        params: See `stacked_hvp`.
        batch: See `stacked_hvp`.

    Returns:
        A function of K stacked vectors.

    Raises:
        ValueError: See `stacked_hvp`.

    Example:
        >>> matvec = linearised_stacked_hvp(lambda p, x: (p["w"] ** 3 * x).sum(), {"w": torch.ones(2)}, torch.ones(2))
        >>> matvec({"w": torch.tensor([[1.0, 2.0]])})
        {'w': tensor([[ 6., 12.]])}
    """
    checks.point("stacked_hvp", params)
    checked = checks.scalar_loss("stacked_hvp", with_directional_lstm(loss_fn))
    loss_fn = checks.deterministic("stacked_hvp", checked, params)
    leaves = tree.leaves(params)
    with torch.enable_grad(), twice_differentiable():
        grads = gradient_of_graph(loss_fn(leaves, batch), tuple(leaves.values()))
    curved = {k: g for k, g in zip(leaves, grads, strict=True) if g.requires_grad}

    def products(vectors: Params) -> Params:
        if not curved:
            return tree.map(torch.zeros_like, vectors)
        cotangents = tuple(vectors[k].detach() for k in curved)
        with twice_differentiable():
            found = pulled_back(tuple(curved.values()), tuple(leaves.values()), cotangents)
        return dict(zip(leaves, found, strict=True))

    return products


class StackedHvp(NamedTuple):
    """`stacked_hvp(loss_fn, params, ...)` as a `StackedMatvec` that builds a batch's graph once.

    Example:
        >>> matvec = StackedHvp(lambda p, x: (p["w"] ** 3 * x).sum(), {"w": torch.ones(2)})
        >>> matvec(torch.ones(2), {"w": torch.tensor([[1.0, 2.0]])})
        {'w': tensor([[ 6., 12.]])}
    """

    loss_fn: LossFn
    params: Params

    def __call__(self, batch: Batch, vectors: Params) -> Params:
        """`H_batch v_k`."""
        return self.at(batch)(vectors)

    def at(self, batch: Batch) -> Callable[[Params], Params]:
        """`vectors -> H_batch v_k`, with the gradient's graph, which lives as long as this."""
        return linearised_stacked_hvp(self.loss_fn, self.params, batch)


class Chunks(NamedTuple):
    """How many of K right-hand sides take how many steps before the next ones do: what they need may fit into a cache.

    Attributes:
        size: Most right-hand sides in a chunk, all of which are about as large.
        steps: Most steps. The batches of so many are held, with what a `Linearising` matvec makes of each.
    """

    size: int
    steps: int = 1


def solve_lissa_stacked(
    matvec: StackedMatvec,
    v: Params,
    batches: Iterable[Batch],
    *,
    damping: float = 0.0,
    scale: float = 1.0,
    state: LissaRun | None = None,
    chunks: Chunks | None = None,
    throw: bool = True,
) -> Solution:
    """`x_k ~ (H + damping I)^-1 v_k` by `h_k <- v_k + h_k - (H_t h_k + damping h_k) / scale`, `x_k = h_k / scale`.

    The same as `torch.vmap` of `solve_lissa` on the same batches, up to rounding.

    Args:
        matvec: `matvec(batch, vectors) -> products`, for instance `lissa.stacked.StackedHvp(loss_fn, params)`.
        v: K right-hand sides, stacked.
        batches: One batch a step; each has equal weight.
        damping: In the units of `H`.
        scale: In the units of `H`. The step size is `1 / scale`; it never changes the answer.
        state: `state` of the solution that an earlier call ended with; given the batches that come next, the result is
            bit for bit that of one long call.
        chunks: How many right-hand sides are multiplied by together, and for how many steps; all, if not given.
        throw: Whether a failure raises `SolverError`. If False, it is data: `status` names it, `value` is all NaN.

    Returns:
        The `Solution` of each right-hand side, stacked. The residual is the latest batch's, as in `solve_lissa`. It is
        measured at the steps 1, 4, 16, 32, 48, ... and the last, where divergence is looked for too;
        `residual_trace` is NaN at the others.

    Raises:
        ValueError: If `scale` is not > 0 or `damping` is not >= 0.
        SolverError: If the recursion diverges or meets NaN, and `throw` is True.

    Example:
        >>> def matvec(batch, v):
        ...     return {"x": batch * v["x"]}
        >>> v = {"x": torch.tensor([[2.0, 8.0], [4.0, 4.0]])}
        >>> solution = solve_lissa_stacked(matvec, v, [torch.tensor([1.0, 3.0])] * 100, damping=1.0, scale=4.0)
        >>> solution.value["x"].round(decimals=4).tolist()
        [[1.0, 2.0], [2.0, 1.0]]

    Source: as `solve_lissa`.
    """
    checks.params("solve_lissa_stacked", v, "v")
    checks.non_negative("solve_lissa_stacked", "damping", damping)
    checks.positive("solve_lissa_stacked", "scale", scale)
    for name, count in (chunks._asdict() if chunks else {}).items():
        checks.count("solve_lissa_stacked", f"chunks.{name}", count)
    first = 0 if state is None else host.largest(state.state.step)
    run, c = state or start_stacked(v), damping / scale
    h = tree.map(torch.clone, run.state.h)
    chunks = chunks or Chunks(max(1, len(run.length)))
    steps = _Steps(matvec, h, v, c, scale, chunks)
    trace: list[Tensor] = []
    taken, before = first, run
    for taken, (batch, last) in enumerate(_marking_the_last(batches), start=first + 1):
        look = _is_look(taken) or c > _MOST_DAMPED
        found = steps.take(batch, look=look, measure=look or last)
        before = run
        if found is None:
            trace.append(torch.full_like(run.length, torch.nan))
        else:
            trace.append(torch.where(run.status == RUNNING, found[0], torch.nan))
            run = judged(run, *found, taken)
        if look:
            before = run
        if taken % CHECK_EVERY == 0 and not host.any_true(run.status == RUNNING):
            break
    # Without the judgement of a last step that one long call would not have looked at.
    step = torch.where(before.status == RUNNING, taken, before.state.step)
    end = before._replace(state=before.state._replace(h=h, step=step))
    run = run._replace(state=run.state._replace(step=torch.where(run.status == RUNNING, taken, run.state.step)))
    solution = outcome.solution(
        {},
        status=run.status,
        residual_norm=run.state.residual_norm,
        length=run.length,
        steps=run.state.step,
        trace=trace,
        state=end,
        random=True,
    )
    divisor = torch.where(solution.status < Status.DIVERGED, torch.full_like(run.length, scale), torch.nan)
    x = tree.map(torch.div, h, _of_rows(divisor, h))
    solution = solution._replace(value=x, residual_trace=solution.residual_trace.mT)
    if throw:
        outcome.raise_on_failure(f"solve_lissa_stacked(damping={damping:g}, scale={scale:g})", solution)
    return solution


_MOST_DAMPED = 0.5
"""Above this `damping / scale`, a step wipes out too much of the iterate to tell its residual afterwards."""


def _is_look(step: int) -> bool:
    """Steps 1, 4, 16, 32, 48, ...: what diverges fast is seen before it overflows, and most steps cost less."""
    return step in (1, 4) or step % CHECK_EVERY == 0


def start_stacked(v: Params) -> LissaRun:
    """`h_0 = v` for K stacked right-hand sides, as `lissa_init` has it for one."""
    length = norms(v)
    none = torch.zeros_like(length, dtype=torch.int64)
    status = torch.where(length.isfinite(), none + RUNNING, none + Status.NOT_FINITE)
    return LissaRun(LissaState(v, length, none), {}, status, length, rising=none, settled=none)


def judged(run: LissaRun, residual_norm: Tensor, size: Tensor, step: int) -> LissaRun:
    """Judges the step; what has failed goes on, as its value is NaN in the end anyway, but keeps its record."""
    running = run.status == RUNNING
    after = judge_step(run, residual_norm, size, torch.full_like(run.state.step, step), rtol=None)
    kept = LissaState(
        {}, torch.where(running, residual_norm, run.state.residual_norm), torch.where(running, step, run.state.step)
    )
    return after._replace(state=kept)


def _marking_the_last(batches: Iterable[Batch]) -> Iterator[tuple[Batch, bool]]:
    """Each batch, and whether it is the last, which is known once the next is asked for."""
    iterator = iter(batches)
    waiting = [*itertools.islice(iterator, 1)]
    for batch in iterator:
        yield waiting.pop(), False
        waiting.append(batch)
    yield from ((batch, True) for batch in waiting)


class _Steps:
    """The iterates `h`, and the steps `h <- v + (1 - c) h - H_t h / scale` that change them in place.

    A chunk of right-hand sides takes the steps that wait before the next chunk does, so that it stays in the cache.
    """

    def __init__(self, matvec: StackedMatvec, h: Params, v: Params, c: float, scale: float, chunks: Chunks):
        self.matvec, self.c, self.scale = matvec, c, scale
        target = tree.scale(1 / c, v) if c else v
        parts = _parts(v, chunks.size)
        self.most = chunks.steps if len(parts) > 1 else 1
        self.parts = [[{k: t[part] for k, t in x.items()} for x in (h, v, target)] for part in parts]
        self.waiting: list[Batch] = []

    def take(self, batch: Batch, *, look: bool, measure: bool) -> tuple[Tensor, Tensor] | None:
        """One step, now or together with the next; if it is measured, the norms of its residuals and iterates.

        A step that is looked at adds its residual to `h`, which makes it precise; another leaves it to be told from
        what the step did.
        """
        self.waiting.append(batch)
        if not measure and len(self.waiting) < self.most:
            return None
        (*batches, last), self.waiting = self.waiting, []
        norms_of = self._take_all(batches, last, look, measure)
        if not measure:
            return None
        residual_norms, sizes = zip(*norms_of, strict=True)
        return torch.cat(residual_norms), torch.cat(sizes)

    def _take_all(self, batches: list[Batch], last: Batch, look: bool, measure: bool) -> list[tuple[Tensor, Tensor]]:
        *products, product = map(self._product, [*batches, last])
        found = []
        for part in self.parts:
            for each in products:
                self._take_part(each, *part, look=False, measure=False)
            found.append(self._take_part(product, *part, look=look, measure=measure))
        return found

    def _product(self, batch: Batch) -> Callable[[Params], Params]:
        return self.matvec.at(batch) if isinstance(self.matvec, Linearising) else partial(self.matvec, batch)

    def _take_part(
        self, product: Callable[[Params], Params], h: Params, v: Params, target: Params, *, look: bool, measure: bool
    ) -> tuple[Tensor, Tensor] | None:
        c, H_h, residual = self.c, _apart_from(h, product(h)), {}
        for k, t in h.items():
            if look:  # r = v - H_h / scale - c h
                residual[k] = torch.sub(v[k], H_h[k], alpha=1 / self.scale).sub_(t, alpha=c)
                t.add_(residual[k])
                continue
            _ = t.lerp_(target[k], c) if c else t.add_(v[k])  # (1 - c) h + v
            t.sub_(H_h[k], alpha=1 / self.scale)
            if measure:  # r = b - c h, as the step led to b + (1 - c) h
                b = torch.sub(v[k], H_h[k], alpha=1 / self.scale)
                residual[k] = b.sub(t - b, alpha=c / (1 - c))
        return (norms(residual), norms(h)) if residual else None


def _parts(x: Params, size: int) -> list[slice]:
    """Slices of at most `size` of K vectors, all about as long."""
    K = len(next(iter(x.values())))
    count = max(1, -(-K // size))
    return [slice(i * K // count, (i + 1) * K // count) for i in range(count)]


def _apart_from(h: Params, product: Params) -> Params:
    """The product, copied where it is `h` itself or a view of it: `h` is updated in place."""
    own = {t.untyped_storage().data_ptr() for t in h.values()}
    return {k: t.clone() if t.untyped_storage().data_ptr() in own else t for k, t in product.items()}


def _of_rows(flags: Tensor, like: Params) -> Params:
    """`flags`, shape `(K,)`, shaped to select among the rows of each tensor."""
    return tree.map(lambda t: flags.reshape(-1, *[1] * (t.ndim - 1)), like)


def vdots(x: Params, y: Params) -> Tensor:
    """`<x_k, y_k>` of K stacked vectors each, shape `(K,)`."""
    parts = [torch.linalg.vecdot(x[k].reshape(len(t), -1), t.reshape(len(t), -1)) for k, t in y.items()]
    return torch.stack(parts).sum(0)


def norms(x: Params) -> Tensor:
    """`|x_k|` of K stacked vectors, shape `(K,)`."""
    parts = [torch.linalg.vector_norm(t.flatten(1) if t.ndim > 1 else t.unsqueeze(1), dim=1) for t in x.values()]
    return torch.linalg.vector_norm(torch.stack(parts), dim=0)
