"""The loss of each row of a batch, from a model that reports their mean.

Watches torch's losses while the model runs: if what the model returns is the mean that one of them took, the terms of
that mean are the losses of the rows. Knows torch's loss functions; knows nothing of instances or parameters.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lissa import Batch, Params
from lissa.types import LossFn

MEANS = (
    F.cross_entropy,
    F.nll_loss,
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.soft_margin_loss,
    F.multilabel_soft_margin_loss,
)
"""Losses whose mean over the batch is the mean of what they give each row."""


class NoRowLossesError(TypeError):
    """The model's loss is not the mean of one of torch's losses over the rows of the batch."""


def row_losses(loss_fn: LossFn, params: Params, batch: Batch, count: int) -> Tensor:
    """The losses of the `count` rows of a batch, shape `(count,)`, whose mean is `loss_fn(params, batch)`.

    Args:
        loss_fn: `loss_fn(params, batch) -> ()`. Not inside a `torch.func` transform.
        params: Its parameters.
        batch: One batch.
        count: How many rows there are.

    Raises:
        NoRowLossesError: If the loss is no such mean.

    Example:
        >>> import torch
        >>> def loss_fn(params, batch):
        ...     return F.mse_loss(params["w"] * batch, torch.ones(2))
        >>> row_losses(loss_fn, {"w": torch.tensor(2.0)}, torch.tensor([1.0, 2.0]), 2)
        tensor([1., 9.])
    """
    with _Unreduced() as seen:
        loss = loss_fn(params, batch)
    for rows, mean in seen.means:
        same_number = mean.data_ptr() == loss.data_ptr() and mean._version == loss._version == 0
        if same_number and rows.shape == (count,):
            return rows
    raise NoRowLossesError(
        f"The loss is not the mean of one of torch's losses over the {count} rows of the batch, so those of single "
        "rows are not known."
    )


class _Unreduced(TorchFunctionMode):
    """Takes each mean of losses itself, and keeps its terms, averaged within a row."""

    def __init__(self) -> None:
        super().__init__()
        self.means: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in MEANS:
            return func(*args, **kwargs)
        given = _signature(func).bind(*args, **kwargs)
        given.apply_defaults()
        if not _is_plain_mean(given.arguments):
            return func(*args, **kwargs)
        terms = func(**{**given.arguments, "reduction": "none"})
        if terms.ndim == 0:
            return terms
        rows = terms.flatten(1).mean(1) if terms.ndim > 1 else terms
        mean = rows.mean()
        self.means.append((rows, mean))
        return mean


_signature = functools.cache(inspect.signature)


def _is_plain_mean(given: dict[str, Any]) -> bool:
    """Whether the loss is averaged with equal weights: no class weights, and no target that is left out."""
    if given["reduction"] != "mean" or given.get("size_average") is not None or given.get("reduce") is not None:
        return False
    if given.get("weight") is not None:
        return False
    target, ignored = given["target"], given.get("ignore_index")
    return ignored is None or target.is_floating_point() or not bool((target == ignored).any())
