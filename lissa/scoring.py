"""What scoring a batch costs by each method, from what one example's forward pass does; the cheapest is taken.

Counts operations of a loss by watching one forward pass. Knows sizes and costs; knows nothing of what scores are for.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lissa import checks
from lissa.types import Batch, ExampleLossFn, Params

NUMBERS_AT_ONCE = {"cpu": 10 * 2**20, "cuda": 2**27}
"""Most numbers that a chunk holds. On a CPU 40 MiB in float32: an allocator that gives freed memory back to the system
beyond 64 MiB, as glibc's does, pays for it with page faults, and a chunk takes two to four times as long. Elsewhere
512 MiB, as small chunks cost launches."""


METHODS = ("jvp", "per-example-gradients", "double-vjp")
"""The ways to score; see `lissa.influence_scores`."""


class Machine(NamedTuple):
    """What a type of device takes, in seconds, and what it holds.

    Attributes:
        call: To call a kernel through `torch.func`.
        node: To go through a kernel's node of a graph that is there.
        multiply: For a multiplication and an addition of a matrix product.
        move: To read or write a number.
        cache: Numbers beyond which they are moved more slowly.
        backward: For a backward pass, besides: a GPU's is made by another thread, which is waited for.
    """

    call: float
    node: float
    multiply: float
    move: float
    cache: float
    backward: float


MACHINES = {
    "cpu": Machine(call=25e-6, node=2.5e-6, multiply=14e-12, move=0.25e-9, cache=2**22, backward=0.0),
    "cuda": Machine(call=80e-6, node=12e-6, multiply=0.03e-12, move=0.0014e-9, cache=2**27, backward=0.65e-3),
}
"""By type of device, others are taken for the last. The CPU is one core with float32, 140 GFLOP/s, 16 GB/s and 16 MiB;
the GPU an H100 with 67 TFLOP/s and 3 TB/s. Both were fitted to measured times."""


class ForwardWork(NamedTuple):
    """What the loss of one example takes; sequence length enters here, and what an embedding does not multiply.

    What is computed from the parameters alone, once for all examples, is an operation and no more.

    Attributes:
        operations: Number of kernels.
        multiplications: In matrix products and convolutions.
        read: Numbers that operations read, of embeddings the rows looked up, and no other parameters.
        written: Numbers that operations write.
        largest: Numbers of the largest tensor written.
        tables: Numbers of the embeddings that rows are looked up in.
        looked_up: Numbers of those rows.
        inputs: Numbers of those read that are of the example.
        input_multiplications: Those multiplications whose factors are of the example.
        products: Those operations that are matrix products and convolutions.
    """

    operations: int
    multiplications: int
    read: int
    written: int
    largest: int
    tables: int = 0
    looked_up: int = 0
    inputs: int = 0
    input_multiplications: int = 0
    products: int = 0


class ScoringPlan(NamedTuple):
    """How to score.

    Attributes:
        method: One of `METHODS`.
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
        >>> work = forward_work(lambda p, x: (x @ p["w"]).square()[:, 0], {"w": torch.ones(3, 1)}, torch.ones(1, 3))
        >>> work.operations, work.multiplications, work.read, work.inputs, work.written
        (2, 3, 4, 3, 2)
    """
    with torch.no_grad(), _Counter(params, example) as counter:
        example_loss_fn(params, example)
    return counter.work()


def plan_scoring(
    work: ForwardWork,
    *,
    examples: int,
    vectors: int,
    parameters: int,
    device: str = "cpu",
    numbers: int | None = None,
    methods: Sequence[str] = METHODS,
) -> ScoringPlan:
    """The cheapest method and its chunk, for n examples, K vectors, P parameters and the work W of a forward pass.

        t(jvp)        = c ((N + 3 B + 10) a + 7/4 K V w)
                      + n ((K + 1) (G m + 4/5 M w) + 2 h K M w + 5/4 K E w + (9/10 K + 5) I w)
        t(gradients)  = c ((N / 4 + 10 B + 14) a + d + 3/4 K P w)
                      + n (G m + 7/2 M w + 5/2 (1 + h) P w + 3/4 K P m)
        t(double-vjp) = c ((N / 2 + 10) a + d + p (N + 22 B + 4) b + K P w + q K V w)
                      + n (11/10 (K + 5/2) G m + (K / 2 + 4) M w + 3/2 K (E + I) w)

    with c chunks and, of W, N operations, B of them matrix products, I numbers read of the example, M others read or
    written and 50 more, E of them looked up in embedding tables of V numbers, and G multiplications, those of the
    forward pass twice, but once where the example is a factor, which has no derivative. A share h of what a chunk holds
    does not fit into the cache: of K tangents for jvp, of gradients for gradients. The vectors of a double-vjp go one
    by one, p = K and q = 0, or several at once, see `pulled_at_once`: then p is five times the number of passes, and
    q = 1/3.

    A jvp pushes the example and K vectors through the forward pass; the tables of all vectors are copied for each
    chunk, to look up rows in all of them at once, and so is the example. A gradient takes a forward and a backward
    pass, of several kernels a product, and P numbers that are written, and read again for K products. A double-vjp
    builds the graph of these two passes for all examples of a chunk, which a pass for one or several vectors then goes
    through; it calls a kernel in a fraction of the time, but in each pass anew, and more slowly for several.

    The constants are of the type of device, see `MACHINES`: a to call a kernel through `torch.func`, b to go through
    its node of a graph, d for a backward pass, m for a multiplication, w for a number moved, and what a cache holds.
    What is chosen depends on the ratios of the times, and little on those: where it would, times are alike.

    The numbers in the formula were fitted to the times of a grid of models and of others, on an AMD EPYC and, before
    vectors were pulled back together, an Intel Xeon. Measured anew on the EPYC it chose the fastest in 93% of the
    grid's 360 cases, one within 5% of it in 97%, and none that took more than 1.3 times as long; of the other 256
    cases the fastest in 90%, one within 5% of it in 93%, none more than 1.3 times. That is `python -m
    benchmarks.scoring`. Where a linear layer has thousands of inputs, the two processors differ in which method is the
    quickest for dozens of vectors.

    A chunk holds no more than `numbers`, or as much as the vectors do, which are there anyway. For an example, what the
    forward pass writes is counted, and its largest tensor once more: K times for jvp, with two gradients besides for
    gradients, and four times for double-vjp, twice what its graph holds: it is fastest in the cache. Chunks are even.

    Args:
        work: Of one example.
        examples: n.
        vectors: K.
        parameters: P.
        device: The type of device, for its constants and for the chunk.
        numbers: Most numbers that a chunk holds; the default is `NUMBERS_AT_ONCE`.
        methods: Those to choose from.

    Returns:
        The plan.

    Raises:
        ValueError: If a method is unknown or there is none.

    Example:
        >>> from functools import partial
        >>> sizes = {"multiplications": 7840, "read": 850, "written": 22, "largest": 10, "inputs": 785, "products": 1}
        >>> softmax_regression = ForwardWork(7, **sizes)
        >>> plan = partial(plan_scoring, softmax_regression, examples=1000, parameters=7850)
        >>> [plan(vectors=K).method for K in (1, 10, 1000)]
        ['double-vjp', 'jvp', 'per-example-gradients']
        >>> plan(vectors=1, methods=("jvp", "per-example-gradients")).method
        'jvp'
    """
    if not methods:
        raise ValueError("`plan_scoring(methods=...)` must name a method, got none.")
    for method in methods:
        checks.one_of("plan_scoring", "methods", method, METHODS)
    a, b, m, w, cache, d = MACHINES.get(device, MACHINES["cuda"])
    n, K, P = examples, vectors, parameters
    N, B, V, E, I = work.operations, work.products, work.tables, work.looked_up, work.inputs  # noqa: E741
    M, G = work.read + work.written - I + OF_A_ROW, 2 * work.multiplications - work.input_multiplications
    most = max(numbers or NUMBERS_AT_ONCE.get(device, NUMBERS_AT_ONCE["cuda"]), K * P)
    passed = max(1, work.written + work.largest)
    held = {"jvp": K * passed, "per-example-gradients": 2 * P + passed, "double-vjp": 4 * passed}
    chunks = {method: -(-n // max(1, most // numbers_of_one)) for method, numbers_of_one in held.items()}
    sizes = {method: -(-n // count) for method, count in chunks.items()}

    def h(held: int) -> float:
        return max(0.0, 1 - cache / max(1, held))

    size = sizes["double-vjp"]
    at_once = min(K, pulled_at_once(K, examples=size, operations=N, looked_up=size * E, device=device))
    p, q = (K, 0.0) if at_once == 1 else (5 * -(-K // at_once), 1 / 3)
    of_tangents, of_gradients = h(sizes["jvp"] * K * passed), h(sizes["per-example-gradients"] * P)
    of_chunk = {
        "jvp": (N + 3 * B + 10) * a + 7 / 4 * K * V * w,
        "per-example-gradients": (N / 4 + 10 * B + 14) * a + d + 3 / 4 * K * P * w,
        "double-vjp": (N / 2 + 10) * a + d + p * (N + 22 * B + 4) * b + K * (P + q * V) * w,
    }
    of_one = {
        "jvp": (K + 1) * (G * m + 4 / 5 * M * w) + (2 * of_tangents * K * M + 5 / 4 * K * E + (9 / 10 * K + 5) * I) * w,
        "per-example-gradients": G * m + (7 / 2 * M + 5 / 2 * (1 + of_gradients) * P) * w + 3 / 4 * K * P * m,
        "double-vjp": 11 / 10 * (K + 5 / 2) * G * m + ((K / 2 + 4) * M + 3 / 2 * K * (E + I)) * w,
    }
    seconds = {method: chunks[method] * of_chunk[method] + n * of_one[method] for method in methods}
    fastest = min(seconds, key=lambda method: seconds[method])
    return ScoringPlan(fastest, {method: sizes[method] for method in methods}, seconds)


def pulled_at_once(vectors: int, *, examples: int, operations: int, looked_up: int, device: str = "cpu") -> int:
    """How many of K vectors go through a graph of N nodes in one backward pass of double-vjp, by `torch.vmap`.

    As many as make up `PULLED_AT_ONCE` examples: of more, what passes cost is not starting them. But one where rows of
    E numbers are looked up, as vmap copies these and makes what follows non-contiguous, and that costs more than the
    passes that it saves:

        (K - 2) N b < 2 K E w

    Args:
        vectors: K.
        examples: Those that the graph is of.
        operations: N.
        looked_up: E, of all examples.
        device: The type of device, for b and w; see `MACHINES`.

    Returns:
        A number of vectors, at least one.

    Example:
        >>> pulled_at_once(10, examples=100, operations=10, looked_up=0)
        10
        >>> pulled_at_once(10, examples=100, operations=10, looked_up=100_000)
        1
    """
    machine = MACHINES.get(device, MACHINES["cuda"])
    if looked_up and (vectors - 2) * operations * machine.node < 2 * vectors * looked_up * machine.move:
        return 1
    return max(1, PULLED_AT_ONCE // max(1, examples))


PULLED_AT_ONCE = 1024
"""Most examples times vectors in one backward pass."""

OF_A_ROW = 50
"""What an example costs in every pass beside the numbers that it reads and writes, in numbers."""


class _Counter(TorchDispatchMode):
    """Counts the kernels that run inside of it, what they multiply, read and write."""

    def __init__(self, params: Params, example: Batch) -> None:
        super().__init__()
        self.counts: dict[str, int] = dict.fromkeys(ForwardWork._fields, 0)
        self.parameters = {_memory(p) for p in params.values()}
        self.example = {_memory(t) for t in pytree.tree_leaves(example) if isinstance(t, Tensor)} - {None}
        self.of_example = self.example | {None}
        self.kept: list[Tensor] = []
        self.formulas = _formulas()

    def work(self) -> ForwardWork:
        """What was counted."""
        return ForwardWork(**self.counts)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = getattr(func, "overloadpacket", None)
        if getattr(func, "is_view", False) or packet is torch.ops.aten._unsafe_view:
            return out
        counts = self.counts
        read = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        written = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
        self.kept += written  # no other tensor takes their memory
        counts["operations"] += 1
        if self.of_example.isdisjoint(map(_memory, read)):
            return out
        self.of_example |= {_memory(t) for t in written}
        inputs = [t.numel() for t in read if _memory(t) in self.example]
        sizes = [t.numel() for t in written]
        counts["read"] += sum(t.numel() for t in read if _memory(t) not in self.parameters)
        counts["inputs"] += sum(inputs)
        counts["written"] += sum(sizes)
        counts["largest"] = max(counts["largest"], *sizes, 0)
        formula = self.formulas.get(packet)
        if formula is not None:
            multiplications = int(formula(*args, **(kwargs or {}), out_val=out)) // 2
            counts["products"] += 1
            counts["multiplications"] += multiplications
            counts["input_multiplications"] += multiplications if inputs else 0
        if packet is torch.ops.aten.embedding:
            counts["tables"] += args[0].numel()
            counts["looked_up"] += out.numel()
            counts["read"] += out.numel()
        return out


def _memory(t: Tensor) -> int | None:
    """Where a tensor and its views are, if they are anywhere."""
    try:
        return t.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return None


def _formulas() -> dict[Any, Callable[..., int]]:
    """Torch's own counts of floating-point operations, two a multiplication, and those of vectors, which it lacks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch warns of on import is not about these
        from torch.utils.flop_counter import flop_registry
    aten = torch.ops.aten
    return {
        **flop_registry,
        aten.dot: lambda a, b, out_val: 2 * a.numel(),
        aten.mv: lambda A, b, out_val: 2 * A.numel(),
        aten.addmv: lambda c, A, b, out_val, **kwargs: 2 * A.numel(),
    }
