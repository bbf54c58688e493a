"""What a loop on the host does while `vmap` is active: reads a decision off the device, sends it what it draws.

Decisions and draws leave the surrounding `vmap` through the rule of a `torch.autograd.Function`, torch's public way to
do so. Knows nothing of solvers or data.
"""

from typing import Any

import torch
from torch import Tensor


def any_true(flag: Tensor) -> bool:
    """Whether any entry of `flag` is true, in any of the vectors that surrounding `vmap`s run over.

    Costs one synchronisation on an accelerator.
    """
    try:
        return bool(flag.any())
    except RuntimeError:  # inside `vmap`
        return bool(_Largest.apply(flag.to(torch.int64)))


def largest(values: Tensor) -> int:
    """The largest entry of the integer tensor `values`, over all the vectors that surrounding `vmap`s run over."""
    return int(_Largest.apply(values))


def randperm(n: int, generator: torch.Generator) -> Tensor:
    """`torch.randperm` drawn once, not once for each vector of a surrounding `vmap`: batches are shared."""
    return _Draw.apply(lambda: torch.randperm(n, generator=generator, device=generator.device))


def randint(high: int, size: int, generator: torch.Generator) -> Tensor:
    """`torch.randint(high, (size,))` drawn once, not once for each vector of a surrounding `vmap`."""
    return _Draw.apply(lambda: torch.randint(high, (size,), generator=generator, device=generator.device))


def normal(size: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
    """`torch.randn(size)` drawn once, not once for each vector of a surrounding `vmap`; moved to `device`."""

    def draw() -> Tensor:
        return to_device(torch.randn(size, dtype=dtype, device=generator.device, generator=generator), device)

    return _Draw.apply(draw)


def signs(size: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
    """Independent -1 and 1 with equal chances, drawn once like `normal`."""

    def draw() -> Tensor:
        bits = torch.randint(2, (size,), device=generator.device, generator=generator)
        return to_device((2 * bits - 1).to(dtype), device)

    return _Draw.apply(draw)


def to_device(t: Tensor, device: torch.device) -> Tensor:
    """`t` on `device`. The host does not wait for a copy to a GPU: it goes through memory that is not paged."""
    if t.device.type == "cpu" and device.type == "cuda":
        return t.pin_memory().to(device, non_blocking=True)
    return t.to(device)


def number(value: Tensor) -> float:
    """The largest entry of `value`, over all the vectors that surrounding `vmap`s run over; NaN if there is one."""
    return float(_Largest.apply(value))


class _Largest(torch.autograd.Function):
    @staticmethod
    def forward(values: Tensor) -> Tensor:
        return values.max()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, None]:
        return _Largest.apply(*args), None


class _Draw(torch.autograd.Function):
    @staticmethod
    def forward(draw: Any) -> Tensor:
        return draw()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, None]:
        return _Draw.apply(*args), None
