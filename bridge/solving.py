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

from bridge import products, strategies
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
    solve_block_cg,
    solve_cg,
    solve_dense,
    solve_minres,
    solve_tuned,
    stacked_hvp,
    suggest_damping,
    traced,
    tree,
    tune_lissa,
)

SOLVERS: dict[str, Callable[..., Solution]] = {"cg": solve_cg, "minres": solve_minres, "dense": solve_dense}
"""The solvers that multiply by the Hessian of all the data, by name."""

SAMPLE = 512
"""Training instances on which the spectrum is estimated, where something is to be tuned."""


AT_ONCE = 16
"""Right-hand sides that are solved together where what is solved is kept: the fewer, the less is lost. From so many on
"auto" counts on what they share."""

STEP, STEP_WORK = 32, 2**24
"""What a step of LiSSA costs besides its products, in examples: passing over the vectors takes as long as multiplying
them by 32 examples, and besides a millisecond goes by, enough for an example times 2^24 parameters times vectors."""

MUCH_WORK = 2**31
"""Examples times vectors times parameters of one product, from which on it pays to record it: tenths of a second."""


class Choice(NamedTuple):
    """What is solved and how, with a number wherever the caller left it open.

    Attributes:
        solver: The name; for LiSSA that goes its own way, that way in brackets.
        damping: In the units of the Hessian.
        scale: The step size is `1 / scale`; NaN where none plays a part.
        steps: LiSSA steps of one run; 0 where the solver decides.
        batch_size: Training examples a step.
        plan: How `lissa.solve_tuned` is to go about it; None where the caller chose.
        shared: The same for `AT_ONCE` right-hand sides that are solved together, or more; None where it makes no
            difference.
    """

    solver: str
    damping: float
    scale: float
    steps: int
    batch_size: int
    plan: Settings | None = None
    shared: Settings | None = None

    def of(self, vectors: int) -> "Choice":
        """What is chosen for so many right-hand sides that are solved together."""
        if self.shared is None or vectors < AT_ONCE:
            return self
        return _follows(self.damping, self.shared)


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
        plans = {name: getattr(choice, name) for name in ("plan", "shared")}
        return {**choice._asdict(), **{name: plan and plan._asdict() for name, plan in plans.items()}}

    known = (record or Record()).once("choice", made)
    return Choice(**{**known, **{name: known[name] and Settings(**known[name]) for name in ("plan", "shared")}})


def _follows(damping: float, plan: Settings, shared: Settings | None = None) -> Choice:
    name = {"cg": "cg", "block-cg": "block cg"}.get(plan.method, f"lissa ({plan.method})")
    return Choice(name, damping, plan.scale, plan.steps, plan.batch_size, plan, shared)


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
    P = tree.numel(session.model.params)

    def tuned(vectors: int) -> Settings:
        overhead = STEP + STEP_WORK / (P * vectors) if solver == "auto" else 0.0
        return tune_lissa(
            spectrum, damping=damping, n=len(train), rtol=rtol, batch_size=wanted.batch_size, method=method,
            repeats=wanted.num_samples, vectors=vectors, overhead=overhead,
        )  # fmt: skip

    try:
        plan = tuned(1)
    except ValueError as error:
        raise ValueError(f"`SimpleInfluence(ridge=...)` is the damping that {error}") from error
    if free:
        return _follows(damping, plan, tuned(AT_ONCE) if solver == "auto" else None)
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
    ranks, model = ranks or Ranks(), session.model
    share = ranks.share(len(train))
    chunks = [range(start, min(start + size, share.stop)) for start in range(share.start, share.stop, size)]
    weights = [len(chunk) for chunk in chunks]
    with session.naming("training", train, share):
        batches = [session.batch(train, chunk) for chunk in chunks]
        matvec = _matvec(session, batches[0] if batches else None)

    def of_all(matvec: BatchMatvec) -> Matvec:
        of_share = mean_matvec(matvec, batches, weights=weights) if batches else tree.zeros_like
        return lambda v: ranks.sum(of_share(v), len(share) / len(train))

    full = of_all(matvec)

    def solve_some(choice: Choice, vectors: Params) -> Solution:
        plan, K = choice.plan, strategies.length(vectors)
        if plan is not None and plan.method in ("cg", "block-cg") and K > 1:
            product = of_all(_stacked_product(session, matvec, K * len(train) >= MUCH_WORK / tree.numel(model.params)))
            return solve_block_cg(product, vectors, damping=plan.damping, rtol=plan.rtol, steps=plan.steps, throw=False)
        if plan is None:
            solve_one = partial(SOLVERS[choice.solver], full, damping=choice.damping, rtol=rtol, throw=False)
        else:
            solve_one = partial(_follow, plan, session, train, matvec, full, seed, ranks)
        if ranks.size == 1:
            task = "inverse Hessian-vector products"
            return products.for_each_vector(task, lambda v, _: solve_one(v))(vectors, lambda: None)
        # One process must not fall back on a slower way while the others sum the first: all try it alone before.
        if all(ranks.gathered(not batches or _runs_stacked(matvec, batches[0], vectors))):
            return torch.vmap(solve_one, randomness="same")(vectors)
        return stacked_solutions([solve_one(vector) for vector in strategies.rows(vectors)])

    def solve(vectors: Params, record: Record) -> Solution:
        K = strategies.length(vectors)
        used = choice.of(K)
        if not ranks.agreed(record.kept):
            return solve_some(used, vectors)
        parts = [
            record.once(
                f"vectors {k}", lambda _, k=k: plain(solve_some(used, tree.map(lambda t: t[k : k + AT_ONCE], vectors)))
            )
            for k in range(0, K, AT_ONCE)
        ]
        return joined_solutions(parts)

    return solve


def _stacked_product(session: Session, matvec: BatchMatvec, much: bool) -> BatchMatvec:
    """`matvec(batch, vectors)` for K stacked vectors, recorded where much is to be done."""
    if session.model.last_layer is not None:
        return session.model.last_layer
    loss_fn, params = session.model.loss_fn, session.model.params
    recorded = traced(partial(products.product_of_each, loss_fn, params))
    product = products.for_each_vector(
        "Hessian-vector products",
        lambda v, batch: matvec(batch, v),
        *([lambda vectors, batch: recorded(batch, vectors)] if much else []),
        lambda vectors, batch: stacked_hvp(loss_fn, params, batch, vectors),
    )
    return lambda batch, vectors: product(vectors, lambda: batch)


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
        matvec = _matvec(session, mine)
        product = _product(session, train, matvec, ranks, chosen)
    try:
        return estimate_spectrum(product, session.model.params, generator=generator)
    except ValueError:
        ranks.raise_first(partial(session.first_not_finite, "training", train, ranks.share(len(train))))
        raise


def _matvec(session: Session, batch: Any) -> BatchMatvec:
    """`matvec(batch, v)` for one vector, in the mode that suits batches like this one, if there is any."""
    model = session.model
    if model.last_layer is not None:
        return products.of_one(model.last_layer)
    mode = "auto" if batch is None else choose_mode(model.loss_fn, model.params, batch)
    return partial(hvp, model.loss_fn, model.params, mode=mode)
