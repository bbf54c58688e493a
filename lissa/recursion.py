"""LiSSA, the stochastic recursion for `(H + damping I)^-1 v`: state, init, update, and the loop that watches it.

Knows the recursion and how it fails; knows nothing of losses: curvature comes in as `matvec(batch, v)`. One vector is
solved for; `torch.vmap` gives many, which then share every batch.

Source: N. Agarwal, B. Bullins and E. Hazan, Second-order stochastic optimization for machine learning in linear time,
JMLR 18 (2017), algorithm 1; P. W. Koh and P. Liang, Understanding black-box predictions via influence functions,
ICML 2017, section 3.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lissa import checks, host, outcome, tree
from lissa.operators import damped
from lissa.outcome import RUNNING
from lissa.types import Batch, BatchMatvec, Matvec, Params, Solution, Status

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


class LissaRun(NamedTuple):
    """All that the loop knows of one right-hand side; `solve_lissa(..., state=...)` goes on from it bit for bit.

    Attributes:
        state: The recursion's own state.
        mean: Mean of the iterates after `average_after`, in the units of `h`; empty if none is taken.
        status: A `Status`, or -1 while it runs, shape `()`.
        length: `|v|`, shape `()`.
        rising: Number of steps in a row whose residual rose above `|v|`, shape `()`.
        settled: Number of steps in a row whose residual was at most `rtol |v|`, shape `()`.
    """

    state: LissaState
    mean: Params
    status: Tensor
    length: Tensor
    rising: Tensor
    settled: Tensor


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
    average_after: int | None = None,
    repeats: int = 1,
    rtol: float | None = None,
    full_matvec: Matvec | None = None,
    state: LissaRun | None = None,
    throw: bool = True,
) -> Solution:
    """`x ~ (H + damping I)^-1 v` by LiSSA: `h <- v + h - (H_t h + damping h) / scale` each batch, `x = h / scale`.

    The mean-square error falls while `scale > (lambda_max + damping + trace / batch_size) / 2`, at a rate of
    `(1 - damping / scale)` a step in the slowest mode. The last iterate keeps a noise floor from the batches;
    `average_after` lowers it, `solve_svrg` removes it. `tune_lissa` chooses the numbers.

    To go on later, on another machine if need be, pass `state=solution.state` with the same other arguments and the
    batches that come next: `steps` then counts further steps, and the result is bit for bit that of one long call. The
    batches that come next are those of the same stream, made anew from the same seed, without the first
    `solution.steps`: `itertools.islice(index_stream(...), int(solution.steps), None)`.

    Args:
        matvec: `matvec(batch, v) -> H_batch v`, for instance `partial(hvp, loss_fn, params)`.
        v: The right-hand side, often the gradient of a test loss.
        batches: One batch a step. May be infinite if `steps` is given. Each batch has equal weight.
        damping: In the units of `H`: the system solved is `(H + damping I) x = v`.
        scale: In the units of `H`. The step size is `1 / scale`; it never changes the answer.
        steps: Number of steps of a repeat; the default is one for each batch there is.
        average_after: If given, the answer is the mean of the iterates after this step, not the last iterate.
        repeats: Independent runs on successive batches; the answer is their mean. More than one needs `steps`.
        rtol: If given, a right-hand side is done once its residual is at most `rtol |v|`: on all the data, looked at
            after 16, 32, 64, ... steps, if `full_matvec` is given; else on a batch, eight steps in a row. It then
            keeps its value while others go on.
        full_matvec: `full_matvec(v) -> H v` on all the data, or on data held out to judge by; see `mean_matvec`. The
            residual of the answer is then measured with it. It changes no step.
        state: Where an earlier call stopped.
        throw: Whether a failure raises `SolverError`. If False, it is data: `status` names it, `value` is all NaN.

    Returns:
        The `Solution`. With `full_matvec`, `residual_norm` is that of `value` on its data. Without, it is the latest
        batch's, for the iterate before the last (the largest over repeats): an upper estimate, as it contains that
        batch's noise. `residual_trace` holds the batch's residual of every step, repeat after repeat. `steps` counts
        those of all repeats, and of the earlier calls that `state` comes from.

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
    checks.count("solve_lissa", "repeats", repeats)
    for name, count in (("steps", steps), ("average_after", average_after)):
        if count is not None:
            checks.count("solve_lissa", name, count, at_least=0)
    if rtol is not None:
        checks.positive("solve_lissa", "rtol", rtol)
    if repeats > 1 and (steps is None or state is not None):
        raise ValueError(f"`solve_lissa(repeats={repeats})` needs steps=..., and goes on from no state.")

    stream = iter(batches)
    runs: list[LissaRun] = []
    trace: list[Tensor] = []
    for _ in range(repeats):
        run = state or start(v, average=average_after is not None)
        run = advance(
            matvec, v, stream, run, trace,
            damping=damping, scale=scale, steps=steps, average_after=average_after, rtol=rtol, full_matvec=full_matvec,
        )  # fmt: skip
        runs.append(run)
    answers = [answer(run, scale, average_after) for run in runs]
    samples = tree.map(lambda *t: torch.stack(t), *answers) if repeats > 1 else None
    value = tree.map(lambda t: t.mean(0), samples) if samples else answers[0]
    if full_matvec is None:
        residual_norm = torch.stack([run.state.residual_norm for run in runs]).amax(0)
    else:
        residual_norm = tree.norm(tree.sub(v, damped(full_matvec, damping)(value)))
    solution = outcome.solution(
        value,
        status=outcome.worst(torch.stack([run.status for run in runs])),
        residual_norm=residual_norm,
        length=runs[0].length,
        steps=torch.stack([run.state.step for run in runs]).sum(0),
        trace=trace,
        samples=samples,
        state=runs[0] if repeats == 1 else (),
        random=True,
    )
    if throw:
        call = f"solve_lissa(damping={damping:g}, scale={scale:g})"
        outcome.raise_on_failure(call, solution, _advice(trace, scale, solution.status))
    return solution


