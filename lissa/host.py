"""What a loop on the host does while `vmap` is active: reads a decision off the device, and draws shared randomness.

Both leave the surrounding `vmap` through the rule of a `torch.autograd.Function`, which is torch's public way to do so.
Knows nothing of solvers or data.
"""

from typing import Any

import torch
from torch import Tensor


def any_true(flag: Tensor) -> bool:
    """Whether any entry of `flag` is true, in any of the vectors that surrounding `vmap`s run over.

    Costs one synchronisation on an accelerator.
    """
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
