"""Other libraries' products in the form that the laws call: `hvp(loss_fn, params, batch, v)`.

Two lines each, to copy for a library that is not here. curvlinops is imported when its adapter is called.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lissa import tree
from lissa.types import Batch, LossFn, Params

Hvp = Callable[[LossFn, Params, Batch, Params], Params]


def of_autograd_functional(function: Callable[..., Any] = torch.autograd.functional.hvp) -> Hvp:
    """`torch.autograd.functional.hvp` or `.vhp`: `function(loss_of_tensors, tensors, vectors) -> (loss, products)`.

    Example:
        >>> from lissa.testing import check_hvp
        >>> "symmetry" in check_hvp(of_autograd_functional(), max_examples=2).laws
        True
    """

    def hvp(loss_fn: LossFn, params: Params, batch: Batch, v: Params) -> Params:
        def loss(*tensors: Tensor) -> Tensor:
            return loss_fn(dict(zip(params, tensors, strict=True)), batch)

        products = function(loss, tuple(params.values()), tuple(v[k] for k in params))[1]
        return dict(zip(params, products, strict=True))

    return hvp


def of_double_backward(function: Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]) -> Hvp:
    """`function(loss, params, vectors) -> products` on a loss whose graph is still there, as AllenNLP's `get_hvp`.

    Example:
        >>> from lissa.testing import check_hvp
        >>> def backward_twice(loss, params, vectors):
        ...     keep = {"create_graph": True, "materialize_grads": True}
        ...     grads = torch.autograd.grad(loss, params, **keep)
        ...     inner = sum((g * v).sum() for g, v in zip(grads, vectors))
        ...     if not inner.requires_grad:  # linear in every parameter
        ...         return [torch.zeros_like(p) for p in params]
        ...     return torch.autograd.grad(inner, params, materialize_grads=True)
        >>> check_hvp(of_double_backward(backward_twice), max_examples=2).laws[0]
        'form'
    """

    def hvp(loss_fn: LossFn, params: Params, batch: Batch, v: Params) -> Params:
        leaves = tree.map(lambda p: p.detach().clone().requires_grad_(), params)
        products = function(loss_fn(leaves, batch), tuple(leaves.values()), tuple(v[k] for k in params))
        return dict(zip(params, products, strict=True))

    return hvp


def of_flat(function: Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]) -> Hvp:
    """`function(loss_of_flat, flat_params, flat_v) -> flat_product`, for libraries that know one vector.

    Example:
        >>> from lissa.testing import check_hvp
        >>> def flat_hvp(loss, x, v):
        ...     return torch.func.jvp(torch.func.grad(loss), (x,), (v,))[1]
        >>> check_hvp(of_flat(flat_hvp), max_examples=2).laws[0]
        'form'
    """

    def hvp(loss_fn: LossFn, params: Params, batch: Batch, v: Params) -> Params:
        def loss(flat: Tensor) -> Tensor:
            return loss_fn(tree.unflatten(flat, params), batch)

        flat_v = tree.flatten({k: v[k] for k in params})
        return tree.unflatten(function(loss, tree.flatten(params).detach(), flat_v), params)

    return hvp


def of_curvlinops(operator: Callable[..., Any] | None = None) -> Hvp:
    """`curvlinops`' `HessianLinearOperator` (default), or another operator class of its signature. Needs curvlinops.

    `check_hvp(of_curvlinops(), min_batch_size=1)`; version 3.0.1 fails on parameters that the loss does not use.
    """
    make: Any = operator
    if make is None:
        import curvlinops  # type: ignore

        make = curvlinops.HessianLinearOperator

    def hvp(loss_fn: LossFn, params: Params, batch: Batch, v: Params) -> Params:
        names = {k: f"p{i}" for i, k in enumerate(params)}  # module parameters may not hold dots

        class Loss(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                for k, p in params.items():
                    self.register_parameter(names[k], torch.nn.Parameter(p.detach().clone()))

            def forward(self, batch: Batch) -> Tensor:
                return loss_fn({k: getattr(self, name) for k, name in names.items()}, batch)

        class Outputs(torch.nn.Module):
            reduction = "mean"  # over one datum: the loss of the whole batch

            def forward(self, outputs: Tensor, _: Tensor) -> Tensor:
                return outputs

        model, none = Loss(), torch.zeros(())
        data = [({"batch": batch} if isinstance(batch, Tensor) else batch, none)]
        H = make(
            model, Outputs(), list(model.parameters()), data, check_deterministic=False, num_data=1,
            batch_size_fn=lambda _: 1,
        )  # fmt: skip
        return dict(zip(params, H @ [v[k] for k in params], strict=True))

    return hvp
