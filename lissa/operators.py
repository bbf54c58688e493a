"""Products on all the data from products on batches, for solvers and estimates that need the whole of it.

Knows batches and products; knows nothing of what the matrix is.
"""

from collections.abc import Iterable, Sequence

from lissa import checks, sampling, tree
from lissa.types import Batch, BatchMatvec, Matvec, Params


def mean_matvec(matvec: BatchMatvec, batches: Iterable[Batch], *, weights: Sequence[float] | None = None) -> Matvec:
    """`v -> sum_b w_b H_b v / sum_b w_b`: the product on all the data, from batches that hold each example once.

    A shorter last batch must count for less. Each batch therefore weighs as many examples as it has: the first
    dimension that its tensors share. If no batch has such a dimension, all weigh the same.

    Args:
        matvec: `matvec(batch, v) -> H_batch v`, the mean over the batch.
        batches: The batches; they are kept, and read again for each product.
        weights: The number of examples of each batch, where it cannot be read off its tensors.

    Returns:
        `full(v) -> H v`. It holds one product at a time. Cost: one pass over the batches.

    Raises:
        ValueError: If there is no batch, the weights are not one positive number each, or some batches have a number
            of examples that can be read off and others do not.

    Example:
        >>> import torch
        >>> def matvec(batch, v):
        ...     return {"x": batch.mean() * v["x"]}
        >>> full = mean_matvec(matvec, torch.tensor([1.0, 2.0, 6.0]).split(2))
        >>> full({"x": torch.tensor(1.0)})
        {'x': tensor(3.)}
    """
    batches = list(batches)
    if not batches:
        raise ValueError("`mean_matvec(batches=...)` must hold at least one batch, got none.")
    sizes = _sizes(batches) if weights is None else list(weights)
    if len(sizes) != len(batches):
        raise ValueError(
            f"`mean_matvec(weights=...)` must hold one number a batch, got {len(sizes)} for {len(batches)} batches."
        )
    for size in sizes:
        checks.positive("mean_matvec", "weights", size)
    total = sum(sizes)

    def full(v: Params) -> Params:
        product = tree.scale(sizes[0] / total, matvec(batches[0], v))
        for size, batch in zip(sizes[1:], batches[1:], strict=True):
            product = tree.add_scaled(product, size / total, matvec(batch, v))
        return product

    return full


def damped(matvec: Matvec, damping: float) -> Matvec:
    """`v -> (H + damping I) v`."""
    return lambda v: tree.add_scaled(matvec(v), damping, v)


def _sizes(batches: list[Batch]) -> list[int]:
    sizes = [_size(batch) for batch in batches]
    known = [size for size in sizes if size is not None]
    if not known:
        return [1] * len(sizes)
    if len(known) < len(sizes):
        raise ValueError(
            "`mean_matvec(batches=...)` holds batches whose number of examples cannot be read off their tensors. "
            "Pass it as weights=."
        )
    return known


def _size(batch: Batch) -> int | None:
    try:
        return sampling.batch_length("mean_matvec", batch)
    except ValueError:
        return None
