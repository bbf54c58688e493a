"""Scores of all training instances, reduced as they come: to the top k, or to all columns of a matrix.

Knows scores, blocks of instances, and how parts of a result join; knows nothing of models, or of how scores are found.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from bridge.checkpoint import Record
from bridge.distributed import Ranks
from lissa import Ranking, ranking_init, ranking_update
from lissa.ranking import ENDS

Reduced = dict[str, Any]
"""What a reduction has made of the scores so far: tensors, or lists of them, by name; empty at first."""

Scores = Iterable[tuple[Sequence[int], Tensor]]
"""Indices of some instances and their scores for K right-hand sides, shape `(K, B)`."""

BLOCK = 16
"""Stacks of instances that are scored between two looks at whether a state is to be written."""


class Reduction(Protocol):
    """How scores become a result. Parts are joined in any order."""

    def fold(self, so_far: Reduced, indices: Sequence[int], scores: Tensor) -> Reduced:
        """With the scores `(K, B)` of some more instances."""
        ...

    def join(self, parts: list[Reduced]) -> Reduced:
        """One of several that are of different instances."""
        ...


class TopK(NamedTuple):
    """The k largest and the k smallest scores, or those of one end; equal ones in order of index.

    Example:
        >>> top = TopK(1)
        >>> parts = [top.fold({}, [i], torch.tensor([[score]])) for i, score in enumerate([1.0, 5.0, 3.0])]
        >>> top.join(parts)["helpful_indices"]
        tensor([[1]])
    """

    k: int
    ends: Sequence[str] = ENDS

    def fold(self, so_far: Reduced, indices: Sequence[int], scores: Tensor) -> Reduced:
        """See `Reduction`; the indices of successive calls rise."""
        ranking = Ranking(**so_far) if so_far else ranking_init(scores, self.k)
        indices_of = torch.tensor(indices, device=scores.device)
        return ranking_update(ranking, scores, indices_of, k=self.k, ends=self.ends)._asdict()

    def join(self, parts: list[Reduced]) -> Reduced:
        """See `Reduction`."""
        parts = [part for part in parts if part]
        if len(parts) < 2:
            return parts[0] if parts else {}
        ends = [self._best(parts, end, descending=end == "helpful") for end in ENDS]
        return {name: t for end in ends for name, t in end.items()}

    def _best(self, parts: list[Reduced], end: str, *, descending: bool) -> Reduced:
        device = parts[0][f"{end}_scores"].device
        scores, indices = (
            torch.cat([part[f"{end}_{what}"].to(device) for part in parts], -1) for what in ("scores", "indices")
        )
        order = indices.argsort(dim=-1)
        scores, indices = scores.gather(-1, order), indices.gather(-1, order)
        order = scores.argsort(dim=-1, descending=descending, stable=True)[..., : self.k]
        return {f"{end}_scores": scores.gather(-1, order), f"{end}_indices": indices.gather(-1, order)}


class Columns(NamedTuple):
    """All scores, as columns in no particular order; see `matrix`."""

    def fold(self, so_far: Reduced, indices: Sequence[int], scores: Tensor) -> Reduced:
        """See `Reduction`."""
        return self.join([so_far, {"indices": [torch.tensor(indices)], "scores": [scores.cpu()]}])

    def join(self, parts: list[Reduced]) -> Reduced:
        """See `Reduction`."""
        known: Reduced = parts[0] or {"indices": [], "scores": []}
        for part in parts[1:]:
            for name, tensors in part.items():
                known[name] += tensors
        return known

    @staticmethod
    def matrix(columns: Reduced, K: int, n: int) -> Tensor:
        """All scores of K right-hand sides for n instances, shape `(K, n)`, on the CPU."""
        found = torch.zeros(K, n, dtype=columns["scores"][0].dtype if columns["scores"] else None)
        for indices, scores in zip(columns["indices"], columns["scores"], strict=True):
            found[:, indices] = scores.cpu()
        return found


@dataclass
class Written:
    """All scores, written into the rows of a matrix from `start` on; nothing else is kept."""

    rows: Tensor
    start: int = 0

    def fold(self, so_far: Reduced, indices: Sequence[int], scores: Tensor) -> Reduced:
        """See `Reduction`."""
        block = self.rows[self.start : self.start + len(scores)]
        block[:, torch.tensor(indices)] = scores.cpu().to(block.dtype)
        return so_far

    def join(self, parts: list[Reduced]) -> Reduced:
        """See `Reduction`."""
        return {}


def reduced(
    scored: Callable[[range], Scores], share: range, *, block: int, reduction: Reduction, ranks: Ranks, record: Record
) -> Reduced:
    """The reduction of the scores of all instances, each rank scoring its share.

    Where a record is kept, they are scored in blocks, and what is known of those done is kept in between. Each block is
    scored by itself, so that it does not matter where an earlier run stopped.

    Args:
        scored: `scored(block)` yields the scores of the instances in a block.
        share: Those of this rank.
        block: Instances in a block.
        reduction: What becomes of the scores.
        ranks: The processes that share the work.
        record: Of this reduction alone.
    """
    before: dict[str, Any] = record.get("scored") or {"done": [], "reduced": {}}
    kept = ranks.agreed(record.kept)
    todo = list(_blocks(share, before["done"], block if kept else len(share)))
    mine: Reduced = {}
    for turn in range(ranks.most(len(todo)) if kept else len(todo)):
        if turn < len(todo):
            for indices, scores in _in_order(scored(todo[turn])) if kept else scored(todo[turn]):
                mine = reduction.fold(mine, indices, scores)
        if kept and ranks.agreed(record.due()):
            done = [[part.start, part.stop] for part in todo[: turn + 1]]
            parts = ranks.gathered((done, mine))
            if ranks.first:
                record.put(
                    "scored",
                    {
                        "done": _joined([*before["done"], *(pair for done, _ in parts for pair in done)]),
                        "reduced": reduction.join([before["reduced"], *(part for _, part in parts)]),
                    },
                )
    return reduction.join([before["reduced"], *ranks.gathered(mine)])


def _in_order(scores: Scores) -> Scores:
    """All at once, in order of index, so that nothing depends on where one block ends and the next begins."""
    some, parts = zip(*scores, strict=True)
    indices = torch.tensor([i for part in some for i in part])
    order = indices.argsort()
    yield indices[order].tolist(), torch.cat(parts, -1)[:, order.to(parts[0].device)]


def _blocks(share: range, done: list[list[int]], size: int) -> Iterator[range]:
    """What of the share is not done, in blocks that begin where they would if nothing were done, or where it ends."""
    for start in range(share.start, share.stop, max(size, 1)):
        at, stop = start, min(start + size, share.stop)
        for first, last in sorted(done):
            if first < stop and last > at:
                if first > at:
                    yield range(at, first)
                at = min(last, stop)
        if at < stop:
            yield range(at, stop)


def _joined(pairs: list[list[int]]) -> list[list[int]]:
    """Ranges with those that touch made one.

    Example:
        >>> _joined([[4, 6], [0, 2], [2, 4], [8, 9]])
        [[0, 6], [8, 9]]
    """
    found: list[list[int]] = []
    for first, last in sorted(pairs):
        if found and found[-1][1] >= first:
            found[-1][1] = max(found[-1][1], last)
        else:
            found.append([first, last])
    return found
