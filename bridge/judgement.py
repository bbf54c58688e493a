"""What a solve is worth: measured where it must be, and put into `Diagnostics`.

Knows solutions, and how they are measured on the training data; knows nothing of how they were found or are used.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from bridge import diagnostics, measurements
from bridge.diagnostics import Diagnostics
from bridge.session import Session
from bridge.solving import Choice
from lissa import Params, Solution

MOST_CORRELATED = 8
"""Right-hand sides whose scores are compared with plain gradient products, for a warning."""


def of_solution(
    session: Session,
    train: Sequence[Any],
    choice: Choice,
    vectors: Params,
    solution: Solution,
    *,
    num_samples: int,
    seed: int,
) -> Diagnostics:
    """The diagnostics of K stacked solutions; where they point along `vectors`, with the correlation of their scores.

    Args:
        session: Of the public call.
        train: All training instances.
        choice: How it was solved.
        vectors: The K right-hand sides, stacked.
        solution: Of all K.
        num_samples: Runs averaged.
        seed: Of the sample that scores are compared on.
    """
    cosine = measurements.cosines(vectors, solution.value)
    correlation = torch.full_like(cosine, torch.nan, dtype=torch.float64)
    plain = (cosine >= diagnostics.PLAIN_GRADIENT).nonzero()[:MOST_CORRELATED, 0]
    if len(plain):
        correlation[plain] = measurements.correlations(session, train, vectors, solution.value, plain, seed=seed)
    return Diagnostics(
        solver=choice.solver,
        damping=choice.damping,
        scale=choice.scale,
        steps=int(solution.steps.max()),
        num_samples=num_samples,
        examples=len(train),
        batch_size=choice.batch_size,
        status=solution.status.cpu(),
        relative_residual=solution.relative_residual.cpu(),
        cosine_with_gradient=cosine.cpu(),
        correlation_with_plain=correlation.cpu(),
        largest_eigenvalue=math.nan,
    )


def of_call(session: Session, train: Sequence[Any], found: Diagnostics, *, seed: int) -> Diagnostics:
    """With the Hessian's largest eigenvalue, if there is something to warn of."""
    if not found.problems():
        return found
    return found._replace(largest_eigenvalue=measurements.largest_eigenvalue(session, train, seed=seed))
