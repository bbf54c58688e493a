"""Selects kernels that can be differentiated twice, inside a `with` block only.

Knows torch's switches and its operations; knows nothing of losses or products. Some of torch's fastest kernels have no
second derivative, and some forward-mode formulas are not differentiable although torch differentiates them without a
word. Their plain counterparts compute the same function.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Switches attention and RNNs to kernels with a second derivative, and back on exit, also after an error.

    Switched off are fused `scaled_dot_product_attention`, the inference fast path of `nn.MultiheadAttention` and
    `nn.TransformerEncoderLayer`, and cuDNN.
    """
    if _is_twice_differentiable():  # to ask takes a ninth of what it takes to set
        yield
        return
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def _is_twice_differentiable() -> bool:
    cuda = torch.backends.cuda  # where torch keeps them for all devices
    fused = cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled()
    others = torch.backends.mha.get_fastpath_enabled(), torch.backends.cudnn.enabled
    return cuda.math_sdp_enabled() and not any((*fused, *others))


@contextmanager
def without_onednn() -> Iterator[None]:
    """Switches oneDNN off, whose LSTM has no forward-mode derivative and cannot be recorded, and back on exit."""
    enabled = torch.backends.mkldnn.set_flags(_enabled=False)[0]
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=enabled)


class DenseEmbeddings(TorchFunctionMode):
    """Inside it, the gradient of an embedding is dense, whatever its `sparse` says: torch.func loses a sparse one."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls `func`, embeddings with `sparse=False`."""
        kwargs = kwargs or {}
        if func is torch.embedding and len(args) > _SPARSE_OF_EMBEDDING:
            args = (*args[:_SPARSE_OF_EMBEDDING], False)
        elif func in (torch.embedding, functional.embedding):
            kwargs = {**kwargs, "sparse": False}
        return func(*args, **kwargs)


_SPARSE_OF_EMBEDDING = 4
"""The place of `sparse` among the arguments of `torch.embedding`."""


class DifferentiableForwardMode(TorchFunctionMode):
    """Inside it, derivatives of forward-mode derivatives are right, or an error names the operation.

    The forward-mode formulas of torch's normalisation layers, determinants and solvers use results of the forward pass
    (a mean, a factorisation) as if they were constants. The directional derivative is right, its gradient is not: for
    LayerNorm it misses the terms through mean and variance. Layer and group norm are computed here from their formula;
    the others are refused.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replaces, refuses or calls `func`."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func in (functional.layer_norm, torch.layer_norm):
            return _layer_norm(*args, **kwargs)
        if func in (functional.group_norm, torch.group_norm):
            return _group_norm(*args, **kwargs)
        if name in _FORWARD_MODE_NOT_DIFFERENTIABLE and not _uses_stored_statistics(func, args, kwargs):
            raise NotImplementedError(f"derivative for the forward-mode derivative of {name} is not implemented")
        return func(*args, **kwargs)


_FORWARD_MODE_NOT_DIFFERENTIABLE = frozenset(
    {
        "batch_norm",
        "instance_norm",
        "native_layer_norm",
        "native_group_norm",
        "native_batch_norm",
        "_native_batch_norm_legit",
        "_batch_norm_with_update",
        "det",
        "logdet",
        "slogdet",
        "linalg_det",
        "linalg_slogdet",
        "linalg_solve",
        "linalg_solve_ex",
        "linalg_tensorsolve",
        "linalg_eigh",
        "linalg_householder_product",
        "triangular_solve",
        "cumprod",
        "cumprod_",
        "scatter_reduce",
        "scatter_reduce_",
        "_safe_softmax",
    }
)
"""Found by comparing, for the operations and samples of torch 2.13's own test suite, the product of each mode with a
difference of gradients, on CPU in float64."""


def _uses_stored_statistics(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether `func` is a batch norm in eval mode, an affine map, whose forward mode is sound."""
    if func not in (functional.batch_norm, torch.batch_norm):
        return False
    return not (kwargs["training"] if "training" in kwargs else len(args) > 5 and args[5])


def _layer_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    normal = _standardised(input, dims, eps)
    normal = normal if weight is None else normal * weight
    return normal if bias is None else normal + bias


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    groups = input.reshape(input.shape[0], num_groups, -1)
    normal = _standardised(groups, (-1,), eps).reshape(input.shape)
    per_channel = (-1,) + (1,) * (input.ndim - 2)
    normal = normal if weight is None else normal * weight.reshape(per_channel)
    return normal if bias is None else normal + bias.reshape(per_channel)


def _standardised(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    """`(x - mean) / sqrt(variance + eps)` over `dims`."""
    centred = x - x.mean(dims, keepdim=True)
    return centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
