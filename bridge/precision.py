"""Products in bfloat16 with sums in float32, and what they cost in precision.

Knows a model's loss as a function; knows nothing of what is multiplied, or why.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bridge import products
from bridge.functional import Functional
from bridge.session import Session
from lissa import Batch, Params, tree
from lissa.stacked import norms

MEASURED = 4
"""Vectors whose products are compared."""


def lowered(model: Functional) -> Functional:
    """The model with its matrix products and convolutions in bfloat16; parameters, sums and the loss stay as they are.

    Example:
        >>> from torch import nn
        >>> from bridge.functional import functional
        >>> model = functional(nn.Linear(1, 1, bias=False), ["weight"], output_loss=nn.functional.mse_loss)
        >>> params, batch = {"weight": torch.tensor([[1.001]])}, (torch.ones(1, 1), torch.zeros(1, 1))
        >>> lowered(model).loss_fn(params, batch)  # 1.001 is 1 in bfloat16
        tensor(1.)
    """

    def loss_fn(params: Params, batch: Batch) -> Tensor:
        with torch.autocast(model.device.type, dtype=torch.bfloat16):
            return model.loss_fn(params, batch).to(next(iter(params.values())).dtype)

    return model._replace(loss_fn=loss_fn)


def product_error(
    session: Session, low: Functional, train: Sequence[Any], indices: Sequence[int], vectors: Params
) -> float:
    """The largest `|H_low v - H v| / |H v|` of a few vectors on the batch of the instances `indices`."""
    some, batch = tree.map(lambda t: t[:MEASURED], vectors), session.batch(train, indices)
    with session.naming("training", train, indices):
        rounded, exact = (products.stacked_products(model)(some, lambda: batch) for model in (low, session.model))
    return float((norms(tree.sub(rounded, exact)) / norms(exact)).nan_to_num(0.0).max())
