"""The shapes of data that the bridge takes, and how instances become a batch.

An instance is an AllenNLP-like `Instance` (known by its methods; AllenNLP itself is never imported), a mapping of
tensors and numbers, or an `(x, y)` pair. Knows nothing of models, losses or influence.
"""

import itertools
import math
import random
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import default_collate

from bridge import fields, progress
from lissa import Batch, checks
from lissa.host import to_device as tensor_to_device

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

CollateFn = Callable[[list[Any]], Batch]
"""`collate_fn(instances) -> batch`, as `torch.utils.data.DataLoader` takes it."""


@runtime_checkable
class Instance(Protocol):
    """What is used of AllenNLP's `Instance`; its fields have `batch_tensors(list)`."""

    fields: Any

    def index_fields(self, vocab: Any) -> None:
        """Turns words into numbers; done once for each instance."""
        ...

    def get_padding_lengths(self) -> dict[str, dict[str, int]]:
        """`{field: {padding key: length}}`."""
        ...

    def as_tensor_dict(self, padding_lengths: dict[str, dict[str, int]]) -> dict[str, Any]:
        """`{field: tensors padded to these lengths}`."""
        ...


class DatasetReader(Protocol):
    """What is used of AllenNLP's `DatasetReader`."""

    def read(self, file_path: Any) -> Iterable[Any]:
        """The instances in the file."""
        ...


class DataLoader(Protocol):
    """What is used of AllenNLP's `DataLoader`: its batch size and order have no effect on influence."""

    def iter_instances(self) -> Iterator[Any]:
        """The instances in order."""
        ...

    def index_with(self, vocab: Any) -> None:
        """Sets the vocabulary."""
        ...

    def set_target_device(self, device: torch.device) -> None:
        """Sets where batches go."""
        ...


class LazyLoader(Protocol):
    """A `Lazy`, ours or AllenNLP's, that constructs a data loader."""

    def construct(self, **kwargs: Any) -> Any:
        """The loader, given `reader`, `data_path` and `batch_size`."""
        ...


class Lazy(Generic[T_co]):
    """`construct(**kwargs) = constructor(**constructor_extras, **kwargs)`: a call that waits for its last arguments.

    Args:
        constructor: What to call.
        constructor_extras: Arguments known now; those given to `construct` win.

    Example:
        >>> Lazy(dict, {"a": 1, "b": 2}).construct(b=3)
        {'a': 1, 'b': 3}
    """

    def __init__(self, constructor: Callable[..., T_co], constructor_extras: Mapping[str, Any] | None = None):
        self.constructor = constructor
        self.constructor_extras = dict(constructor_extras or {})

    def construct(self, **kwargs: Any) -> T_co:
        """Calls the constructor."""
        return self.constructor(**{**self.constructor_extras, **kwargs})


