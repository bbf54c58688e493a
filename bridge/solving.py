"""Solves `(H + damping I) x = v` for K stacked gradients by the solver of the caller's choice.

Knows which of `lissa`'s solvers a name stands for, and what "auto" means; knows nothing of scores or rankings.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bridge import strategies
from bridge.checkpoint import Record
from bridge.distributed import Ranks
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
    tree,
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


def choose(
    session: Session,
    train: Sequence[Any],
    wanted: LissaSettings,
    *,
    seed: int,
    ranks: Ranks | None = None,
    record: Record | None = None,
) -> Choice:
    """Fills in damping, scale, steps and method from the spectrum on a sample, if any of them is left open.

    Args:
        session: Of the public call.
        train: All training instances.
        wanted: What the caller asks for.
        seed: Of the sample and the probes.
        ranks: Who share the work.
        record: Where a choice is kept, and an earlier run's is found.

    Raises:
        ValueError: If the Hessian plus damping is not positive definite; the message names the least damping.
    """

    def made(_: Record) -> dict[str, Any]:
        choice = _choose(session, train, wanted, seed, ranks or Ranks())
        return {**choice._asdict(), "plan": choice.plan and choice.plan._asdict()}

    known = (record or Record()).once("choice", made)
    return Choice(**{**known, "plan": known["plan"] and Settings(**known["plan"])})


def _choose(session: Session, train: Sequence[Any], wanted: LissaSettings, seed: int, ranks: Ranks) -> Choice:
    solver, damping, scale, steps = wanted.solver, wanted.damping, wanted.scale, wanted.steps
    by_name = solver in SOLVERS
    if damping is not None and by_name:
        return Choice(solver, damping, math.nan, 0, len(train))
    if damping is not None and scale is not None and steps is not None and solver == "lissa":
        return Choice(solver, damping, scale, steps, wanted.batch_size)

    generator = torch.Generator().manual_seed(seed)
    spectrum = _spectrum(session, train, generator, ranks)
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
    session: Session,
    train: Sequence[Any],
    choice: Choice,
    *,
    size: int,
    rtol: float,
    seed: int,
    ranks: Ranks | None = None,
) -> Callable[[Params, Record], Solution]:
    """`K stacked v -> K solutions`, by a solver that sees all the data and reports the residual on it.

    Where a record is kept, a few right-hand sides at a time, each of which is solved once and for all.

    Args:
        session: Of the public call.
        train: All training instances.
        choice: From `choose`: with a plan, or the name of one of `SOLVERS`.
        size: Instances a product takes at a time.
        rtol: The relative residual that the solver stops at.
        seed: Of the batches.
        ranks: Who share the work.
    """
    ranks = ranks or Ranks()
    plan, share = choice.plan, ranks.share(len(train))
    chunks = [range(start, min(start + size, share.stop)) for start in range(share.start, share.stop, size)]
    with session.naming("training", train, share):
        batches = [session.batch(train, chunk) for chunk in chunks]
        mode = _mode(session, batches[0]) if batches else "auto"
        matvec = partial(hvp, session.model.loss_fn, session.model.params, mode=mode)
    of_share = mean_matvec(matvec, batches, weights=[len(chunk) for chunk in chunks]) if batches else tree.zeros_like

    def full(v: Params) -> Params:
        return ranks.sum(of_share(v), len(share) / len(train))

    if plan is None:
        solve_one = partial(SOLVERS[choice.solver], full, damping=choice.damping, rtol=rtol, throw=False)
    else:
        solve_one = partial(_follow, plan, session, train, matvec, full, seed, ranks)
    task = "inverse Hessian-vector products"
    solve_each = strategies.for_each_vector(task, lambda v, _: solve_one(v))

    def solve_some(vectors: Params) -> Solution:
        if ranks.size == 1:
            return solve_each(vectors, lambda: None)
        # One process must not fall back on a slower way while the others sum the first: all try it alone before.
        if all(ranks.gathered(not batches or _runs_stacked(matvec, batches[0], vectors))):
            return torch.vmap(solve_one, randomness="same")(vectors)
        return stacked_solutions([solve_one(vector) for vector in strategies.rows(vectors)])

    def solve(vectors: Params, record: Record) -> Solution:
        K = strategies.length(vectors)
        if not ranks.agreed(record.kept):
            return solve_some(vectors)
        parts = [
            record.once(
                f"vectors {k}", lambda _, k=k: plain(solve_some(tree.map(lambda t: t[k : k + AT_ONCE], vectors)))
            )
            for k in range(0, K, AT_ONCE)
        ]
        return joined_solutions(parts)

    return solve


AT_ONCE = 16
"""Right-hand sides that are solved together where what is solved is kept: the fewer, the less is lost."""


def plain(solution: Solution) -> dict[str, Any]:
    """What is used of a solution, in values that a record takes: without the trace and the state of the iteration."""
    return {**solution._asdict(), "residual_trace": solution.residual_trace[:, :0], "state": []}


def joined_solutions(parts: Sequence[dict[str, Any]]) -> Solution:
    """The solution of all right-hand sides from `plain` ones of some of them."""
    return pytree.tree_map(lambda *t: torch.cat(t), *(Solution(**{**part, "state": ()}) for part in parts))


def stacked_solutions(solutions: Sequence[Solution]) -> Solution:
    """K solutions as one; traces, which may differ in length, are left out."""
    without = [s._replace(residual_trace=s.residual_trace[:0], state=()) for s in solutions]
    return pytree.tree_map(lambda *t: torch.stack(t), *without)


def _runs_stacked(matvec: BatchMatvec, batch: Any, vectors: Params) -> bool:
    try:
        torch.vmap(matvec, in_dims=(None, 0))(batch, tree.map(lambda t: t[:1], vectors))
    except Exception:
        return False
    return True


def _follow(
    plan: Settings,
    session: Session,
    train: Sequence[Any],
    matvec: BatchMatvec,
    full: Matvec,
    seed: int,
    ranks: Ranks,
    v: Params,
) -> Solution:
    def of_rows(rows: Tensor, v: Params) -> Params:
        return _product(session, train, matvec, ranks, rows.tolist())(v)

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


def _product(session: Session, train: Sequence[Any], matvec: BatchMatvec, ranks: Ranks, rows: Sequence[int]) -> Matvec:
    """`v -> H v` on these rows, each rank multiplying by those of its share."""
    mine = ranks.of_share(rows, len(train))
    batch = session.batch(train, mine) if mine else None
    if ranks.size == 1:
        return partial(matvec, batch)

    def product(v: Params) -> Params:
        return ranks.sum(matvec(batch, v), len(mine) / len(rows)) if mine else ranks.sum(tree.zeros_like(v))

    return product


def _spectrum(session: Session, train: Sequence[Any], generator: torch.Generator, ranks: Ranks) -> Spectrum:
    chosen = torch.randperm(len(train), generator=generator)[:SAMPLE].tolist()
    with session.naming("training", train, ranks.of_share(chosen, len(train))):
        mine = session.batch(train, ranks.of_share(chosen, len(train)) or chosen[:1])
        matvec = partial(hvp, session.model.loss_fn, session.model.params, mode=_mode(session, mine))
        product = _product(session, train, matvec, ranks, chosen)
    try:
        return estimate_spectrum(product, session.model.params, generator=generator)
    except ValueError:
        ranks.raise_first(partial(session.first_not_finite, "training", train, ranks.share(len(train))))
        raise


def _mode(session: Session, batch: Any) -> str:
    return choose_mode(session.model.loss_fn, session.model.params, batch)
