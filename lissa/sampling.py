"""Streams of batches from an explicit `torch.Generator`: the same seed gives the same batches, on every machine.

Knows indices and stacked tensors; knows nothing of models, files or DataLoaders. No global random state is read.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lissa import checks, host
from lissa.types import Batch


def index_stream(
    n: int, batch_size: int, *, generator: torch.Generator, replacement: bool = False, drop_last: bool = False
) -> Iterator[Tensor]:
    """`I_1, I_2, ...`: an endless stream of batches of indices below `n`.

    Without replacement it runs through shuffled passes: each pass holds every index once, and its last batch may be
    shorter (LiSSA then gives its examples more weight; `drop_last=True` leaves that batch out). With replacement all
    batches are independent and full.

    Args:
        n: Number of examples.
        batch_size: Indices a batch.
        generator: Where the order comes from; it advances as the stream is read.
        replacement: Whether to draw with replacement.
        drop_last: Whether to leave out the shorter last batch of a pass.

    Returns:
        An endless iterator of integer tensors of shape `(batch_size,)` or, at the end of a pass, shorter.

    Raises:
        ValueError: If `n` or `batch_size` is < 1, or `drop_last` leaves nothing of a pass.

    Example:
        >>> stream = index_stream(5, 2, generator=torch.Generator().manual_seed(0))
        >>> sorted(torch.cat([next(stream) for _ in range(3)]).tolist())
        [0, 1, 2, 3, 4]
    """
    checks.count("index_stream", "n", n)
    checks.count("index_stream", "batch_size", batch_size)
    checks.generator("index_stream", generator)
    if drop_last and not replacement and batch_size > n:
        raise ValueError(
            f"`index_stream(drop_last=True)` needs batch_size <= n, got batch_size={batch_size} and n={n}."
        )

    def passes() -> Iterator[Tensor]:
        stop = n - n % batch_size if drop_last else n
        while True:
            yield from host.randperm(n, generator)[:stop].split(batch_size)

    def draws() -> Iterator[Tensor]:
        while True:
            yield host.randint(n, batch_size, generator)

    return draws() if replacement else passes()


def batch_stream(
    data: Any, batch_size: int, *, generator: torch.Generator, replacement: bool = False, drop_last: bool = False
) -> Iterator[Batch]:
    """`data[I_1], data[I_2], ...`: an endless stream of batches of stacked data. See `index_stream`.

    Args:
        data: A tensor, or tuples, lists and dicts of tensors, that share their first dimension: one row an example.
        batch_size: Examples a batch.
        generator: Where the order comes from; it advances as the stream is read.
        replacement: Whether to draw with replacement.
        drop_last: Whether to leave out the shorter last batch of a pass.

    Returns:
        An endless iterator of batches with the structure of `data`.

    Raises:
        ValueError: If the tensors of `data` do not share their first dimension, or it is 0.

    Example:
        >>> x, y = torch.eye(4), torch.arange(4)
        >>> inputs, labels = next(batch_stream((x, y), 3, generator=torch.Generator().manual_seed(0)))
        >>> inputs.shape, labels.shape
        (torch.Size([3, 4]), torch.Size([3]))
    """
    n = batch_length("batch_stream", data, "data")
    indices = index_stream(n, batch_size, generator=generator, replacement=replacement, drop_last=drop_last)
    return (take(data, index) for index in indices)


def take(data: Any, index: Any) -> Batch:
    """`data[index]`: the rows `index` (integers or a slice) of each tensor in `data`."""
    on: dict[torch.device, Tensor] = {}

    def rows(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if not isinstance(index, Tensor):
            return leaf[index]
        if leaf.device not in on:
            on[leaf.device] = host.to_device(index, leaf.device)
        return leaf[on[leaf.device]]

    return pytree.tree_map(rows, data)


def batch_length(call: str, data: Any, name: str = "batch") -> int:
    """The first dimension that all tensors of `data` share, an error if there is none."""
    tensors = [leaf for leaf in pytree.tree_leaves(data) if isinstance(leaf, Tensor)]
    lengths = sorted({leaf.shape[0] if leaf.ndim else 0 for leaf in tensors})
    if len(lengths) != 1 or lengths[0] < 1:
        raise ValueError(
            f"`{call}({name}=...)` must hold tensors that share a first dimension >= 1, got first dimensions {lengths}."
        )
    return lengths[0]
