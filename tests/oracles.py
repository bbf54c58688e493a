"""Slow, obvious answers to compare with: dense matrices and naive loops. Nothing here uses the code under test."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

Params = dict[str, Tensor]


def flatten(x: Params) -> Tensor:
    """All entries in key order, shape (P,)."""
    return torch.cat([t.reshape(-1) for t in x.values()])


def unflatten(flat: Tensor, like: Params) -> Params:
    """Cuts `flat` into tensors shaped like `like`."""
    out, start = {}, 0
    for key, t in like.items():
        out[key] = flat[start : start + t.numel()].reshape(t.shape)
        start += t.numel()
    return out


def dense_hessian(loss_fn: Callable[[Params, Any], Tensor], params: Params, batch: Any) -> Tensor:
    """`torch.func.hessian` of the loss in the flat parameters, shape (P, P)."""
    return torch.func.hessian(lambda flat: loss_fn(unflatten(flat, params), batch))(flatten(params))


def dense_gradients(example_loss_fn: Callable[[Params, Any], Tensor], params: Params, batch: Any) -> Tensor:
    """`torch.func.jacrev` of the example losses in the flat parameters, shape (B, P)."""
    return torch.func.jacrev(lambda flat: example_loss_fn(unflatten(flat, params), batch))(flatten(params))


def naive_lissa(matrices: Iterable[Tensor], v: Tensor, damping: float, scale: float) -> Tensor:
    """Koh & Liang's recursion with the batches' dense Hessians, one after the other."""
    h = v
    for H in matrices:
        h = v + h - (H @ h + damping * h) / scale
    return h / scale


def relative_error(got: Tensor, expected: Tensor) -> float:
    """`|got - expected| / |expected|`, or `|got|` where nothing is expected."""
    size = expected.norm().item()
    return (got - expected).norm().item() / (size or 1.0)
