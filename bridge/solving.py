"""Solves `(H + damping I) x = v` for K stacked gradients by the solver of the caller's choice.

Knows which of `lissa`'s solvers a name stands for, and what "auto" means; knows nothing of scores or rankings.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bridge import strategies
from bridge.session import Session
from bridge.settings import LissaSettings
from lissa import (
    BatchMatvec,
    Matvec,
    Params,
    Settings,
    Solution,
    Spectrum,
    choose_mode,
    estimate_spectrum,
    hvp,
    mean_matvec,
    solve_cg,
    solve_dense,
    solve_minres,
    solve_tuned,
    suggest_damping,
    tune_lissa,
)

SOLVERS: dict[str, Callable[..., Solution]] = {"cg": solve_cg, "minres": solve_minres, "dense": solve_dense}
"""The solvers that multiply by the Hessian of all the data, by name."""

SAMPLE = 512
"""Training instances on which the spectrum is estimated, where something is to be tuned."""


class Choice(NamedTuple):
    """What is solved and how, with a number wherever the caller left it open.

    Attributes:
        solver: The name; for LiSSA that goes its own way, that way in brackets.
        damping: In the units of the Hessian.
        scale: The step size is `1 / scale`; NaN where none plays a part.
        steps: LiSSA steps of one run; 0 where the solver decides.
        batch_size: Training examples a step.
        plan: How `lissa.solve_tuned` is to go about it; None where the caller chose.
    """

    solver: str
    damping: float
    scale: float
    steps: int
    batch_size: int
    plan: Settings | None = None


def choose(session: Session, train: Sequence[Any], wanted: LissaSettings, *, seed: int) -> Choice:
    """Fills in damping, scale, steps and method from the spectrum on a sample, if any of them is left open.

    Raises:
        ValueError: If the Hessian plus damping is not positive definite; the message names the least damping.
    """
    solver, damping, scale, steps = wanted.solver, wanted.damping, wanted.scale, wanted.steps
    by_name = solver in SOLVERS
    if damping is not None and by_name:
        return Choice(solver, damping, math.nan, 0, len(train))
    if damping is not None and scale is not None and steps is not None and solver == "lissa":
        return Choice(solver, damping, scale, steps, wanted.batch_size)

    generator = torch.Generator().manual_seed(seed)
    spectrum = _spectrum(session, train, generator)
    damping = suggest_damping(spectrum) if damping is None else damping
    if by_name:
        return Choice(solver, damping, math.nan, 0, len(train))
    free = solver == "auto" or (scale is None and steps is None)
    method = {"auto": "auto", "lissa": "lissa" if free else "averaged"}[solver]
    rtol = wanted.rtol if free else 1.0  # the last iterate has a noise floor that no number of steps lowers
    try:
        plan = tune_lissa(
            spectrum, damping=damping, n=len(train), rtol=rtol, batch_size=wanted.batch_size, method=method,
            repeats=wanted.num_samples,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"`SimpleInfluence(ridge=...)` is the damping that {error}") from error
    if free:
        name = "cg" if plan.method == "cg" else f"lissa ({plan.method})"
        return Choice(name, damping, plan.scale, plan.steps, plan.batch_size, plan)
    scale = plan.scale if scale is None else scale
    steps = math.ceil(plan.steps * scale / plan.scale) if steps is None else steps
    return Choice(solver, damping, scale, steps, wanted.batch_size)


def on_all_data(
    session: Session, train: Sequence[Any], choice: Choice, *, size: int, rtol: float, seed: int
) -> Callable[[Params], Solution]:
    """`K stacked v -> K solutions`, by a solver that sees all the data and reports the residual on it.

    Args:
        session: Of the public call.
        train: All training instances.
        choice: From `choose`: with a plan, or the name of one of `SOLVERS`.
        size: Instances a product takes at a time.
        rtol: The relative residual that the solver stops at.
        seed: Of the batches.
    """
    plan = choice.plan
    chunks = [range(start, min(start + size, len(train))) for start in range(0, len(train), size)]
    with session.naming("training", train, range(len(train))):
        batches = [session.batch(train, chunk) for chunk in chunks]
        matvec = partial(hvp, session.model.loss_fn, session.model.params, mode=_mode(session, batches[0]))
    full: Matvec = mean_matvec(matvec, batches, weights=[len(chunk) for chunk in chunks])

    if plan is None:
        solve_one = partial(SOLVERS[choice.solver], full, damping=choice.damping, rtol=rtol, throw=False)
    else:
        solve_one = partial(_follow, plan, session, train, matvec, full, seed)
    solve_each = strategies.for_each_vector("inverse Hessian-vector products", lambda v, _: solve_one(v))
    return lambda vectors: solve_each(vectors, lambda: None)


def _follow(
    plan: Settings, session: Session, train: Sequence[Any], matvec: BatchMatvec, full: Matvec, seed: int, v: Params
) -> Solution:
    def of_rows(rows: Tensor, v: Params) -> Params:
        return matvec(session.batch(train, rows.tolist()), v)

    return solve_tuned(
        of_rows,
        v,
        torch.arange(len(train)),
        damping=plan.damping,
        rtol=plan.rtol,
        generator=torch.Generator().manual_seed(seed),
        settings=plan,
        full_matvec=full,
        throw=False,
    )


def _spectrum(session: Session, train: Sequence[Any], generator: torch.Generator) -> Spectrum:
    chosen = torch.randperm(len(train), generator=generator)[:SAMPLE].tolist()
    with session.naming("training", train, chosen):
        batch = session.batch(train, chosen)
        matvec = partial(hvp, session.model.loss_fn, session.model.params, batch, mode=_mode(session, batch))
    try:
        return estimate_spectrum(matvec, session.model.params, generator=generator)
    except ValueError:
        session.first_not_finite("training", train)
        raise


def _mode(session: Session, batch: Any) -> str:
    return choose_mode(session.model.loss_fn, session.model.params, batch)
