"""How a solve ends: the `Solution` of what an iteration left behind, and the error that says why there is none.

Shared by all solvers. Knows statuses and residuals; knows nothing of how a solver iterates.
"""

import torch
from torch import Tensor

from lissa import host, tree
from lissa.types import Params, Solution, SolverError, Status

RUNNING = -1
"""The status of a right-hand side that has not ended yet. No `Solution` holds it."""


def relative(residual_norm: Tensor, length: Tensor) -> Tensor:
    """`residual_norm / length`, or 0 where `length`, that of the right-hand side, is 0."""
    return torch.where(length == 0, torch.zeros_like(residual_norm), residual_norm / length)


def solution(
    value: Params,
    *,
    status: Tensor,
    residual_norm: Tensor,
    length: Tensor,
    steps: Tensor,
    trace: list[Tensor],
    samples: Params | None = None,
    state: object = (),
    random: bool = False,
) -> Solution:
    """The `Solution`; a failed `value` becomes NaN, because a failure must not look like a number."""
    status = torch.where(status == RUNNING, int(Status.FINISHED), status)
    status = torch.where(~residual_norm.isfinite() & (status < Status.DIVERGED), int(Status.NOT_FINITE), status)
    failed = status >= Status.DIVERGED
    unknown = torch.full_like(residual_norm, torch.nan if random else 0.0)
    return Solution(
        value=tree.map(lambda t: torch.where(failed, torch.full_like(t, torch.nan), t), value),
        status=status,
        residual_norm=residual_norm,
        relative_residual=relative(residual_norm, length),
        steps=steps,
        residual_trace=torch.stack(trace) if trace else length[None][:0],
        standard_error=standard_error_norm(samples) if samples else unknown,
        samples=samples or {},
        state=state,
    )


def worst(statuses: Tensor) -> Tensor:
    """Of several runs' statuses, stacked: a failure if there is one, and converged only if all have."""
    return torch.where((statuses >= Status.DIVERGED).any(0), statuses.amax(0), statuses.amin(0))


def standard_error_norm(samples: Params) -> Tensor:
    """`sqrt(sum_j Var(x_j) / R)` of R stacked samples, shape `()`."""
    repeats = next(iter(samples.values())).shape[0]
    return tree.norm(tree.map(lambda t: t.std(0) / repeats**0.5, samples))


def raise_on_failure(call: str, solution: Solution, advice: str = "") -> None:
    """Raises `SolverError` if any right-hand side failed: what happened, why, and what to change to what."""
    worst = Status(host.largest(solution.status))
    if worst.failed:
        raise SolverError(f"`{call}` ended {worst.name}. {worst.explanation}{advice}", solution)
