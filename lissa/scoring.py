"""What scoring a batch costs by each method, from what one example's forward pass does; the cheaper one is taken.

Counts operations of a loss by watching one forward pass. Knows sizes and costs; knows nothing of what scores are for.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lissa.types import Batch, ExampleLossFn, Params

NUMBERS_AT_ONCE = {"cpu": 10 * 2**20, "cuda": 2**27}
"""Most numbers that a chunk holds. On a CPU 40 MiB in float32: an allocator that gives freed memory back to the system
beyond 64 MiB, as glibc's does, pays for it with page faults, and a chunk takes two to four times as long. Elsewhere
512 MiB, as small chunks cost launches."""


class ForwardWork(NamedTuple):
    """What the loss of one example takes; sequence length enters here, and what an embedding does not multiply.

    Attributes:
        operations: Number of kernels.
        multiplications: In matrix products and convolutions.
        read: Numbers that operations read, of embeddings the rows looked up, and no other parameters.
        written: Numbers that operations write.
        largest: Numbers of the largest tensor written.
        tables: Numbers of the embeddings that rows are looked up in.
    """

    operations: int
    multiplications: int
    read: int
    written: int
    largest: int
    tables: int = 0


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
        ForwardWork(operations=2, multiplications=3, read=4, written=2, largest=1, tables=0)
    """
    with torch.no_grad(), _Counter(params) as counter:
        example_loss_fn(params, example)
    return counter.work()


def plan_scoring(
    work: ForwardWork, *, examples: int, vectors: int, parameters: int, device: str = "cpu", numbers: int | None = None
) -> ScoringPlan:
    """The cheaper method and its chunk, for n examples, K vectors, P parameters and the work W of a forward pass.

        t(jvp)       = chunks (N a + 2 K (P + 2 V) w) + n (K + 1) (F m + M w)
        t(gradients) = chunks (N a + 2 K P w) + n (2 (F m + M w) + P (2 w + K m))

    with N operations, F multiplications, M numbers read or written and V numbers in embedding tables of W. A jvp pushes
    the example and K vectors through the forward pass. A gradient takes a forward and a backward pass, and P numbers
    that are written, and read again for K products. Either reads all vectors for each chunk, and the jvp copies the
    embedding tables of all vectors, to look up rows in all of them at once.

    Three constants are of the machine, here one core with float32: a = 50 us to call a kernel through `torch.func`,
    m = 10 ps a multiplication (200 GFLOP/s), w = 0.3 ns a number moved (13 GB/s). What is chosen depends on their
    ratios alone, and little on those: where it would, both times are alike. In 308 cases, 128 of them of models that
    the formula was not made for, it chose the faster method in 95%, the slower one took at most 1.3 times as long, and
    the times were off by a factor of 1.15 in the median: `python -m benchmarks.scoring`.

    A chunk holds no more than `numbers`, or as much as the vectors do, which are there anyway. For an example, what the
    forward pass writes is counted, and its largest tensor once more: K times for jvp, and with two gradients besides
    for gradients. Chunks are even.

    Args:
        work: Of one example.
        examples: n.
        vectors: K.
        parameters: P.
        device: The type of device, for the chunk.
        numbers: Most numbers that a chunk holds; the default is `NUMBERS_AT_ONCE`.

    Returns:
        The plan.

    Example:
        >>> softmax_regression = ForwardWork(operations=7, multiplications=7840, read=850, written=22, largest=10)
        >>> plans = [plan_scoring(softmax_regression, examples=1000, vectors=K, parameters=7850) for K in (1, 1000)]
        >>> [plan.method for plan in plans]
        ['jvp', 'per-example-gradients']
    """
    n, K, P = examples, vectors, parameters
    N, F, V, M = work.operations, work.multiplications, work.tables, work.read + work.written
    most = max(numbers or NUMBERS_AT_ONCE.get(device, NUMBERS_AT_ONCE["cuda"]), K * P)
    passed = work.written + work.largest
    held = {"jvp": K * max(1, passed), "per-example-gradients": 2 * P + passed}
    chunks = {method: -(-n // max(1, most // of_one)) for method, of_one in held.items()}
    seconds = {
        "jvp": chunks["jvp"] * (N * a + 2 * K * (P + 2 * V) * w) + n * (K + 1) * (F * m + M * w),
        "per-example-gradients": chunks["per-example-gradients"] * (N * a + 2 * K * P * w)
        + n * (2 * (F * m + M * w) + P * (2 * w + K * m)),
    }
    method = min(seconds, key=lambda method: seconds[method])
    return ScoringPlan(method, {method: -(-n // count) for method, count in chunks.items()}, seconds)


a, m, w = 50e-6, 10e-12, 0.3e-9
"""Seconds: to call a kernel, of a multiplication, and to read or write a number; see `plan_scoring`."""


class _Counter(TorchDispatchMode):
    """Counts the kernels that run inside of it, what they multiply, read and write."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.operations = self.multiplications = self.read = self.written = self.largest = self.tables = 0
        self.parameters = {_memory(p) for p in params.values()}
        self.formulas = _formulas()

    def work(self) -> ForwardWork:
        """What was counted."""
        return ForwardWork(
            self.operations, int(self.multiplications), self.read, self.written, self.largest, self.tables
        )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if getattr(func, "is_view", False):
            return out
        self.operations += 1
        packet = getattr(func, "overloadpacket", None)
        formula = self.formulas.get(packet)
        if formula is not None:
            self.multiplications += formula(*args, **(kwargs or {}), out_val=out) // 2
        if packet is torch.ops.aten.embedding:
            self.tables += args[0].numel()
            self.read += out.numel()
        read = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self.read += sum(t.numel() for t in read if _memory(t) not in self.parameters)
        written = [t.numel() for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
        self.written += sum(written)
        self.largest = max(self.largest, *written, 0)
        return out


def _memory(t: Tensor) -> int | None:
    """Where a tensor and its views are, if they are anywhere."""
    try:
        return t.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return None


def _formulas() -> dict[Any, Callable[..., int]]:
    """Torch's own counts of floating-point operations, two to a multiplication."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch warns of on import is not about these
        from torch.utils.flop_counter import flop_registry
    return flop_registry
