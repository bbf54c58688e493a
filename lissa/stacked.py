"""Many right-hand sides at once: products and LiSSA on K stacked vectors, with no `vmap` around the loop.

`torch.vmap` of `hvp` and of `solve_lissa` computes the same. Here the K vectors are a dimension of every tensor, so a
step costs one gradient, one batched pull-back and a few passes over `K P` numbers, and no transform is entered or left.
Knows the recursion of `lissa.recursion`; knows nothing of where batches come from.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from lissa import checks, host, outcome, tree
from lissa.hvp import gradient_of_graph, pull_back
from lissa.kernels import twice_differentiable
from lissa.outcome import RUNNING
from lissa.recursion import CHECK_EVERY, LissaRun, LissaState, judge_step
from lissa.types import Batch, LossFn, Params, Solution, Status

StackedMatvec: TypeAlias = Callable[[Batch, Params], Params]
"""`matvec(batch, vectors) -> H_batch v_k` for each k: tensors of shape `(K, *shape)`, there and back."""


@runtime_checkable
class Stepper(Protocol):
    """A stacked matvec that takes several steps of the recursion at once, as `lissa.LastLayer` does."""

    def __call__(self, batch: Batch, vectors: Params, /) -> Params:
        """`H_batch v_k`."""
        ...

    def advance(self, batches: Sequence[Batch], h: Params, v: Params, *, decay: float, rate: float) -> None:
        """`h_k <- v_k + decay h_k - rate H_t h_k`, in place, for each batch in turn."""
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
    checks.params("stacked_hvp", params)
    loss_fn = checks.deterministic("stacked_hvp", checks.scalar_loss("stacked_hvp", loss_fn), params)
    leaves = tree.map(lambda p: p.detach().requires_grad_(), params)
    with torch.enable_grad(), twice_differentiable():
        grads = gradient_of_graph(loss_fn(leaves, batch), tuple(leaves.values()))
    curved = {k: g for k, g in zip(leaves, grads, strict=True) if g.requires_grad}

    def products(vectors: Params) -> Params:
        if not curved:
            return tree.map(torch.zeros_like, vectors)
        cotangents = tuple(vectors[k].detach() for k in curved)
        with twice_differentiable():
            found = _pulled_back(tuple(curved.values()), tuple(leaves.values()), cotangents)
        return dict(zip(leaves, found, strict=True))

    return products


def _pulled_back(
    outputs: tuple[Tensor, ...], leaves: tuple[Tensor, ...], cotangents: tuple[Tensor, ...]
) -> Iterable[Tensor]:
    """All cotangents through one graph: at once, or, where an operation refuses that (sparse gradients), in turn."""
    count = len(cotangents[0])
    try:
        if count == 1:  # twice as fast
            one = pull_back(outputs, leaves, [c[0] for c in cotangents], retain_graph=True)
            return [t.unsqueeze(0) for t in one]
        return torch.autograd.grad(
            outputs, leaves, cotangents, is_grads_batched=True, materialize_grads=True, retain_graph=True
        )
    except RuntimeError:
        if count == 1:
            raise
        products = [pull_back(outputs, leaves, [c[k] for c in cotangents], retain_graph=True) for k in range(count)]
        return map(torch.stack, zip(*products, strict=True))


def solve_lissa_stacked(
    matvec: StackedMatvec,
    v: Params,
    batches: Iterable[Batch],
    *,
    damping: float = 0.0,
    scale: float = 1.0,
    state: LissaRun | None = None,
    throw: bool = True,
) -> Solution:
    """`x_k ~ (H + damping I)^-1 v_k` by `h_k <- v_k + h_k - (H_t h_k + damping h_k) / scale`, `x_k = h_k / scale`.

    The same as `torch.vmap` of `solve_lissa` on the same batches, up to rounding.

    Args:
        matvec: `matvec(batch, vectors) -> products`, for instance `partial(stacked_hvp, loss_fn, params)`.
        v: K right-hand sides, stacked.
        batches: One batch a step; each has equal weight.
        damping: In the units of `H`.
        scale: In the units of `H`. The step size is `1 / scale`; it never changes the answer.
        state: `state` of the solution that an earlier call ended with; given the batches that come next, the result is
            bit for bit that of one long call (up to rounding, where the matvec is a `Stepper`).
        throw: Whether a failure raises `SolverError`. If False, it is data: `status` names it, `value` is all NaN.

    Returns:
        The `Solution` of each right-hand side, stacked. The residual is the latest batch's, as in `solve_lissa`. It is
        measured at the steps 1, 2, 4, 8, 16, 32, 48, ... and the last, where divergence is looked for too;
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
    first = 0 if state is None else host.largest(state.state.step)
    run, c = state or _start(v), damping / scale
    h = tree.map(torch.clone, run.state.h)
    if isinstance(matvec, Stepper) and c <= _MOST_DAMPED:
        steps: _Steps = _StepsTogether(matvec, h, v, c, scale)
    else:
        steps = _Steps(matvec, h, v, c, scale)
    trace: list[Tensor] = []
    unseen = False  # whether nobody has looked at the residual of the latest step
    taken = first
    for taken, batch in enumerate(batches, start=first + 1):
        unseen = not _is_look(taken) and c <= _MOST_DAMPED
        if unseen:
            steps.take(batch)
            trace.append(torch.full_like(run.length, torch.nan))
        else:
            residual = steps.take_and_look(batch)
            run = _look(run, steps.h, residual, taken, trace)
        if taken % CHECK_EVERY == 0 and not host.any_true(run.status == RUNNING):
            break
    residual = steps.look() if unseen else None
    h, step = steps.h, torch.where(run.status == RUNNING, taken, run.state.step)
    end = run._replace(state=run.state._replace(h=h, step=step))  # without the look below, as one long call would be
    if residual is not None:
        trace.pop()
        run = _look(run, h, residual, taken, trace)
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
    """Steps 1, 2, 4, 8, 16, 32, 48, ...: what diverges fast is seen before it overflows, and most steps cost less."""
    return step % CHECK_EVERY == 0 or (step < CHECK_EVERY and step & (step - 1) == 0)


