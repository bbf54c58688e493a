"""Rows some at a time, so few that what is made of them stays in a cache.

Knows what types of device hold; knows nothing of what rows are.
"""

from collections.abc import Iterator, Mapping

from torch import Tensor

NUMBERS_AT_ONCE = {"cpu": 2**18, "cuda": 2**22}
"""Most numbers of rows at a time, by type of device, others are taken for the last. A GPU is quick to pass over more,
and slow to begin."""


def row_parts(width: int, *of_rows: Tensor, most: Mapping[str, int] = NUMBERS_AT_ONCE) -> Iterator[tuple[Tensor, ...]]:
    """Of tensors with N rows each, views of some rows at a time: as many as make up `most` numbers, at least one.

    Args:
        width: How many numbers are made of a row.
        of_rows: The tensors.
        most: By type of device.

    Example:
        >>> import torch
        >>> [len(x) for (x,) in row_parts(2**17, torch.ones(5, 1))]
        [2, 2, 1]
    """
    size = max(1, most.get(of_rows[0].device.type, most["cuda"]) // width)
    return zip(*(t.split(size) for t in of_rows), strict=True)
