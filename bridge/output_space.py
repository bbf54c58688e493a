"""A loss as a function of a model's outputs: what the Gauss-Newton matrix is made of.

Knows what models return and losses take; knows nothing of parameters. A cross-entropy of m logits does not change if a
number is added to all of them, so its outputs are the m - 1 differences from the first: a quarter of the work if m = 2.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lissa import Batch

OutputLoss = Callable[[Any, Any], Tensor]
"""`loss_fn(model(x), y) -> ()`, the mean loss of the pairs in a batch."""

LABELS = ("labels", "label")
"""Where a mapping has its classes."""


def output(call: Callable[..., Any], batch: Batch, output_loss: OutputLoss | None) -> Tensor:
    """`(B, m)`: what the loss of the batch is a function of.

    Args:
        call: The model: `call(args)` or `call(args, kwargs)`.
        batch: An `(x, y)` pair, with `output_loss`; or a mapping, whose outputs are the model's `logits`.
        output_loss: For pairs.

    Returns:
        A row for each example.

    Raises:
        TypeError: If the model returns something else.
    """
    if isinstance(batch, Mapping):
        found = call((), dict(batch))
        found = found.get("logits") if isinstance(found, Mapping) else getattr(found, "logits", None)
        where = "a mapping or object with `logits`"
    else:
        x = batch[0]
        found = call((), dict(x)) if isinstance(x, Mapping) else call((x,))
        where = "a tensor"
    if isinstance(found, Tensor) and found.ndim == 1:
        found = found.unsqueeze(1)
    if not isinstance(found, Tensor) or found.ndim != 2:
        got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise TypeError(f"The Gauss-Newton matrix needs a model that returns {where} of shape (B, m), got {got}.")
    return found[:, 1:] - found[:, :1] if _of_differences(batch, output_loss) and found.shape[1] > 1 else found


def loss(z: Tensor, batch: Batch, output_loss: OutputLoss | None) -> Tensor:
    """The mean loss of the outputs `z`: `output_loss`, or for a mapping the cross-entropy with its labels."""
    if _of_differences(batch, output_loss):
        z = torch.cat([torch.zeros_like(z[:, :1]), z], 1)
    if isinstance(batch, Mapping):
        key = next((key for key in LABELS if key in batch), None)
        if key is None:
            raise TypeError(f"The Gauss-Newton matrix needs a batch with one of {list(LABELS)}, got {sorted(batch)}.")
        return F.cross_entropy(z, batch[key].reshape(-1))
    if output_loss is None:
        raise TypeError("`loss_fn` is needed where instances are (x, y) pairs.")
    y = batch[1]
    return output_loss(z.reshape(y.shape) if isinstance(y, Tensor) and y.shape[1:].numel() == z.shape[1] else z, y)


def _of_differences(batch: Batch, output_loss: OutputLoss | None) -> bool:
    """Whether the loss is a cross-entropy of logits, as far as one can see."""
    return isinstance(batch, Mapping) or output_loss is F.cross_entropy or isinstance(output_loss, nn.CrossEntropyLoss)
