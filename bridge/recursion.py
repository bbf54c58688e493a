"""AllenNLP's way to `(H + damping I)^-1 v`: LiSSA on the next batches, the mean over runs, the last iterate of each.

Knows runs, batches of instances and K stacked right-hand sides; knows nothing of what a solution is for.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bridge import measurements, products, progress, strategies
from bridge.checkpoint import Record
from bridge.distributed import Ranks
from bridge.functional import Functional
from bridge.rows import Rows
from bridge.session import Session
from bridge.solving import Choice, joined_solutions, plain
from lissa import (
    LissaRun,
    LissaState,
    Params,
    Solution,
    Status,
    solve_lissa_stacked,
    tree,
)

Run = list[list[int]]
"""The batches of one run, each the indices of its instances."""


def solver(
    session: Session,
    train: Rows,
    choice: Choice,
    runs: Callable[[], list[Run]],
    *,
    measured: Callable[[int], int],
    ranks: Ranks,
    model: Functional | None = None,
) -> Callable[[Params, Record], Solution]:
    """`K stacked v -> K solutions`, with the residual on all the data of as many as `measured(K)`; NaN for the others.

    Args:
        session: Of the public call.
        train: All training instances.
        choice: Damping and scale.
        runs: The batches of each run, for one call of the solver.
        measured: How many of K residuals are worth their cost.
        ranks: Who share the work.
        model: What LiSSA multiplies by; the default is the session's. The residual is the session's in any case.
    """
    stepping = session if model is None else replace(session, model=model)
    steps_alike = choice.steps if session.rows(train).gathered else 0
    at_once = products.inverse_products(
        stepping.model, choice.damping, choice.scale, steps_alike=steps_alike,
        example=lambda: session.batch(train, [0]), batch_size=choice.batch_size,
    )  # fmt: skip
    in_pieces = _in_pieces(stepping, train, choice, ranks)
    at_work: list[int] = []

    def solve(vectors: Params, record: Record) -> Solution:
        if ranks.size > 1 or record.kept:
            solutions = [in_pieces(vectors, run, record.part(f"run {r}")) for r, run in enumerate(runs())]
        else:
            with session.naming("training", train, at_work):
                solutions = [at_once(vectors, partial(_batches, session, train, run, at_work)) for run in runs()]
        samples, value = {}, solutions[0].value
        if len(solutions) > 1:
            samples = tree.map(lambda *t: torch.stack(t, 1), *(solution.value for solution in solutions))
            value = tree.map(lambda t: t.mean(1), samples)
        status = torch.stack([solution.status for solution in solutions]).amax(0)
        residual = torch.full_like(solutions[0].relative_residual, torch.nan)
        count = measured(len(residual))
        if count:
            failed = bool((status >= Status.DIVERGED).any())
            measuring = replace(session, will_score=session.will_score and not failed)
            residual = measurements.relative_residuals(
                measuring, train, choice.damping, vectors, value, count=count, ranks=ranks
            )
        return solutions[0]._replace(value=value, status=status, relative_residual=residual, samples=samples)

    return solve


def _batches(session: Session, train: Rows, run: Run, at_work: list[int]) -> Iterator[Any]:
    """The batches of a run; `at_work` holds the indices of the latest, so that an error can be traced to it."""
    rows = session.rows(train)
    together: list[Any] = []
    for step, indices in enumerate(progress.bar(run, description="LiSSA", show=session.show)):
        at_work[:] = indices
        if not rows.gathered:
            yield rows.batch(indices)
            continue
        if not together:
            some = run[step : step + max(1, TOGETHER // len(indices))]
            together = parts_of(rows.batch(itertools.chain(*some)), [len(each) for each in some])[::-1]
        yield together.pop()


TOGETHER = 512
"""Instances that are taken from those gathered at once, for several steps."""


def parts_of(batch: Any, sizes: list[int]) -> list[Any]:
    """A batch of rows as several of these sizes, views of it.

    Example:
        >>> parts_of({"x": torch.arange(3)}, [2, 1])
        [{'x': tensor([0, 1])}, {'x': tensor([2])}]
    """
    leaves, structure = pytree.tree_flatten(batch)
    parts = zip(*(leaf.split(sizes) for leaf in leaves), strict=True)
    return [pytree.tree_unflatten(part, structure) for part in parts]


# ---------------------------------------------------------------------- by several processes, or with a record

STEPS = 16
"""Most steps between two looks at whether a state is to be written."""


def _in_pieces(
    session: Session, train: Rows, choice: Choice, ranks: Ranks
) -> Callable[[Params, Run, Record], Solution]:
    """The same steps, some at a time, so that the state can be kept in between; each rank multiplies by its rows.

    The loop is `solve_lissa_stacked` for any model: what a model refuses is found out product by product, which no
    other process has to know of.
    """
    product_of = products.stacked_products(session.model)

    def matvec(rows: list[int], vectors: Params) -> Params:
        mine = ranks.of_share(rows, len(train))
        if not mine:
            return ranks.sum(tree.zeros_like(vectors))
        with session.naming("training", train, mine):
            product = product_of(vectors, lambda: session.batch(train, mine))
        return ranks.sum(product, len(mine) / len(rows))

    def solve_some(vectors: Params, run: Run, record: Record) -> dict[str, Any]:
        state = _state_of(record.get("state"))
        taken = _steps_of(state)
        shown = iter(progress.bar(run[taken:], description="LiSSA", show=session.show))
        pace = 0.0
        while True:
            count = STEPS if pace * STEPS < record.every else 1
            start = time.monotonic()
            solution = solve_lissa_stacked(
                matvec, vectors, (next(shown) for _ in run[taken : taken + count]),
                damping=choice.damping, scale=choice.scale, state=state, throw=False,
            )  # fmt: skip
            state = solution.state
            taken += len(run[taken : taken + count])
            pace = (time.monotonic() - start) / count
            if taken == len(run) or bool((solution.status >= Status.DIVERGED).all()):
                return plain(solution)
            if record.due():
                record.put("state", _as_dict(state))

    def solve(vectors: Params, run: Run, record: Record) -> Solution:
        K, size = strategies.length(vectors), products.vectors_at_once(session.model)
        parts = [
            record.once(f"vectors {k}", partial(solve_some, tree.map(lambda t, k=k: t[k : k + size], vectors), run))
            for k in range(0, K, size)
        ]
        return joined_solutions(parts)

    return solve


def _as_dict(run: LissaRun) -> dict[str, Any]:
    return {**run._asdict(), "state": run.state._asdict()}


def _state_of(known: dict[str, Any] | None) -> LissaRun | None:
    return None if known is None else LissaRun(**{**known, "state": LissaState(**known["state"])})


def _steps_of(run: LissaRun | None) -> int:
    return 0 if run is None else int(run.state.step.max())
