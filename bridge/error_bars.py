"""Scores with error bars: how far each may be from the exact one, and which places of the ranking that leaves open.

Knows the solutions and the training instances of a session; the mathematics is that of `lissa.uncertainty`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bridge import strategies
from bridge.distributed import Ranks
from bridge.session import Session, check_finite
from lissa import Params, Solution, score_bound, score_interval, settled_places, tree
from lissa.stacked import norms


class ErrorBars(NamedTuple):
    """Scores of all n training instances for K right-hand sides, each of shape `(K, n)`, on the CPU.

    Attributes:
        score: The mean over repeats, if there are several.
        standard_error: Of that mean; NaN if there was one solve.
        bound: `|g_i| |r| / (lambda_min + damping)`.
        settled: In order of rank: whether that place is certain.
    """

    score: Tensor
    standard_error: Tensor
    bound: Tensor
    settled: Tensor

    def ranked(self, k: int) -> list[list[tuple[int, float, float, float, bool]]]:
        """For each right-hand side the k largest scores: index, score, standard error, bound, settled."""
        order = self.score.argsort(dim=-1, descending=True, stable=True)[:, :k]
        score, standard_error, bound = (t.gather(-1, order).tolist() for t in self[:3])
        columns = (order.tolist(), score, standard_error, bound, self.settled[:, :k].tolist())
        return [list(zip(*row, strict=True)) for row in zip(*columns, strict=True)]


def error_bars(
    session: Session,
    train: Sequence[Any],
    vectors: Params,
    solution: Solution,
    *,
    damping: float,
    smallest: float,
    ranks: Ranks,
) -> ErrorBars:
    """The scores of K stacked solutions, with their standard errors, bounds and settled places.

    Args:
        session: Of the public call.
        train: All training instances.
        vectors: The K right-hand sides, stacked.
        solution: Of K right-hand sides; `relative_residual` on all the data, `samples` `(K, R, *shape)` if any.
        damping: That of the solve.
        smallest: A lower bound of the Hessian's eigenvalues.
        ranks: Who share the work.
    """
    K = strategies.length(solution.value)
    repeats = next(iter(solution.samples.values())).shape[1] if solution.samples else 1
    ihvps = tree.map(lambda t: t.flatten(0, 1), solution.samples) if solution.samples else solution.value
    score, losses_and_gradients = strategies.scores(session.model), strategies.losses_and_gradients(session.model)
    dtype = next(iter(vectors.values())).dtype
    size = max(
        1,
        min(session.rows_at_once(train, 1), strategies.stack_limit(session.model) // tree.numel(session.model.params)),
    )
    scores, lengths = torch.zeros(K * repeats, len(train), dtype=dtype), torch.zeros(len(train), dtype=dtype)
    share = ranks.share(len(train))
    for indices, stack in session.examples(train, size=size, description="scoring", chosen=share):
        with session.naming("training", train, indices):
            some, gradients = score(ihvps, stack), losses_and_gradients(stack)[1]
        check_finite("score", "training", indices, some)
        scores[:, indices], lengths[indices] = some.cpu(), norms(gradients).cpu()

    scores, lengths = ranks.sum({"scores": scores, "lengths": lengths}).values()
    residual_norm = (solution.relative_residual * norms(vectors)).cpu()
    bound = score_bound(lengths, residual_norm[:, None].to(dtype), damping=damping, smallest=smallest)
    if repeats == 1:
        return ErrorBars(scores, torch.full_like(scores, torch.nan), bound, settled_places(scores, bound))
    interval = score_interval(scores.unflatten(0, (K, repeats)).movedim(1, 0))
    settled = settled_places(interval.score, interval.half_width)
    return ErrorBars(interval.score, interval.standard_error, bound, settled)
