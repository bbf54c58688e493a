"""LiSSA, the stochastic recursion for `(H + damping I)^-1 v`: state, init, update, and the loop that watches it.

Knows the recursion and how it fails; knows nothing of losses: curvature comes in as `matvec(batch, v)`. One vector is
solved for; `torch.vmap` gives many, which then share every batch.

Source: N. Agarwal, B. Bullins and E. Hazan, Second-order stochastic optimization for machine learning in linear time,
JMLR 18 (2017), algorithm 1; P. W. Koh and P. Liang, Understanding black-box predictions via influence functions,
ICML 2017, section 3.
"""

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from lissa import checks, host, tree
from lissa.types import Batch, BatchMatvec, Params, Solution, SolverError, Status

GROWTH_LIMIT = 10.0
"""`|h_t| <= (t + 1) |v|` holds where every step contracts; beyond this multiple of it the recursion diverges."""

RISE_LIMIT = 16
"""Residuals above `|v|` that rise this often in a row do not rise by chance (1 in 16! for independent noise)."""

SETTLED_STEPS = 8
"""Residuals of at most `rtol |v|` in a row that count as convergence; a single batch may be lucky."""

CHECK_EVERY = 16
"""Steps between two looks at the status from the host: each is one synchronisation on an accelerator."""


class LissaState(NamedTuple):
    """Where the recursion stands.

    Attributes:
        h: The iterate; the estimate of `(H + damping I)^-1 v` is `h / scale`.
        residual_norm: `|v - (H_t + damping I) h_t / scale|` for the previous iterate on the latest batch, in the units
            of `v`, shape `()`. It costs nothing: it is the length of the latest step.
        step: Number of updates made, shape `()`.
    """

    h: Params
    residual_norm: Tensor
    step: Tensor


def lissa_init(v: Params) -> LissaState:
    """`h_0 = v`: the first iterate. It is the recursion's first step from `h = 0`, whose residual is `v`.

    Args:
        v: The right-hand side.

    Returns:
        The state before any batch is seen.
    """
    checks.params("lissa_init", v, "v")
    length = tree.norm(v)
    return LissaState(h=v, residual_norm=length, step=torch.zeros_like(length, dtype=torch.int64))


def lissa_update(
    matvec: BatchMatvec, v: Params, state: LissaState, batch: Batch, *, damping: float = 0.0, scale: float = 1.0
) -> LissaState:
    """`h <- v + h - (H_t h + damping h) / scale`: one step on one batch.

    Args:
        matvec: `matvec(batch, v) -> H_batch v`, for instance `partial(hvp, loss_fn, params)`.
        v: The right-hand side.
        state: The state to step from; it is not changed.
        batch: Passed to `matvec`.
        damping: In the units of `H`.
        scale: In the units of `H`. The step size is `1 / scale`; it never changes the answer, `h / scale`.

    Returns:
        The new state.

    Example:
        >>> from functools import partial, reduce
        >>> def matvec(batch, v):
        ...     return {"x": 3.0 * v["x"]}
        >>> v = {"x": torch.tensor(8.0)}
        >>> step = partial(lissa_update, matvec, v, damping=1.0, scale=5.0)
        >>> reduce(step, range(100), lissa_init(v)).h["x"] / 5.0
        tensor(2.)
    """
    residual = tree.map(lambda v, H_h, h: v - (H_h + damping * h) / scale, v, matvec(batch, state.h), state.h)
    return LissaState(h=tree.add(state.h, residual), residual_norm=tree.norm(residual), step=state.step + 1)


