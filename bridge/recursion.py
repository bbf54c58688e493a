"""AllenNLP's way to `(H + damping I)^-1 v`: LiSSA on the next batches, the mean over runs, the last iterate of each.

Knows runs, batches of instances and K stacked right-hand sides; knows nothing of what a solution is for.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from bridge import measurements, progress, strategies
from bridge.rows import Rows
from bridge.session import Session
from bridge.solving import Choice
from lissa import Params, Solution, tree

Run = list[list[int]]
"""The batches of one run, each the indices of its instances."""


def solver(
    session: Session,
    train: Rows,
    choice: Choice,
    runs: Callable[[], list[Run]],
    *,
    measured: Callable[[int], int],
    size: int,
) -> Callable[[Params], Solution]:
    """`K stacked v -> K solutions`, with the residual on all the data of as many as `measured(K)`; NaN for the others.

    Args:
        session: Of the public call.
        train: All training instances.
        choice: Damping and scale.
        runs: The batches of each run, for one call of the solver.
        measured: How many of K residuals are worth their cost.
        size: Instances that a product on all the data takes at a time.
    """
    solve_each = strategies.inverse_products(session.model, choice.damping, choice.scale)
    at_work: list[int] = []

    def solve(vectors: Params) -> Solution:
        with session.naming("training", train, at_work):
            solutions = [solve_each(vectors, partial(_batches, session, train, run, at_work)) for run in runs()]
        samples = tree.map(lambda *t: torch.stack(t, 1), *(solution.value for solution in solutions))
        value = tree.map(lambda t: t.mean(1), samples)
        status = torch.stack([solution.status for solution in solutions]).amax(0)
        residual = torch.full_like(solutions[0].relative_residual, torch.nan)
        count = measured(len(residual))
        if count:
            residual = measurements.relative_residuals(
                session, train, choice.damping, vectors, value, size=size, count=count
            )
        return solutions[0]._replace(
            value=value, status=status, relative_residual=residual, samples=samples if len(solutions) > 1 else {}
        )

    return solve


def _batches(session: Session, train: Rows, run: Run, at_work: list[int]) -> Iterator[Any]:
    """The batches of a run; `at_work` holds the indices of the latest, so that an error can be traced to it."""
    for indices in progress.bar(run, description="LiSSA", show=session.show):
        at_work[:] = indices
        yield session.batch(train, indices)
