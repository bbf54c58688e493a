"""Streaming top-k at both ends: the most helpful and the most harmful examples, without an `(n, K)` matrix.

Knows scores and indices; knows nothing of where they come from.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lissa import checks


class Ranking(NamedTuple):
    """The k best at each end so far, sorted, for K score columns. Fewer than k until k scores were seen.

    Attributes:
        helpful_scores: Largest scores first, shape `(*K, k)`.
        helpful_indices: Their indices.
        harmful_scores: Smallest scores first, shape `(*K, k)`.
        harmful_indices: Their indices.
    """

    helpful_scores: Tensor
    helpful_indices: Tensor
    harmful_scores: Tensor
    harmful_indices: Tensor


def ranking_init(scores: Tensor, k: int) -> Ranking:
    """The ranking of no example: empty, with the dtype, device and leading shape of `scores`, shape `(*K, B)`."""
    checks.count("ranking_init", "k", k, at_least=0)
    none = scores[..., :0]
    return Ranking(none, none.long(), none, none.long())


def ranking_update(ranking: Ranking, scores: Tensor, indices: Tensor, *, k: int) -> Ranking:
    """The k largest and k smallest of those ranked so far and `scores`.

    The result does not depend on how the examples are cut into batches: equal scores are ranked in order of arrival.

    Args:
        ranking: What is known so far; it is not changed.
        scores: New scores, shape `(*K, B)`, without NaN.
        indices: Which examples they belong to, shape `(B,)`.
        k: How many to keep at each end; fewer are kept while fewer were seen.

    Returns:
        The new ranking.

    Example:
        >>> scores = torch.tensor([0.5, -2.0, 3.0])
        >>> ranking = ranking_update(ranking_init(scores, 2), scores, torch.arange(3), k=2)
        >>> ranking.helpful_indices.tolist(), ranking.harmful_indices.tolist()
        ([2, 0], [1, 0])
    """
    checks.count("ranking_update", "k", k, at_least=0)
    if scores.shape[-1:] != indices.shape:
        raise ValueError(
            f"`ranking_update(indices=...)` must have shape {tuple(scores.shape[-1:])} to match scores of shape "
            f"{tuple(scores.shape)}, got {tuple(indices.shape)}."
        )
    indices = indices.expand(scores.shape)

    def best(old_scores: Tensor, old_indices: Tensor, descending: bool) -> tuple[Tensor, Tensor]:
        all_scores = torch.cat([old_scores, scores], -1)
        all_indices = torch.cat([old_indices, indices], -1)
        if all_scores.shape[-1] > SORTED_WHOLE * k > 0:
            all_scores, all_indices = _first_best(all_scores, all_indices, k, descending)
        ranked, order = all_scores.sort(dim=-1, descending=descending, stable=True)
        return ranked[..., :k], all_indices.gather(-1, order)[..., :k]

    return Ranking(
        *best(ranking.helpful_scores, ranking.helpful_indices, descending=True),
        *best(ranking.harmful_scores, ranking.harmful_indices, descending=False),
    )


SORTED_WHOLE = 4
"""Rows of up to this many times k scores are sorted as they are; of longer ones the k best are picked out first."""


def _first_best(scores: Tensor, indices: Tensor, k: int, descending: bool) -> tuple[Tensor, Tensor]:
    """The k best of each row in order of arrival: all that beat the k-th best, and the first of those that equal it."""
    last = scores.topk(k, dim=-1, largest=descending, sorted=True).values[..., -1:]
    better, equal = (scores > last) if descending else (scores < last), scores == last
    room = k - better.sum(-1, keepdim=True)
    kept = better | (equal & (equal.cumsum(-1) <= room))
    shape = (*scores.shape[:-1], k)
    return scores[kept].reshape(shape), indices[kept].reshape(shape)
