"""What scoring a batch costs by each method, from what one example's forward pass does; the cheaper one is taken.

Counts operations of a loss by watching one forward pass. Knows sizes and costs; knows nothing of what scores are for.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lissa.types import Batch, ExampleLossFn, Params

NUMBERS_AT_ONCE = {"cpu": 2**22, "cuda": 2**26}
"""Most numbers in one tensor of a chunk: 16 MiB in float32 on a CPU, where larger ones leave the cache and cost page
faults (a chunk of 128 MiB takes up to five times as long), and 256 MiB elsewhere, where small chunks cost launches."""


class ForwardWork(NamedTuple):
    """What the loss of one example takes; sequence length enters here, and what an embedding does not multiply.

    Attributes:
        operations: Number of kernels.
        multiplications: In matrix products and convolutions.
        written: Numbers that operations write.
        largest: Numbers of the largest tensor written.
    """

    operations: int
    multiplications: int
    written: int
    largest: int


class ScoringPlan(NamedTuple):
    """How to score.

    Attributes:
        method: `"jvp"` or `"per-example-gradients"`.
        chunk_sizes: Examples at a time, by method.
        seconds: The model's times, to be compared with each other.
    """

    method: str
    chunk_sizes: dict[str, int]
    seconds: dict[str, float]

    @property
    def chunk_size(self) -> int:
        """Examples at a time."""
        return self.chunk_sizes[self.method]


def forward_work(example_loss_fn: ExampleLossFn, params: Params, example: Batch) -> ForwardWork:
    """Counts what `example_loss_fn(params, example)` does, for a batch of one.

    Example:
        >>> forward_work(lambda p, x: (x @ p["w"]).square().squeeze(1), {"w": torch.ones(3, 1)}, torch.ones(1, 3))
        ForwardWork(operations=2, multiplications=3, written=2, largest=1)
    """
    with torch.no_grad(), _Counter() as counter:
        example_loss_fn(params, example)
    return ForwardWork(counter.operations, int(counter.multiplications), counter.written, counter.largest)


def plan_scoring(
    work: ForwardWork, *, examples: int, vectors: int, parameters: int, device: str = "cpu", numbers: int | None = None
) -> ScoringPlan:
    """The cheaper method and its chunk, for n examples, K vectors, P parameters and the work W of a forward pass.

        t(jvp)       = chunks (N t_1 + K P t_4) + n K (F t_2 + E t_3)
        t(gradients) = chunks N u_1 + n (F u_2 + E u_3 + P u_4 + K P u_5)

    with N operations, F multiplications and E numbers written in W. A jvp pushes each vector through each example's
    forward pass, and reads all vectors for each chunk; a gradient costs a backward pass and P numbers to write, and
    each vector then a product with them. The constants are fits, to one digit, to which of the two was faster in 360
    measurements on one core: they are made to choose, and a time may be off by a factor of three.
    `python -m benchmarks.scoring` measures again and judges the choice.

    Args:
        work: Of one example.
        examples: n.
        vectors: K.
        parameters: P.
        device: The type of device, for the chunk.
        numbers: Most numbers in one tensor of a chunk; the default is `NUMBERS_AT_ONCE`.

    Returns:
        The plan.

    Example:
        >>> work = ForwardWork(operations=7, multiplications=7840, written=22, largest=10)  # softmax regression
        >>> plans = [plan_scoring(work, examples=1000, vectors=K, parameters=7850) for K in (1, 1000)]
        >>> [plan.method for plan in plans]
        ['jvp', 'per-example-gradients']
    """
    n, K, P = examples, vectors, parameters
    N, F, E, largest = work
    most = numbers or NUMBERS_AT_ONCE.get(device, NUMBERS_AT_ONCE["cuda"])
    most = max(most, K * P)  # the vectors themselves take as much
    sizes = {
        "jvp": _between(1, most // (2 * K * max(1, largest)), n),
        "per-example-gradients": _between(1, most // max(1, P, largest), n),
    }
    jvp, gradients = (-(-n // size) for size in sizes.values())
    seconds = {
        "jvp": jvp * (N * t_1 + K * P * t_4) + n * K * (F * t_2 + E * t_3),
        "per-example-gradients": gradients * N * u_1 + n * (F * u_2 + E * u_3 + P * u_4 + K * P * u_5),
    }
    method = min(seconds, key=lambda method: seconds[method])
    return ScoringPlan(method, sizes, seconds)


t_1, t_2, t_3, t_4 = 30e-6, 40e-12, 2e-9, 2e-9
u_1, u_2, u_3, u_4, u_5 = 20e-6, 10e-12, 0.3e-9, 4e-9, 4e-12
"""Seconds of an operation, a multiplication, a number written, ..., see `plan_scoring`."""


def _between(low: int, value: int, high: int) -> int:
    return max(low, min(value, high))


class _Counter(TorchDispatchMode):
    """Counts the kernels that run inside of it, what they multiply, and what they write."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.multiplications = self.written = self.largest = 0
        self.formulas = _formulas()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if getattr(func, "is_view", False):
            return out
        self.operations += 1
        formula = self.formulas.get(getattr(func, "overloadpacket", None))
        if formula is not None:
            self.multiplications += formula(*args, **(kwargs or {}), out_val=out) // 2
        sizes = [t.numel() for t in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(t, Tensor)]
        self.written += sum(sizes)
        self.largest = max(self.largest, *sizes, 0)
        return out


def _formulas() -> dict[Any, Callable[..., int]]:
    """Torch's own counts of floating-point operations, two to a multiplication."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch warns of on import is not about these
        from torch.utils.flop_counter import flop_registry
    return flop_registry
