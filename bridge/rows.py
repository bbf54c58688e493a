"""Instances as batches: collated once and for all where they are alike, in groups of equal shapes where they are not.

Knows instances and how they are collated; knows nothing of models or of what a batch is for.
"""

import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bridge.data import Instance, collate_alike, grouped, stacked_alike, to_device
from lissa import Batch, take

MOST_KEPT = 2**28
"""Bytes of instances that `gather` keeps in memory, unless told otherwise."""

LENGTHS_KEPT = 2**17
"""Instances whose length is measured once; some 10 MiB."""

CHUNK = 256
"""Instances collated together while all are gathered."""


Numbered: TypeAlias = tuple[int, Any]
"""An instance after its number; None in its place where the instance is held with others."""


class Rows(Sequence[Any]):
    """A sequence of instances that makes batches of itself.

    Args:
        instances: The instances; they are read when they are needed.
        collate: Makes a batch of a list of instances.
        device: Where batches go.
        vocab: Indexes AllenNLP-like instances.
        pads: Whether `collate` may treat an instance differently in company than alone although all have the same
            shapes, as a `collate_fn` of the user's may. Instances are then collated alone wherever they must be.
        most_bytes: `gather` keeps all instances as tensors only if they fit into this.

    Example:
        >>> rows = Rows([(torch.ones(2), 0), (torch.ones(2), 1)], torch.utils.data.default_collate, torch.device("cpu"))
        >>> rows.batch([1])[1], next(rows.examples(2))[1][1]
        (tensor([1]), tensor([[0],
                [1]]))
    """

    def __init__(
        self,
        instances: Sequence[Any],
        collate: Callable[[list[Any]], Batch],
        device: torch.device,
        *,
        vocab: Any = None,
        pads: bool = False,
        most_bytes: int = MOST_KEPT,
    ):
        self._instances = instances
        self._collate = collate
        self._device = device
        self._vocab = vocab
        self._pads = pads
        self.most_bytes = most_bytes
        self._gathered: Batch = None
        self._held = range(0)
        self._of_fields: dict[type, bool] = {}
        self._latest: tuple[Any, tuple[Any, ...]] = (None, ())
        self._lengths: dict[int, int] = {}
        self._collated: dict[tuple[int, ...], Batch] = {}
        self._collated_bytes = 0

    def __len__(self) -> int:
        return len(self._instances)

    def __getitem__(self, i: Any) -> Any:
        """The instance `i` itself."""
        return self._instances[i]

    def batch(self, indices: Iterable[int]) -> Batch:
        """One batch of the instances `indices`, on the device."""
        indices = list(indices)
        if self._holds(indices):
            return take(self._gathered, torch.as_tensor(indices) - self._held.start)
        return to_device(self._collate([self._instances[i] for i in indices]), self._device)

    @property
    def gathered(self) -> bool:
        """Whether instances are held as one batch: they then have the same shapes."""
        return self._gathered is not None

    def gather(self, share: range | None = None) -> None:
        """Collates all instances, or those of `share`, once, for those who will need them all, if that is possible."""
        if self._gathered is None and not self._pads:
            self._held = range(len(self)) if share is None else share
            self._gathered = self._all_together(self._held)

    @property
    def kept_bytes(self) -> int:
        """What `gather` and `together` keep in memory."""
        gathered = sum(leaf.nbytes for leaf in pytree.tree_leaves(self._gathered) if isinstance(leaf, Tensor))
        return gathered + self._collated_bytes

    def examples(self, size: int, chosen: Iterable[int] | None = None) -> Iterator[tuple[list[int], Batch]]:
        """Instances, each a batch of one, in stacks of at most `size`, with their indices.

        Args:
            size: The largest stack.
            chosen: The indices, each below `len(self)`; all if not given.

        Yields:
            Indices, and tensors of shape `(B, 1, ...)`: row `j` is the batch of the one instance `indices[j]`.
        """
        chosen = range(len(self)) if chosen is None else chosen
        if self._gathered is not None:
            chosen = list(chosen)
        if isinstance(chosen, list) and self._holds(chosen):
            for start in range(0, len(chosen), size):
                indices = chosen[start : start + size]
                yield indices, _as_batches_of_one(self.batch(indices))
        elif self._pads:
            yield from stacked_alike(((i, self.batch([i])) for i in chosen), size)
        else:
            for group in grouped(map(self._read, chosen), size):
                indices, instances = [list(column) for column in zip(*group, strict=True)]
                together = self._collated_alike(instances)
                if are_rows(together, len(indices)):
                    yield indices, _as_batches_of_one(together)
                else:
                    yield from stacked_alike(((i, self.batch([i])) for i in indices), size)

    def windows(self, most: int, chosen: Iterable[int]) -> Iterator[tuple[list[int], list[Numbered]]]:
        """The chosen instances in lists of at most `most`, each list from the shortest instance to the longest.

        Yields:
            Indices, and for each its instance too, for `together`.
        """
        chosen = iter(chosen)
        while some := list(itertools.islice(chosen, most)):
            if self._holds(some):
                yield some, [(i, None) for i in some]
                continue
            window = [(i, self._instances[i]) for i in some]
            window.sort(key=self._length)
            yield [i for i, _ in window], window

    def together(self, numbered: Sequence[Numbered]) -> Batch:
        """One batch of instances that `windows` gave, on the device.

        What is collated is kept, as residual and scores ask for the same batches, if all of it fits into `most_bytes`.
        """
        indices = [i for i, _ in numbered]
        if self._holds(indices):
            return self.batch(indices)
        known = self._collated.get(tuple(indices))
        if known is not None:
            return pytree.tree_map(torch.clone, known)  # a model may write to its batch
        batch = to_device(self._collate([instance for _, instance in numbered]), self._device)
        self._keep(indices, batch)
        return batch

    def _keep(self, indices: list[int], batch: Batch) -> None:
        """Keeps a copy, unless the batch is a user's function's, who may expect to be asked each time."""
        leaves = pytree.tree_leaves(batch)
        if self._pads or not all(isinstance(leaf, Tensor) for leaf in leaves):
            return
        size = sum(leaf.nbytes for leaf in leaves)
        of_all = size * len(self) / len(indices)  # of as many batches like this one
        if max(of_all, self._collated_bytes + size) <= self.most_bytes:
            self._collated[tuple(indices)] = pytree.tree_map(torch.clone, batch)
            self._collated_bytes += size

    def _holds(self, indices: list[int]) -> bool:
        """Whether these instances are among those gathered."""
        if self._gathered is None:
            return False
        if len(self._held) == len(self) or not indices:
            return True
        return min(indices) in self._held and max(indices) in self._held

    def _all_together(self, share: range) -> Batch:
        """These instances as one batch, or None if they differ in shape, are no tensors, or would be too large."""
        whole, structure, alike = [], None, None
        for start in range(share.start, share.stop, CHUNK):
            indices = range(start, min(start + CHUNK, share.stop))
            try:
                instances = [self._instances[i] for i in indices]
                alike = self._likeness(instances[0]) if alike is None else alike
                if any(self._likeness(instance) != alike for instance in instances):
                    return None
                batch = self._collated_alike(instances)
            except Exception:  # whoever needs the instance will hear of it, with its number
                return None
            leaves, found = pytree.tree_flatten(batch)
            if not are_rows(batch, len(indices)):
                return None
            if structure is None:
                structure = found
                if sum(leaf[0].nbytes for leaf in leaves) * len(share) > self.most_bytes:
                    return None
                whole = [leaf.new_empty((len(share), *leaf.shape[1:])) for leaf in leaves]
            if found != structure or any(
                a.shape[1:] != b.shape[1:] or a.dtype != b.dtype for a, b in zip(whole, leaves, strict=True)
            ):
                return None
            for rows, leaf in zip(whole, leaves, strict=True):
                rows[start - share.start : indices.stop - share.start] = leaf
        return pytree.tree_unflatten(whole, structure) if structure is not None else None

    def _read(self, i: int) -> tuple[Hashable, tuple[int, Any]]:
        """The instance with its number, after what groups it."""
        instance = self._instances[i]
        return self._likeness(instance), (i, instance)

    def _collated_alike(self, instances: list[Any]) -> Batch:
        """One batch of instances of the same likeness."""
        alike = self._of_fields.get(type(instances[0]))
        return to_device(collate_alike(instances) if alike else self._collate(instances), self._device)

    def _length(self, numbered: Numbered) -> int:
        """About how many numbers the instance has."""
        i, instance = numbered
        if i in self._lengths:
            return self._lengths[i]
        if self._is_of_fields(instance):
            length = sum(length for by_key in instance.get_padding_lengths().values() for length in by_key.values())
        else:
            length = sum(leaf.numel() if isinstance(leaf, Tensor) else 1 for leaf in pytree.tree_leaves(instance))
        if len(self._lengths) < LENGTHS_KEPT:
            self._lengths[i] = length
        return length

    def _is_of_fields(self, instance: Any) -> bool:
        """Whether it is like AllenNLP's; its fields are then indexed."""
        kind = type(instance)
        if kind not in self._of_fields:  # a protocol is slow to check
            self._of_fields[kind] = isinstance(instance, Instance)
        if self._of_fields[kind] and self._vocab is not None:
            instance.index_fields(self._vocab)
        return self._of_fields[kind]

    def _likeness(self, instance: Any) -> tuple[Any, ...]:
        if not self._is_of_fields(instance):
            return likeness_of_leaves(instance)
        fields = instance.fields
        found = [*fields], [*map(type, fields.values())], instance.get_padding_lengths()
        if found != self._latest[0]:  # most often an instance is like the one before
            self._latest = found, likeness_of_fields(*found)
        return self._latest[1]