class SimpleDataLoader:
    """Batches of consecutive instances; the last may be shorter. AllenNLP's loader of that name, for any instance.

    Args:
        instances: The instances; the sequence itself is never reordered.
        batch_size: Instances a batch.
        shuffle: Whether each pass runs in a new order, by Python's global `random.shuffle`, as AllenNLP does: the
            order after `random.seed(s)` is the same there and here.
        batches_per_epoch: If given, iterating yields so many batches and continues the pass the last time stopped in.
        vocab: Indexes AllenNLP-like instances.
        collate_fn: Makes a batch of a list of instances; the default is `collate`.

    Raises:
        ValueError: If `batch_size` or `batches_per_epoch` is too small, or there is no instance.

    Example:
        >>> loader = SimpleDataLoader([(torch.ones(2), 0), (torch.ones(2), 1), (torch.ones(2), 0)], 2)
        >>> [y.tolist() for x, y in loader]
        [[0, 1], [0]]
    """

    def __init__(
        self,
        instances: Sequence[Any],
        batch_size: int,
        *,
        shuffle: bool = False,
        batches_per_epoch: int | None = None,
        vocab: Any = None,
        collate_fn: CollateFn | None = None,
    ):
        checks.count("SimpleDataLoader", "batch_size", batch_size)
        if batches_per_epoch is not None:
            checks.count("SimpleDataLoader", "batches_per_epoch", batches_per_epoch, at_least=0)
        self.instances = instances
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.batches_per_epoch = batches_per_epoch
        self.vocab = vocab
        self.collate_fn = collate_fn
        self.device: torch.device | None = None
        self._order = list(range(len(instances)))
        self._endless: Iterator[Batch] | None = None

    @classmethod
    def from_dataset_reader(
        cls,
        reader: DatasetReader,
        data_path: Any,
        batch_size: int,
        shuffle: bool = False,
        batches_per_epoch: int | None = None,
        quiet: bool = False,
    ) -> "SimpleDataLoader":
        """The loader of all instances that `reader.read(data_path)` yields.

        What is read is kept as it is if it is a sequence, so a dataset that loads examples when asked stays lazy.

        Args:
            reader: Has `read`.
            data_path: What to read.
            batch_size: Instances a batch.
            shuffle: See the class.
            batches_per_epoch: See the class.
            quiet: Whether to show no progress.

        Returns:
            The loader.
        """
        read: Any = reader.read(data_path)
        instances = (
            read if is_sequence(read) else list(progress.bar(read, description="loading instances", show=not quiet))
        )
        return cls(instances, batch_size, shuffle=shuffle, batches_per_epoch=batches_per_epoch)

    def __len__(self) -> int:
        """Batches that one iteration yields."""
        if self.batches_per_epoch is not None:
            return self.batches_per_epoch
        return math.ceil(len(self.instances) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Yields one pass, or the next `batches_per_epoch` batches of endless passes."""
        if self.batches_per_epoch is None:
            return self._one_pass()
        if not self._order:
            raise ValueError("`SimpleDataLoader(instances=...)` must hold at least one instance, got none.")
        if self._endless is None:
            self._endless = itertools.chain.from_iterable(self._one_pass() for _ in itertools.count())
        return itertools.islice(self._endless, self.batches_per_epoch)

    def iter_instances(self) -> Iterator[Any]:
        """The instances in their own order."""
        for i in range(len(self.instances)):
            yield self.instances[i]

    def index_with(self, vocab: Any) -> None:
        """Sets the vocabulary; instances are indexed when they are collated."""
        self.vocab = vocab

    def set_target_device(self, device: torch.device) -> None:
        """Sets where the tensors of a batch go."""
        self.device = device

    def _one_pass(self) -> Iterator[Batch]:
        if self.shuffle:
            random.shuffle(self._order)
        for start in range(0, len(self._order), self.batch_size):
            chosen = [self.instances[i] for i in self._order[start : start + self.batch_size]]
            batch = collate(chosen, vocab=self.vocab, collate_fn=self.collate_fn)
            yield batch if self.device is None else to_device(batch, self.device)


def check_dataset(call: str, name: str, dataset: Any) -> None:
    """`dataset` must be a dataset, or an iterable, of instances; not one instance, a path or a table of columns."""
    wrong = isinstance(dataset, (str, bytes, Mapping, Tensor, Instance))
    if wrong or not (is_sequence(dataset) or isinstance(dataset, Iterable)):
        raise TypeError(
            f"`{call}({name}=...)` must be a dataset or an iterable of instances, (x, y) pairs or mappings, "
            f"got {type(dataset).__name__}."
        )


def is_sequence(instances: Any) -> bool:
    """Whether `instances` can be indexed and counted, as a list or a map-style `torch.utils.data.Dataset` can."""
    return hasattr(instances, "__len__") and hasattr(instances, "__getitem__") and not isinstance(instances, Mapping)


def collate(instances: list[Any], *, vocab: Any = None, collate_fn: CollateFn | None = None) -> Batch:
    """One batch of the instances, for `model(**batch)` or, if they are pairs, `(x, y)`.

    AllenNLP-like instances are padded to the longest of the batch, for each field and padding key; mappings and pairs
    are stacked by `torch.utils.data.default_collate`.

    Args:
        instances: One or more instances of one kind.
        vocab: Indexes AllenNLP-like instances.
        collate_fn: Used instead of all this, if given.

    Returns:
        A dict, or whatever `default_collate` or `collate_fn` makes of pairs.

    Raises:
        ValueError: If the instances do not have the same fields.

    Example:
        >>> collate([{"x": torch.tensor([1.0]), "label": 0}, {"x": torch.tensor([2.0]), "label": 1}])
        {'x': tensor([[1.],
                [2.]]), 'label': tensor([0, 1])}
    """
    if isinstance(instances[0], Instance) and vocab is not None:
        for instance in instances:
            instance.index_fields(vocab)
    if collate_fn is not None:
        batch = collate_fn(instances)
    elif isinstance(instances[0], Instance):
        batch = _padded(instances)
    else:
        batch = default_collate(instances)
    return dict(batch) if isinstance(batch, Mapping) else batch


def collate_alike(instances: Sequence[Instance]) -> dict[str, Any]:
    """`collate` of instances that are known to have the same fields and the same padding lengths."""
    return _stacked(instances, instances[0].get_padding_lengths())


def _padded(instances: Sequence[Instance]) -> dict[str, Any]:
    """AllenNLP's `Batch(instances).as_tensor_dict()`."""
    kind, longest = _kind(instances[0]), dict[str, dict[str, int]]()
    for instance in instances:
        if _kind(instance) != kind:
            kinds = [{name: field.__name__ for name, field in one} for one in (kind, _kind(instance))]
            raise ValueError(f"Instances of one batch must have the same fields, got {kinds[0]} and {kinds[1]}.")
    for lengths in [instance.get_padding_lengths() for instance in instances]:
        for field, by_key in lengths.items():
            known = longest.setdefault(field, {})
            for key, length in by_key.items():
                known[key] = max(known.get(key, 0), length)
    return _stacked(instances, longest)


def _kind(instance: Instance) -> list[tuple[str, type]]:
    return [*zip(instance.fields, map(type, instance.fields.values()), strict=True)]


def _stacked(instances: Sequence[Instance], longest: dict[str, dict[str, int]]) -> dict[str, Any]:
    """The fields of each name, padded to these lengths, as a batch."""
    if type(instances[0]).as_tensor_dict.__module__ != "allennlp.data.instance":  # it may have a way of its own
        rows = [instance.as_tensor_dict(longest) for instance in instances]
        return {name: instances[0].fields[name].batch_tensors([row[name] for row in rows]) for name in rows[0]}
    columns = {name: [instance.fields[name] for instance in instances] for name in instances[0].fields}
    return {name: column[0].batch_tensors(fields.tensors(column, longest[name])) for name, column in columns.items()}


def to_device(batch: Batch, device: torch.device) -> Batch:
    """`batch` with its tensors on `device`; the batch itself is not changed."""
    return pytree.tree_map(lambda leaf: tensor_to_device(leaf, device) if isinstance(leaf, Tensor) else leaf, batch)


def stacked_alike(batches: Iterable[tuple[int, Batch]], size: int) -> Iterator[tuple[list[int], Batch]]:
    """Groups batches of the same shapes and stacks them: tensors `(*shape)` become `(B, *shape)`, `B <= size`.

    Nothing is padded, so each row is the batch it was. See `grouped`.

    Args:
        batches: Each with its number.
        size: Largest group.

    Yields:
        The numbers of the batches in the group, and the stack.

    Example:
        >>> batches = enumerate([torch.zeros(1, 2), torch.ones(1, 3), torch.ones(1, 2)])
        >>> [(numbers, tuple(stack.shape)) for numbers, stack in stacked_alike(batches, 2)]
        [([0, 2], (2, 1, 2)), ([1], (1, 1, 3))]
    """
    for group in grouped(((_shapes(batch), (number, batch)) for number, batch in batches), size):
        yield _stack(group)


def grouped(items: Iterable[tuple[Hashable, T]], size: int) -> Iterator[list[T]]:
    """Items of the same key, in lists of at most `size`.

    Groups wait until they are full; if items of many different keys wait, all groups are given out, so memory stays
    bounded.

    Args:
        items: Each after its key.
        size: Largest group.

    Example:
        >>> list(grouped([("a", 1), ("b", 2), ("a", 3), ("a", 4)], 2))
        [[1, 3], [2], [4]]
    """
    groups: dict[Hashable, list[T]] = {}
    waiting, most_waiting = 0, _MOST_WAITING * size
    for key, item in items:
        group = groups.setdefault(key, [])
        group.append(item)
        waiting += 1
        if len(group) == size or waiting >= most_waiting:
            for done in [key] if len(group) == size else list(groups):
                waiting -= len(groups[done])
                yield groups.pop(done)
    yield from groups.values()


_MOST_WAITING = 8


def _shapes(batch: Batch) -> Hashable:
    """What two batches must share to be stacked. Leaves that are not tensors must be the same plain value."""
    leaves, structure = pytree.tree_flatten(batch)
    shapes = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            shapes.append((tuple(leaf.shape), leaf.dtype))
        elif leaf is None or isinstance(leaf, (bool, int, float, str)):
            shapes.append((type(leaf), leaf))
        else:
            shapes.append(object())
    return str(structure), tuple(shapes)


def _stack(group: list[tuple[int, Batch]]) -> tuple[list[int], Batch]:
    numbers, batches = zip(*group, strict=True)
    leaves = [pytree.tree_leaves(batch) for batch in batches]
    structure = pytree.tree_structure(batches[0])
    columns = zip(*leaves, strict=True)
    stacks = [torch.stack(column) if isinstance(column[0], Tensor) else column[0] for column in columns]
    return list(numbers), pytree.tree_unflatten(stacks, structure)
