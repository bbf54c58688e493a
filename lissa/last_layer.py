"""Losses that see the parameters through one linear layer only: exact derivatives, with its inputs computed once.

With `z_i = W a_i + b`, the inputs `a_i`, the gradients `g_i = d loss_i / d z_i` and the Hessians
`D_i = d^2 loss_i / d z_i^2` are all that is needed: nothing before or after the layer is run again. Knows tensors and
parameter dicts; knows nothing of modules or data.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lissa.hvp import check_twice_differentiable
from lissa.types import LossFn, Params


class Expansion(NamedTuple):
    """`loss_i(z_i + d) = losses_i + g_i . d + d . D_i d / 2 + ...` of B examples.

    Attributes:
        inputs: `a`, what the layer is given, shape `(B, d)`.
        losses: Shape `(B,)`.
        gradients: `g`, shape `(B, m)`.
        hessians: `D`, shape `(B, m, m)`.
    """

    inputs: Tensor
    losses: Tensor
    gradients: Tensor
    hessians: Tensor


def expansion_of_graph(losses: Tensor, outputs: Tensor, inputs: Tensor) -> Expansion:
    """`g_i = d loss_i / d z_i` and `D_i = d^2 loss_i / d z_i^2` of losses that were computed from `z`, with `a`.

    Args:
        losses: Shape `(B,)`; each depends on its own row of `outputs` alone.
        outputs: `z`, shape `(B, m)`, a leaf that requires grad.
        inputs: `a`, shape `(B, d)`.

    Returns:
        The expansion, constant to autograd.

    Raises:
        NotImplementedError: If an operation of the losses is marked @once_differentiable.

    Example:
        >>> z = torch.tensor([[1.0, 2.0]], requires_grad=True)
        >>> expansion_of_graph((z**3).sum(1), z, torch.ones(1, 4)).hessians
        tensor([[[ 6.,  0.],
                 [ 0., 12.]]])
    """
    B, m = outputs.shape
    check_twice_differentiable(losses, "`expansion_of_graph`")
    with torch.enable_grad():
        (g,) = torch.autograd.grad(losses.sum(), outputs, create_graph=True, materialize_grads=True)
    D = outputs.new_zeros(m, B, m)
    if g.requires_grad:
        each_output = torch.eye(m, dtype=outputs.dtype, device=outputs.device).unsqueeze(1).expand(m, B, m)
        (D,) = torch.autograd.grad(g, outputs, each_output, is_grads_batched=True, materialize_grads=True)
    return Expansion(inputs.detach(), losses.detach(), g.detach(), D.transpose(0, 1).contiguous())


class LastLayer(NamedTuple):
    """Products, gradients, scores and losses of `loss_i(W a_i + b)` in `W` and `b`, at the point of expansion.

    Called with a batch and K stacked vectors, it is a `lissa.stacked.StackedMatvec`.

    Attributes:
        weight: The key of `W`, shape `(m, d)`, in parameter dicts; None if `W` is a constant.
        bias: The key of `b`, shape `(m,)`; None if there is none or it is a constant.

    Example:
        >>> z = torch.tensor([[1.0, 2.0]], requires_grad=True)  # W a with W = [[1], [2]], a = [1]
        >>> batch = expansion_of_graph((z**3).sum(1), z, torch.ones(1, 1))
        >>> LastLayer("W", None)(batch, {"W": torch.ones(1, 2, 1)})
        {'W': tensor([[[ 6.],
                 [12.]]])}
    """

    weight: str | None
    bias: str | None

    def __call__(self, batch: Expansion, vectors: Params) -> Params:
        """`H v_k = mean_i (D_i V_k a_i) a_i^T` for K stacked vectors, as `stacked_hvp` of the mean loss."""
        pushed = self.outputs(batch.inputs, vectors).unflatten(1, (-1, batch.gradients.shape[1]))
        return self._pulled(batch.inputs, torch.bmm(pushed, batch.hessians / len(batch.losses)))  # D is symmetric

    def gradients(self, batch: Expansion) -> Params:
        """`grad_i = g_i a_i^T` of each example: tensors of shape `(B, *shape)`."""
        found = {}
        if self.weight is not None:
            found[self.weight] = batch.gradients.unsqueeze(2) * batch.inputs.unsqueeze(1)
        if self.bias is not None:
            found[self.bias] = batch.gradients
        return found

    def scores(self, batch: Expansion, vectors: Params) -> Tensor:
        """`grad_i . v_k = g_i . V_k a_i` of each example for K stacked vectors, shape `(K, B)`."""
        g = batch.gradients
        if self.weight is None:
            scores = g.new_zeros(len(g), len(next(iter(vectors.values()))))
        else:
            pushed = (batch.inputs @ vectors[self.weight].flatten(0, 1).mT).unflatten(1, (-1, g.shape[1]))
            scores = torch.bmm(pushed, g.unsqueeze(2)).squeeze(2)
        return scores.mT if self.bias is None else (scores.addmm_(g, vectors[self.bias].mT)).mT

    def loss_fn(self, at: Params) -> LossFn:
        """`loss_fn(params, batch) -> ()`: the mean of `losses_i + g_i . d_i + d_i . D_i d_i / 2`.

        With `d_i = z_i(params) - z_i(at)`, it has the mean loss's value, gradient and Hessian at `at`.

        Args:
            at: The parameters that batches are expanded at.
        """

        def expanded(params: Params, batch: Expansion) -> Tensor:
            d = self.outputs(batch.inputs, {k: (params[k] - at[k]).unsqueeze(0) for k in at})
            second = (torch.bmm(d.unsqueeze(1), batch.hessians).squeeze(1) * d).sum(1) / 2
            return (batch.losses + (batch.gradients * d).sum(1) + second).mean()

        return expanded

    def outputs(self, inputs: Tensor, vectors: Params) -> Tensor:
        """`V_k a_i + c_k` of K stacked vectors, shape `(B, K m)`."""
        if self.weight is None:
            return next(iter(vectors.values())).flatten().expand(len(inputs), -1)
        V = vectors[self.weight].flatten(0, 1)
        return inputs @ V.mT if self.bias is None else torch.addmm(vectors[self.bias].flatten(), inputs, V.mT)

    def gram(self, inputs: Tensor) -> Tensor:
        """`<x_i, x_j>` of what one output adds to a product for each pair of inputs, shape `(B, B)`."""
        gram = inputs.new_zeros(len(inputs), len(inputs)) if self.weight is None else inputs @ inputs.mT
        return gram if self.bias is None else gram.add_(1)

    def _pulled(self, inputs: Tensor, y: Tensor) -> Params:
        """`sum_i y_ik a_i^T` and `sum_i y_ik` of `y` of shape `(B, K, m)`."""
        _, K, m = y.shape
        found = {} if self.weight is None else {self.weight: (y.flatten(1).mT @ inputs).reshape(K, m, -1)}
        return found if self.bias is None else found | {self.bias: y.sum(0)}
