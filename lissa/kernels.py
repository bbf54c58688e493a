"""Selects kernels that can be differentiated twice, inside a `with` block only.

Knows torch's switches; knows nothing of losses or products. Some of torch's fastest kernels have no second derivative:
fused `scaled_dot_product_attention`, and the inference fast path of `nn.MultiheadAttention` and
`nn.TransformerEncoderLayer`. Their plain counterparts compute the same function.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Switches attention to kernels with a second derivative, and back on exit, also after an error."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
