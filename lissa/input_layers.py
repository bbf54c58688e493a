"""Parameters that a loss sees only in products with constants of its batch: first linear layers, embeddings.

Of such a matrix W the loss is a function of `z = S W`, and so are its derivatives: with `p = d <grad, v> / d z`, the
product is `(H v)_W = S^T p`, and all that it takes of v is `S v_W`. Knows autograd's graphs, from which it reads what
S is; knows nothing of modules, or of what is done with products.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lissa.hvp import check_twice_differentiable, dense, over_stack
from lissa.kernels import twice_differentiable
from lissa.types import Params


class InputLayer(NamedTuple):
    """Where a graph has `z = S W`, with the rows of S.

    Attributes:
        inputs: Floating-point, shape `(rows, d)`: `z = inputs W^T` for W of shape `(m, d)`. Integers, of any shape:
            `z = W[inputs]`.
        outputs: The place of `z`.
        padding: The row of W that is looked up but gets no gradient, if there is one.
    """

    inputs: Tensor
    outputs: GradientEdge
    padding: int | None = None

    @property
    def is_lookup(self) -> bool:
        """Whether rows of W are looked up; otherwise W is multiplied by."""
        return not self.inputs.is_floating_point()


def input_layers(loss: Tensor, leaves: Params) -> dict[str, InputLayer]:
    """Those of `leaves` that the loss sees through one linear layer or embedding of constants, by key.

    Args:
        loss: Computed from the leaves, its graph still there.
        leaves: Parameters that require grad.

    Returns:
        What is not there, the loss may see in any other way.

    Example:
        >>> w, b = torch.ones(1, 2, requires_grad=True), torch.ones(1, requires_grad=True)
        >>> loss = torch.nn.functional.linear(torch.ones(3, 2), w, b).exp().mean()
        >>> [(key, layer.inputs.shape) for key, layer in input_layers(loss, {"w": w, "b": b}).items()]
        [('w', torch.Size([3, 2]))]
    """
    users = _users(loss)
    found = {key: _layer(users, get_gradient_edge(leaf).node, len(leaf)) for key, leaf in leaves.items() if leaf.ndim}
    return {key: layer for key, layer in found.items() if layer is not None}


def _users(loss: Tensor) -> dict[Any, list[tuple[Any, int]]]:
    """For each node of the graph the nodes that take its result, and as which argument."""
    users: dict[Any, list[tuple[Any, int]]] = defaultdict(list)
    todo = [loss.grad_fn] if loss.grad_fn is not None else []
    while todo:
        node = todo.pop()
        for place, (to, _) in enumerate(node.next_functions):
            if to is None:
                continue
            if to not in users:
                todo.append(to)
            users[to].append((node, place))
    return users


def _layer(users: dict[Any, list[tuple[Any, int]]], leaf: Any, rows: int) -> InputLayer | None:
    user, place = _only(users, leaf)
    if user is None:
        return None
    if user.name() == "EmbeddingBackward0" and not user._saved_scale_grad_by_freq:
        padding = user._saved_padding_idx  # of none, a number that is no row
        return InputLayer(user._saved_indices, GradientEdge(user, 0), padding if padding < rows else None)
    if not _transposes(user):
        return None
    user, place = _only(users, user)
    for name, factor, alpha, inputs in _PRODUCTS:
        if user is not None and user.name() == name and place == factor + 1 and user.next_functions[factor][0] is None:
            return InputLayer(getattr(user, inputs), GradientEdge(user, 0)) if getattr(user, alpha, 1) == 1 else None
    return None


def _transposes(node: Any) -> bool:
    """Whether it turns a matrix W into its transpose; dimensions from the end are saved as so many below 2^64."""
    if node.name() == "TransposeBackward0":
        return (node._saved_dim0 - node._saved_dim1) % 2 == 1
    if node.name() == "PermuteBackward0":
        return len(node._saved_dims) == 2 and node._saved_dims[0] % 2 == 1
    return node.name() == "TBackward0"


_PRODUCTS = (("AddmmBackward0", 1, "_saved_alpha", "_saved_mat1"), ("MmBackward0", 0, "", "_saved_self"))
"""Nodes of `beta b + alpha x W^T` and `x W^T`: name, place of x, where alpha and x are saved."""


def _only(users: dict[Any, list[tuple[Any, int]]], node: Any) -> tuple[Any, int]:
    found = users.get(node, [])
    return found[0] if len(found) == 1 else (None, 0)


class ProductsInOutputs:
    """`H v_k` at one batch for K stacked vectors, those of some input layers given and returned in their outputs.

    The gradient's graph is built once, and lives as long as this.

    Args:
        loss: Computed from the leaves.
        leaves: Parameters that require grad.
        layers: Some of `input_layers(loss, leaves)`.

    Example:
        >>> w = torch.ones(1, 2, requires_grad=True)
        >>> loss = (torch.nn.functional.linear(torch.tensor([[1.0, 2.0]]), w) ** 3).sum()
        >>> products = ProductsInOutputs(loss, {"w": w}, input_layers(loss, {"w": w}))
        >>> products({"w": torch.tensor([[[3.0]]])})  # of v = (1, 1), for which S v = 1 + 2; d^2 loss / d z^2 = 6 z
        {'w': tensor([[[54.]]])}
    """

    def __init__(self, loss: Tensor, leaves: Params, layers: dict[str, InputLayer]):
        self._places: dict[str, Any] = {k: layers[k].outputs if k in layers else leaf for k, leaf in leaves.items()}
        self._curved: dict[str, Tensor] = {}
        if loss.requires_grad:
            check_twice_differentiable(loss, "A Hessian-vector product in outputs")
            with torch.enable_grad(), twice_differentiable():
                places = tuple(self._places.values())
                gradient = torch.autograd.grad(loss, places, create_graph=True, allow_unused=True)
            found = zip(self._places, gradient, strict=True)
            self._curved = {k: dense(g) for k, g in found if g is not None and g.requires_grad}

    def __call__(self, vectors: Params) -> Params:
        """Of shape `(K, rows, m)` for an input layer, there and back; of `(K, *shape)` for other parameters."""
        if not self._curved:
            return {k: torch.zeros_like(t) for k, t in vectors.items()}
        outputs, places = tuple(self._curved.values()), tuple(self._places.values())
        cotangents = tuple(vectors[k].detach().reshape(len(vectors[k]), *g.shape) for k, g in self._curved.items())
        reached: list[str] = []

        def pulled(some: Sequence[Tensor]) -> tuple[Tensor, ...]:
            found = torch.autograd.grad(outputs, places, some, retain_graph=True, allow_unused=True)
            reached[:] = [k for k, t in zip(self._places, found, strict=True) if t is not None]
            return tuple(dense(t) for t in found if t is not None)

        with twice_differentiable():
            products = over_stack(pulled, cotangents)
        found = dict(zip(reached, products, strict=True))
        return {k: found[k].reshape(t.shape) if k in found else torch.zeros_like(t) for k, t in vectors.items()}