def start(v: Params, *, average: bool) -> LissaRun:
    """The run before any batch; for `advance`."""
    state = lissa_init(v)
    length = state.residual_norm
    none = torch.zeros_like(state.step)
    status = torch.where(length.isfinite(), none + RUNNING, none + Status.NOT_FINITE)
    return LissaRun(state, tree.zeros_like(v) if average else {}, status, length, rising=none, settled=none)


def advance(
    matvec: BatchMatvec,
    v: Params,
    batches: Iterator[Batch],
    run: LissaRun,
    trace: list[Tensor],
    *,
    damping: float,
    scale: float,
    steps: int | None,
    average_after: int | None = None,
    rtol: float | None = None,
    full_matvec: Matvec | None = None,
) -> LissaRun:
    """Steps along `batches` until all right-hand sides have ended; appends each step's residual norm to `trace`."""
    first = host.largest(run.state.step)
    judged_by_batch = rtol if full_matvec is None else None
    taken = 0
    for taken, batch in enumerate(itertools.islice(batches, steps), start=1):
        before = run
        state = lissa_update(matvec, v, run.state, batch, damping=damping, scale=scale)
        run = _watch(run, state, judged_by_batch)
        if average_after is not None and first + taken > average_after:
            run = _average(before, run, count=first + taken - average_after)
        trace.append(torch.where(before.status == RUNNING, state.residual_norm, torch.nan))
        if rtol is not None and full_matvec is not None and _is_time(first + taken):
            x = answer(run, scale, average_after)
            residual_norm = tree.norm(tree.sub(v, damped(full_matvec, damping)(x)))
            run = _judge(run, residual_norm, rtol)
        if taken % CHECK_EVERY == 0 and not host.any_true(run.status == RUNNING):
            return run
    if steps is not None and taken < steps:
        raise ValueError(f"`solve_lissa(batches=...)` ended after {taken} of {steps} steps.")
    return run


