"""LiSSA that reaches the answer: variance reduction with the residual on all the data as anchor.

Knows the recursion of `lissa.recursion`, and runs it on residuals; knows nothing of losses.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from lissa import checks, host, outcome, recursion, tree
from lissa.operators import damped
from lissa.outcome import RUNNING
from lissa.types import Batch, BatchMatvec, Matvec, Params, Solution, Status


def solve_svrg(
    matvec: BatchMatvec,
    v: Params,
    batches: Iterable[Batch],
    *,
    full_matvec: Matvec,
    inner_steps: int,
    damping: float = 0.0,
    scale: float = 1.0,
    average_after: int | None = None,
    epochs: int = 20,
    rtol: float = 1e-2,
    x: Params | None = None,
    throw: bool = True,
) -> Solution:
    """`x <- x + a d` with `d ~ (H + damping I)^-1 r` by LiSSA on batches, and `r = v - (H + damping I) x` on all data.

    LiSSA's error is relative to its right-hand side: on `v` it stops at a noise floor, on the residual `r` that floor
    shrinks with `r`, so that every epoch takes off the same fraction of the error, down to rounding. This is SVRG on
    the quadratic `x.(H + damping I)x / 2 - v.x`: the product on all the data anchors the batches' noise. The step
    `a = <r, A d> / |A d|^2`, with `A = H + damping I`, makes the residual as small as it can be along `d`. It costs
    nothing, as `A d` is computed anyway, and the residual on all the data never rises.

    Args:
        matvec: `matvec(batch, v) -> H_batch v`, for instance `partial(hvp, loss_fn, params)`.
        v: The right-hand side.
        batches: `epochs * inner_steps` batches, or an endless stream, see `index_stream`.
        full_matvec: `full_matvec(v) -> H v` on all the data, see `mean_matvec`; called once an epoch.
        inner_steps: LiSSA steps an epoch. About `8 scale / damping` take off nine tenths of the residual.
        damping: In the units of `H`.
        scale: In the units of `H`, as in `solve_lissa`.
        average_after: The inner answer is the mean of the iterates after this step; the default is the second half.
        epochs: The most epochs taken.
        rtol: A right-hand side is done once its residual on all the data is at most `rtol |v|`.
        x: Where to start; the default is 0. One more full product.
        throw: Whether a failure raises `SolverError`. If False, it is data: `status` names it, `value` is all NaN.

    Returns:
        The `Solution`. Residuals are on all the data; `residual_trace` holds one an epoch. `steps` counts inner steps.

    Raises:
        ValueError: If an argument breaks its rule, or the batches end early.
        SolverError: If an inner recursion diverges or meets NaN, and `throw` is True.

    Example:
        >>> data = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
        >>> def matvec(batch, v):
        ...     return {"x": batch * v["x"]}
        >>> def full_matvec(v):
        ...     return {"x": data.mean(0) * v["x"]}
        >>> batches = (data[t % 2] for t in range(10_000))
        >>> v = {"x": torch.tensor([3.0, 10.0])}
        >>> solution = solve_svrg(
        ...     matvec, v, batches, full_matvec=full_matvec, inner_steps=64, damping=1.0, scale=7.0, rtol=1e-5
        ... )
        >>> [round(x, 4) for x in solution.value["x"].tolist()]
        [1.0, 2.0]

    Source: R. Johnson and T. Zhang, Accelerating stochastic gradient descent using predictive variance reduction,
    NeurIPS 2013, figure 1; here on a quadratic, where it is iterative refinement.
    """
    checks.params("solve_svrg", v, "v")
    checks.non_negative("solve_svrg", "damping", damping)
    checks.positive("solve_svrg", "scale", scale)
    checks.positive("solve_svrg", "rtol", rtol)
    checks.count("solve_svrg", "inner_steps", inner_steps)
    checks.count("solve_svrg", "epochs", epochs)
    average_after = inner_steps // 2 if average_after is None else average_after
    checks.count("solve_svrg", "average_after", average_after, at_least=0)
    A = damped(full_matvec, damping)
    stream = iter(batches)

    length = tree.norm(v)
    if x is None:
        x, r = tree.zeros_like(v), v
    else:
        r = tree.sub(v, A(x))
    residual_norm = tree.norm(r)
    status = _judge(torch.full_like(length, RUNNING, dtype=torch.int64), residual_norm, length, rtol)
    steps = torch.zeros_like(status)
    trace: list[Tensor] = []
    for _ in range(epochs):
        if not host.any_true(status == RUNNING):
            break
        run = recursion.start(r, average=True)
        run = recursion.advance(
            matvec, r, stream, run, [], damping=damping, scale=scale, steps=inner_steps, average_after=average_after
        )
        d = recursion.answer(run, scale, average_after)
        A_d = A(d)
        a = tree.vdot(r, A_d) / tree.vdot(A_d, A_d)
        running = status == RUNNING
        x = tree.where(running, tree.add_scaled(x, a, d), x)
        r = tree.where(running, tree.add_scaled(r, -a, A_d), r)
        residual_norm = torch.where(running, tree.norm(r), residual_norm)
        steps = torch.where(running, steps + run.state.step, steps)
        judged = _judge(torch.where(run.status >= Status.DIVERGED, run.status, RUNNING), residual_norm, length, rtol)
        status = torch.where(running, judged, status)
        trace.append(torch.where(running, residual_norm, torch.nan))
    solution = outcome.solution(
        x, status=status, residual_norm=residual_norm, length=length, steps=steps, trace=trace, random=True
    )
    if throw:
        outcome.raise_on_failure(f"solve_svrg(damping={damping:g}, scale={scale:g})", solution)
    return solution


def _judge(status: Tensor, residual_norm: Tensor, length: Tensor, rtol: float) -> Tensor:
    """Converged where the residual on all the data is small, not finite where it is NaN; a failure stays."""
    judged = torch.where(residual_norm <= rtol * length, int(Status.CONVERGED), RUNNING)
    judged = torch.where(residual_norm.isfinite(), judged, int(Status.NOT_FINITE))
    return torch.where(status == RUNNING, judged, status)
