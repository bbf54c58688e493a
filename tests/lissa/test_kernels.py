"""Switches are as they should be inside a block and as they were after it, however blocks are nested."""

import contextlib

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lissa.kernels import twice_differentiable


def switches():
    cuda = torch.backends.cuda
    return {
        "flash": cuda.flash_sdp_enabled(),
        "memory efficient": cuda.mem_efficient_sdp_enabled(),
        "cudnn attention": cuda.cudnn_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "cudnn": torch.backends.cudnn.enabled,
    }


PLAIN = dict.fromkeys(("flash", "memory efficient", "cudnn attention", "fast path", "cudnn"), False) | {"math": True}


@contextlib.contextmanager
def fast_path():
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(True)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


FUSED = {
    "flash": lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION),
    "memory efficient": lambda: sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION),
    "cudnn attention": lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
    "fast path": fast_path,
    "cudnn": lambda: torch.backends.cudnn.flags(enabled=True),
}


def test_blocks_within_blocks():
    before = switches()
    with twice_differentiable():
        assert switches() == PLAIN
        with twice_differentiable():
            assert switches() == PLAIN
        assert switches() == PLAIN
    assert switches() == before


@pytest.mark.parametrize("name", FUSED)
def test_what_is_switched_on_within_a_block_is_switched_off_in_the_next(name):
    with twice_differentiable(), FUSED[name]():
        between = switches()
        assert between[name]
        with twice_differentiable():
            assert switches() == PLAIN
        assert switches() == between


def test_math_alone_can_be_off():
    """A caller's choice of no kernel at all is mended too: attention would refuse to run."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.backends.cudnn.flags(enabled=False):
        torch.backends.cuda.enable_flash_sdp(False)
        with twice_differentiable():
            assert switches()["math"]


@pytest.mark.parametrize("nested", [False, True])
def test_after_an_error_switches_are_as_before(nested):
    before, inner = switches(), twice_differentiable() if nested else contextlib.nullcontext()
    with pytest.raises(ZeroDivisionError), twice_differentiable(), inner:
        raise ZeroDivisionError
    assert switches() == before
