"""Arithmetic on parameter dicts: `x + a y`, `<x, y>`, `|x|`, flattening. All functions are pure.

Knows nothing of losses or solvers. Meant to be used as `from lissa import tree`, so that calls read `tree.vdot(x, y)`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lissa.types import Params


def map(fn: Callable[..., Tensor], x: Params, *rest: Params) -> Params:
    """`{k: fn(x[k], y[k], ...)}`.

    Example:
        >>> map(lambda a, b: a * b, {"w": torch.tensor(2.0)}, {"w": torch.tensor(3.0)})
        {'w': tensor(6.)}
    """
    return {k: fn(x[k], *(y[k] for y in rest)) for k in x}


def add(x: Params, y: Params) -> Params:
    """`x + y`."""
    return map(torch.add, x, y)


def sub(x: Params, y: Params) -> Params:
    """`x - y`."""
    return map(torch.sub, x, y)


def scale(a: float | Tensor, x: Params) -> Params:
    """`a x`."""
    return map(lambda x: a * x, x)


def add_scaled(x: Params, a: float | Tensor, y: Params) -> Params:
    """`x + a y`."""
    return map(lambda x, y: x + a * y, x, y)


def where(condition: Tensor, x: Params, y: Params) -> Params:
    """`x` if `condition` (shape `()`) else `y`."""
    return map(lambda x, y: torch.where(condition, x, y), x, y)


def vdot(x: Params, y: Params) -> Tensor:
    """`<x, y> = sum_k sum(x[k] * y[k])`, shape `()`."""
    return torch.stack([(x[k] * y[k]).sum() for k in x]).sum()


def norm(x: Params) -> Tensor:
    """`|x| = sqrt(<x, x>)`, shape `()`.

    Example:
        >>> norm({"w": torch.tensor([3.0]), "b": torch.tensor(4.0)})
        tensor(5.)
    """
    return torch.stack([torch.linalg.vector_norm(t) for t in x.values()]).square().sum().sqrt()


def zeros_like(x: Params) -> Params:
    """`0`, shaped like `x`."""
    return map(torch.zeros_like, x)


def leaves(x: Params) -> Params:
    """`x` anew, each tensor a leaf of autograd's graph that requires grad; `x` itself stays as it is.

    Example:
        >>> x = {"w": torch.ones(2)}
        >>> leaves(x)["w"].requires_grad, x["w"].requires_grad
        (True, False)
    """
    return map(lambda t: t.detach().requires_grad_(), x)


def normal_like(x: Params, *, generator: torch.Generator) -> Params:
    """Independent standard normal entries, shaped like `x`, drawn from `generator` on its own device."""
    return map(
        lambda t: torch.randn(t.shape, dtype=t.dtype, device=generator.device, generator=generator).to(t.device), x
    )


def numel(x: Params) -> int:
    """Number of entries, `P`."""
    return sum(t.numel() for t in x.values())


def flatten(x: Params, like: Params | None = None) -> Tensor:
    """All entries as one vector of shape `(P,)`, in the key order of `like` (default: of `x`); `unflatten` undoes it.

    Example:
        >>> flatten({"w": torch.eye(2), "b": torch.tensor(7.0)})
        tensor([1., 0., 0., 1., 7.])
    """
    return torch.cat([x[k].reshape(-1) for k in like or x])


def unflatten(flat: Tensor, like: Params) -> Params:
    """The parameter dict with the keys and shapes of `like` whose `flatten` is `flat`, shape `(P,)`.

    Raises:
        ValueError: If `flat` does not have as many entries as `like`.
    """
    if flat.shape != (numel(like),):
        raise ValueError(f"`unflatten(flat, like)`: flat must have shape ({numel(like)},), got {tuple(flat.shape)}.")
    parts = flat.split([t.numel() for t in like.values()])
    return {k: part.reshape(t.shape) for (k, t), part in zip(like.items(), parts, strict=True)}