def likeness_of_fields(
    names: Sequence[str], kinds: Sequence[type], lengths: dict[str, dict[str, int]]
) -> tuple[Any, ...]:
    """What indexed instances must share so that a batch of them holds each as it is alone, with nothing padded.

    Args:
        names: Of the fields.
        kinds: Their types.
        lengths: Their padding lengths, by name.
    """
    return tuple((name, kind, *sorted(lengths[name].items())) for name, kind in zip(names, kinds, strict=True))


def likeness_of_leaves(instance: Any) -> tuple[Any, ...]:
    """The same for mappings and pairs."""
    kind = type(instance)
    if kind in (tuple, dict) and all(type(x) in _LEAVES for x in (instance.values() if kind is dict else instance)):
        leaves, structure = (instance.values(), tuple(instance)) if kind is dict else (instance, kind)
    else:  # a dozen times as slow
        leaves, spec = pytree.tree_flatten(instance)
        structure = str(spec)
    return (structure, *((type(x), getattr(x, "shape", None), getattr(x, "dtype", None)) for x in leaves))


_LEAVES = frozenset([Tensor, bool, int, float])


def are_rows(batch: Batch, count: int) -> bool:
    """Whether a batch of `count` instances holds nothing but tensors with a row for each."""
    leaves = pytree.tree_leaves(batch)
    return bool(leaves) and all(isinstance(x, Tensor) and x.ndim > 0 and len(x) == count for x in leaves)


def _as_batches_of_one(batch: Batch) -> Batch:
    return pytree.tree_map(lambda leaf: leaf.unsqueeze(1), batch)