def answer(run: LissaRun, scale: float, average_after: int | None) -> Params:
    """`h / scale`: of the mean iterate, if one is asked for and the run came so far; else of the last."""
    if average_after is None:
        return tree.scale(1 / scale, run.state.h)
    return tree.scale(1 / scale, tree.where(run.state.step > average_after, run.mean, run.state.h))


def _watch(run: LissaRun, state: LissaState, rtol: float | None) -> LissaRun:
    """Judges the step from `run.state` to `state`. A right-hand side that has ended keeps its record."""
    judged = judge_step(run, state.residual_norm, tree.norm(state.h), state.step, rtol)
    running = run.status == RUNNING
    return judged._replace(
        state=LissaState(
            h=tree.where(running, state.h, run.state.h),
            residual_norm=torch.where(running, state.residual_norm, run.state.residual_norm),
            step=torch.where(running, state.step, run.state.step),
        )
    )


def judge_step(run: LissaRun, residual_norm: Tensor, size: Tensor, step: Tensor, rtol: float | None) -> LissaRun:
    """`run` with the status after a step to an iterate of length `size`; its state is left as it was.

    The numbers may be of one right-hand side, shape `()`, or of K, shape `(K,)`.
    """
    rose = residual_norm > torch.maximum(run.state.residual_norm, run.length)
    rising = torch.where(rose, run.rising + 1, 0)
    small = residual_norm <= (rtol or 0.0) * run.length
    settled = torch.where(small, run.settled + 1, 0)

    status = torch.full_like(run.status, RUNNING)
    if rtol is not None:
        status = torch.where(settled >= SETTLED_STEPS, int(Status.CONVERGED), status)
    diverged = (size > GROWTH_LIMIT * (step + 1) * run.length) | (rising >= RISE_LIMIT)
    status = torch.where(diverged, int(Status.DIVERGED), status)
    status = torch.where(size.isnan(), int(Status.NOT_FINITE), status)

    running = run.status == RUNNING
    return run._replace(
        status=torch.where(running, status, run.status),
        rising=torch.where(running, rising, run.rising),
        settled=torch.where(running, settled, run.settled),
    )


def _average(before: LissaRun, run: LissaRun, count: int) -> LissaRun:
    """`mean <- mean + (h - mean) / count`, where the right-hand side had not ended before this step."""
    running = before.status == RUNNING
    mean = tree.map(lambda m, h: torch.where(running, m + (h - m) / count, m), run.mean, run.state.h)
    return run._replace(mean=mean)


def _is_time(step: int) -> bool:
    """After 16, 32, 64, ... steps: a look at all the data then costs little beside the steps between two looks."""
    return step >= CHECK_EVERY and step & (step - 1) == 0


def _judge(run: LissaRun, residual_norm: Tensor, rtol: float) -> LissaRun:
    """Converged, where the residual on all the data is small."""
    converged = (run.status == RUNNING) & (residual_norm <= rtol * run.length)
    return run._replace(status=torch.where(converged, int(Status.CONVERGED), run.status))


def _advice(trace: list[Tensor], scale: float, status: Tensor) -> str:
    """Which `scale` to try after a divergence: a step multiplies the fastest mode by `1 - (lambda + damping) / scale`.

    So a residual that grows by `g` a step comes of `lambda + damping = (1 + g) scale`, which is a stable scale itself.
    """
    if host.largest(status) != Status.DIVERGED or len(trace) < 2:
        return ""
    norms = torch.stack(trace)
    growth = host.number((norms[1:] / norms[:-1]).nan_to_num(nan=0.0, posinf=0.0).amax())
    return (
        f" In this run the residual grew by up to {growth:.3g} a step: try scale={(1 + growth) * scale:.3g} "
        f"(it was {scale:g}); if that diverges too, raise `damping`."
    )