def solve_lissa(
    matvec: BatchMatvec,
    v: Params,
    batches: Iterable[Batch],
    *,
    damping: float = 0.0,
    scale: float = 1.0,
    steps: int | None = None,
    rtol: float | None = None,
    throw: bool = True,
) -> Solution:
    """`x ~ (H + damping I)^-1 v` by LiSSA: `h <- v + h - (H_t h + damping h) / scale` each batch, `x = h / scale`.

    The mean-square error falls while `scale > (lambda_max + damping + trace / batch_size) / 2`, at a rate of
    `(1 - damping / scale)` a step in the slowest mode. The last iterate keeps a noise floor from the batches.

    Args:
        matvec: `matvec(batch, v) -> H_batch v`, for instance `partial(hvp, loss_fn, params)`.
        v: The right-hand side, often the gradient of a test loss.
        batches: One batch a step. May be infinite if `steps` is given. Each batch has equal weight.
        damping: In the units of `H`: the system solved is `(H + damping I) x = v`.
        scale: In the units of `H`. The step size is `1 / scale`; it never changes the answer.
        steps: Number of steps; the default is one for each batch there is.
        rtol: If given, a right-hand side is done once its residual on a batch was at most `rtol |v|` for eight steps in
            a row; it then keeps its value while others go on.
        throw: Whether a failure raises `SolverError`. If False, it is data: `status` names it, `value` is all NaN.

    Returns:
        The `Solution`. Its residual is that of the last step: on the last batch, for the iterate before the last.

    Raises:
        ValueError: If `scale` is not > 0, `damping` is not >= 0, `steps` is < 0 or the batches end before it.
        SolverError: If the recursion diverges or meets NaN, and `throw` is True.

    Example:
        >>> def matvec(batch, v):
        ...     return {"x": batch * v["x"]}
        >>> diagonal = torch.tensor([1.0, 3.0])
        >>> solution = solve_lissa(matvec, {"x": torch.tensor([2.0, 8.0])}, [diagonal] * 100, damping=1.0, scale=3.0)
        >>> solution.value
        {'x': tensor([1., 2.])}
    """
    checks.params("solve_lissa", v, "v")
    checks.non_negative("solve_lissa", "damping", damping)
    checks.positive("solve_lissa", "scale", scale)
    if steps is not None:
        checks.count("solve_lissa", "steps", steps, at_least=0)
    if rtol is not None:
        checks.positive("solve_lissa", "rtol", rtol)

    watch = _start_watch(v)
    taken = 0
    for taken, batch in enumerate(itertools.islice(batches, steps), start=1):
        state = lissa_update(matvec, v, watch.state, batch, damping=damping, scale=scale)
        watch = _keep_watch(watch, state, rtol)
        if taken % CHECK_EVERY == 0 and not host.any_true(watch.status == _RUNNING):
            break
    else:
        if steps is not None and taken < steps:
            raise ValueError(f"`solve_lissa(batches=...)` ended after {taken} of {steps} steps.")
    solution = _solution(watch, scale)
    if throw:
        _raise_on_failure(solution, damping, scale)
    return solution


class _Watch(NamedTuple):
    """What the loop knows of one right-hand side: `length` is |v|, `rising` and `settled` count steps in a row."""

    state: LissaState
    status: Tensor
    length: Tensor
    rising: Tensor
    settled: Tensor


_RUNNING = -1


def _start_watch(v: Params) -> _Watch:
    state = lissa_init(v)
    length = state.residual_norm
    none = torch.zeros_like(state.step)
    status = torch.where(length.isfinite(), none + _RUNNING, none + Status.NOT_FINITE)
    return _Watch(state, status, length, rising=none, settled=none)


def _keep_watch(watch: _Watch, state: LissaState, rtol: float | None) -> _Watch:
    """Judges the step from `watch.state` to `state`. A right-hand side that has ended keeps its record."""
    size = tree.norm(state.h)
    rose = state.residual_norm > torch.maximum(watch.state.residual_norm, watch.length)
    rising = torch.where(rose, watch.rising + 1, 0)
    small = state.residual_norm <= (rtol or 0.0) * watch.length
    settled = torch.where(small, watch.settled + 1, 0)

    status = torch.full_like(watch.status, _RUNNING)
    if rtol is not None:
        status = torch.where(settled >= SETTLED_STEPS, int(Status.CONVERGED), status)
    diverged = (size > GROWTH_LIMIT * (state.step + 1) * watch.length) | (rising >= RISE_LIMIT)
    status = torch.where(diverged, int(Status.DIVERGED), status)
    status = torch.where(size.isnan(), int(Status.NOT_FINITE), status)

    running = watch.status == _RUNNING
    kept = LissaState(
        h=tree.where(running, state.h, watch.state.h) if rtol is not None else state.h,
        residual_norm=torch.where(running, state.residual_norm, watch.state.residual_norm),
        step=torch.where(running, state.step, watch.state.step),
    )
    return _Watch(kept, torch.where(running, status, watch.status), watch.length, rising, settled)


def _solution(watch: _Watch, scale: float) -> Solution:
    """`x = h / scale`, or NaN where the recursion failed: a failure must not look like a number."""
    status = torch.where(watch.status == _RUNNING, int(Status.FINISHED), watch.status)
    failed = (status == Status.DIVERGED) | (status == Status.NOT_FINITE)
    nan = tree.map(lambda h: torch.full_like(h, torch.nan), watch.state.h)
    residual_norm = watch.state.residual_norm
    return Solution(
        value=tree.where(failed, nan, tree.scale(1 / scale, watch.state.h)),
        status=status,
        residual_norm=residual_norm,
        relative_residual=torch.where(watch.length == 0, torch.zeros_like(residual_norm), residual_norm / watch.length),
        steps=watch.state.step,
    )


def _raise_on_failure(solution: Solution, damping: float, scale: float) -> None:
    worst = Status(host.largest(solution.status))
    if worst.failed:
        raise SolverError(
            f"`solve_lissa(damping={damping:g}, scale={scale:g})` ended {worst.name}. {worst.explanation}", solution
        )
