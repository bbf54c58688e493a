"""Products by `torch.autograd.grad` on leaf copies of the parameters, made to live with `torch.func`'s transforms.

`torch.autograd.grad` runs where `torch.func` cannot, on packed sequences for instance, but may not be called inside a
transform. Leaving the transform through a `torch.autograd.Function`, torch's public way to do so, lets `vmap` loop over
the vectors, which share one graph, and lets `grad` and `jvp` be refused by name instead of giving a wrong zero.
Knows autograd; knows nothing of modes.
"""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from lissa import tree
from lissa.types import Batch, Params

Prepare: TypeAlias = Callable[[Params, Batch, int], Callable[[Params], Params]]
"""`prepare(params, batch, count)` does the work that `count` vectors share and returns `v -> product`."""


def leafwise(call: str, prepare: Prepare, params: Params, batch: Batch, v: Params) -> Params:
    """`prepare(params, batch, 1)(v)`, outside of all transforms; a surrounding `vmap` loops.

    Args:
        call: How the user named the strategy, for the error when its result is differentiated.
        prepare: Called outside of all transforms, without gradient recording.
        params: The parameter dict.
        batch: Any object; vmap sees the tensors in it if it is a tensor, or tuples, lists and dicts of them.
        v: The vector, shaped like `params`.

    Returns:
        The product.
    """
    if is_constant(params, batch, v):
        return _apart(prepare, params, batch, v)
    leaves, structure = pytree.tree_flatten((params, batch, v))
    vectors = len(v)
    return dict(zip(params, _Leafwise.apply(call, prepare, structure, vectors, 0, *leaves), strict=True))


def is_constant(*values: Any) -> bool:
    """Whether nothing around the call differentiates or vmaps the tensors in `values`; if so, no transform is active.

    Example:
        >>> is_constant({"w": torch.ones(2)}), is_constant(torch.ones(2, requires_grad=True))
        (True, False)
        >>> torch.vmap(lambda x: x * is_constant())(torch.ones(2))
        tensor([0., 0.])
    """
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    if not torch.is_grad_enabled():
        return True
    return not any(isinstance(t, Tensor) and t.requires_grad for t in pytree.tree_leaves(values))


def _apart(prepare: Prepare, params: Params, batch: Batch, v: Params) -> Params:
    with torch.no_grad():
        return prepare(params, batch, 1)(v)


class _Leafwise(torch.autograd.Function):
    """The last `vectors` of the `leaves` are the parts of v, each with `stacked` more dimensions in front."""

    @staticmethod
    def forward(
        call: str, prepare: Prepare, structure: pytree.TreeSpec, vectors: int, stacked: int, *leaves: Any
    ) -> tuple[Tensor, ...]:
        params, batch, v = pytree.tree_unflatten(leaves, structure)
        if not stacked:
            return tuple(_apart(prepare, params, batch, v).values())
        shape = next(iter(v.values())).shape[:stacked]
        count = math.prod(shape)
        product = prepare(params, batch, count)
        v = tree.map(lambda t: t.flatten(0, stacked - 1), v)
        products = [product(tree.map(lambda t, i=i: t[i], v)) for i in range(count)]
        return tuple(torch.stack([p[k] for p in products]).unflatten(0, shape) for k in params)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.call = inputs[0]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        call, prepare, structure, vectors, stacked, *leaves = args
        dims = in_dims[5:]
        shared, own = leaves[:-vectors], leaves[-vectors:]
        if all(dim is None for dim in dims[:-vectors]):
            own = tuple(
                t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
                for t, dim in zip(own, dims[-vectors:], strict=True)
            )
            products = _Leafwise.apply(call, prepare, structure, vectors, stacked + 1, *shared, *own)
        else:
            slices = (
                [t if dim is None else t.select(dim, i) for t, dim in zip(leaves, dims, strict=True)]
                for i in range(info.batch_size)
            )
            each = [_Leafwise.apply(call, prepare, structure, vectors, stacked, *s) for s in slices]
            products = tuple(map(torch.stack, zip(*each, strict=True)))
        return products, (0,) * len(products)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise _not_differentiable(ctx.call)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise _not_differentiable(ctx.call)


def _not_differentiable(call: str) -> NotImplementedError:
    return NotImplementedError(
        f"`{call}` cannot itself be differentiated (by grad, jvp or backward): it leaves the graph. Use "
        "mode='reverse-over-reverse' or 'forward-over-reverse', or detach what it is given."
    )