def _start(v: Params) -> LissaRun:
    """`h_0 = v`, as `lissa_init` has it."""
    length = norms(v)
    none = torch.zeros_like(length, dtype=torch.int64)
    status = torch.where(length.isfinite(), none + RUNNING, none + Status.NOT_FINITE)
    return LissaRun(LissaState(v, length, none), {}, status, length, rising=none, settled=none)


def _look(run: LissaRun, h: Params, residual: Params, step: int, trace: list[Tensor]) -> LissaRun:
    """Judges the step to `h`; what has failed goes on, as its value is NaN in the end anyway, but keeps its record."""
    running = run.status == RUNNING
    residual_norm = norms(residual)
    trace.append(torch.where(running, residual_norm, torch.nan))
    judged = judge_step(run, residual_norm, norms(h), torch.full_like(run.state.step, step), rtol=None)
    kept = LissaState(
        {}, torch.where(running, residual_norm, run.state.residual_norm), torch.where(running, step, run.state.step)
    )
    return judged._replace(state=kept)


class _Steps:
    """The iterates `h`, and the steps `h <- v + (1 - c) h - H_t h / scale` that change them in place."""

    def __init__(self, matvec: StackedMatvec, h: Params, v: Params, c: float, scale: float):
        self.h = h
        self.matvec, self.v, self.c, self.scale = matvec, v, c, scale
        self.target = tree.scale(1 / c, v) if c else v
        self.H_h: Params | None = None

    def take(self, batch: Batch) -> None:
        """One step."""
        H_h = self._product(batch)
        for k, h in self.h.items():
            _ = h.lerp_(self.target[k], self.c) if self.c else h.add_(self.v[k])  # h <- (1 - c) h + v
            h.sub_(H_h[k], alpha=1 / self.scale)

    def take_and_look(self, batch: Batch) -> Params:
        """One step, and its residual `v - (H_t + damping) h / scale`, which is what it adds to `h`."""
        H_h, residual = self._product(batch), {}
        for k, h in self.h.items():
            residual[k] = torch.sub(self.v[k], H_h[k], alpha=1 / self.scale).sub_(h, alpha=self.c)
            h.add_(residual[k])
        return residual

    def look(self) -> Params:
        """The residual `b - c h_t`, `b = v - H_h / scale`, of the latest step, which led to `h = b + (1 - c) h_t`."""
        c, residual = self.c, {}
        for k, H_h in (self.H_h or {}).items():
            b = torch.sub(self.v[k], H_h, alpha=1 / self.scale)
            residual[k] = b.sub(self.h[k] - b, alpha=c / (1 - c))
        return residual

    def _product(self, batch: Batch) -> Params:
        self.H_h = None  # its memory serves for the next
        self.H_h = _apart_from(self.h, self.matvec(batch, self.h))
        return self.H_h


class _StepsTogether(_Steps):
    """The same with a `Stepper`: steps wait until one is looked at."""

    def __init__(self, matvec: Stepper, h: Params, v: Params, c: float, scale: float):
        self.h = h
        self.matvec, self.v, self.c, self.scale = matvec, v, c, scale
        self.stepper = matvec
        self.waiting: list[Batch] = []

    def take(self, batch: Batch) -> None:
        self.waiting.append(batch)

    def take_and_look(self, batch: Batch) -> Params:
        if self.waiting:
            self.stepper.advance(self.waiting, self.h, self.v, decay=1 - self.c, rate=1 / self.scale)
            self.waiting = []
        return super().take_and_look(batch)

    def look(self) -> Params:
        return self.take_and_look(self.waiting.pop())


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
