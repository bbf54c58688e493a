"""Streaming top-k at both ends: the most helpful and the most harmful examples, without an `(n, K)` matrix.

Knows scores and indices; knows nothing of where they come from.
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from lissa import checks, host

ENDS = ("helpful", "harmful")


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


def ranking_update(
    ranking: Ranking, scores: Tensor, indices: Tensor, *, k: int, ends: Collection[str] = ENDS
) -> Ranking:
    """The k largest and k smallest of those ranked so far and `scores`.

    The result does not depend on how the examples are cut into batches: equal scores are ranked in order of arrival.

    Args:
        ranking: What is known so far; it is not changed.
        scores: New scores, shape `(*K, B)`, without NaN.
        indices: Which examples they belong to, shape `(B,)`.
        k: How many to keep at each end; fewer are kept while fewer were seen.
        ends: Which of `"helpful"` and `"harmful"` are of interest; the other end stays as it is.

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

    def best(end: str) -> dict[str, Tensor]:
        known = {what: getattr(ranking, f"{end}_{what}") for what in ("scores", "indices")}
        both = known["scores"], known["indices"], scores, indices
        ranked = _best(*both, k, descending=end == "helpful") if end in ends else known.values()
        return {f"{end}_{what}": t for what, t in zip(known, ranked, strict=True)}

    return Ranking(**best("helpful"), **best("harmful"))


SORTED_WHOLE = 4
"""Rows of up to this many times k scores are sorted as they are; of longer ones the k best are picked out first."""


def _best(
    old_scores: Tensor, old_indices: Tensor, scores: Tensor, indices: Tensor, k: int, *, descending: bool
) -> tuple[Tensor, Tensor]:
    """The k best of both, sorted, equal ones in order of arrival."""
    if old_scores.shape[-1]:
        scores, indices = torch.cat([old_scores, scores], -1), torch.cat([old_indices, indices], -1)
    if scores.shape[-1] > SORTED_WHOLE * k > 0:
        top, order = scores.topk(k + 1, dim=-1, largest=descending, sorted=True)
        if not host.any_true(top[..., 1:] == top[..., :-1]):  # no ties, among them or with what follows
            return top[..., :k], indices.gather(-1, order[..., :k])
        scores, indices = _first_best(scores, indices, k, descending)
    ranked, order = scores.sort(dim=-1, descending=descending, stable=True)
    return ranked[..., :k], indices.gather(-1, order)[..., :k]


def _first_best(scores: Tensor, indices: Tensor, k: int, descending: bool) -> tuple[Tensor, Tensor]:
    """The k best of each row in order of arrival: all that beat the k-th best, and the first of those that equal it."""
    last = scores.topk(k, dim=-1, largest=descending, sorted=True).values[..., -1:]
    better, equal = (scores > last) if descending else (scores < last), scores == last
    room = k - better.sum(-1, keepdim=True)
    kept = better | (equal & (equal.cumsum(-1) <= room))
    shape = (*scores.shape[:-1], k)
    return scores[kept].reshape(shape), indices[kept].reshape(shape)
