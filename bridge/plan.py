"""What a large run will cost: time, memory and traffic of each process, from a short measured probe.

Knows what LiSSA and scoring do how often, and measures how long each takes here, on the model and data themselves;
knows nothing of rankings. The parts, for K right-hand sides together, on one of R processes:

    start       what first calls cost more than others
    reading     n / R rows, once if they are kept in memory, else each time they are used
    gradients   K / R test gradients
    LiSSA       repeats * steps * (K products with the process's rows of a batch, and the sum over processes)
    residual    n / R products of the right-hand sides that are measured; where one process finds them and the scores in
                one pass over the rows, what that takes more than the scores alone
    scoring     n / R rows, K scores each

and that, from the gradients on, for each group of K out of all T test instances.
"""

import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import torch

from bridge import products, recursion, scored
from bridge.checkpoint import Record
from bridge.distributed import Ranks
from bridge.functional import Functional
from bridge.rows import Rows
from bridge.session import Session
from bridge.solving import Choice
from lissa import Params, tree

PROBE_SECONDS = 0.5
"""A part is measured again until it has taken so long, or three times."""

PROBE_ROWS = 2048
"""Most training rows that are read for the probe; where a batch is larger, rows stand in for others."""

BYTES_OF_INDEX = 40
"""Of a row's number in the list of a run's batches: a Python int and its place in a list."""

REDUCE_SAMPLE = 2**22
"""Bytes that are summed over processes to see how fast that is."""


class Work(NamedTuple):
    """What is to be done.

    Attributes:
        n: Training instances.
        tests: Test instances, T.
        together: Test instances that are solved for together, K.
        batch_size: Training instances a LiSSA step, of all processes.
        steps: Of a LiSSA run.
        repeats: LiSSA runs.
        measured: Right-hand sides of a group whose residual on all the data is measured.
        ranks: Processes, R.
    """

    n: int
    tests: int
    together: int
    batch_size: int
    steps: int
    repeats: int
    measured: int
    ranks: int

    @property
    def rows(self) -> int:
        """Rows of a batch that the process with the most has, on average over batches.

        Rows fall into shares at random: of R binomial counts the largest is about `m + sqrt(2 m log R)`, `m = B / R`.
        """
        mean = self.batch_size / self.ranks
        return max(1, round(min(self.batch_size, mean + math.sqrt(2 * mean * math.log(self.ranks)))))


class Network(NamedTuple):
    """What connects the processes.

    Attributes:
        bytes_per_second: That one process sends, and receives at the same time.
        latency: Seconds before a message arrives.
    """

    bytes_per_second: float = 1e9
    latency: float = 50e-6

    def sum_seconds(self, size: int, ranks: int) -> float:
        """Of a sum of `size` bytes over all by a ring: `2 (R - 1) / R` of it is sent, in `2 (R - 1)` messages."""
        if ranks == 1:
            return 0.0
        return sent_by_sum(size, ranks) / self.bytes_per_second + 2 * (ranks - 1) * self.latency


def sent_by_sum(size: int, ranks: int) -> float:
    """Bytes that each process sends in a sum of `size` bytes over R of them by a ring."""
    return 2 * (ranks - 1) / ranks * size


class Rates(NamedTuple):
    """What was measured, in seconds and bytes, on one process.

    Attributes:
        start: Seconds that first calls take more than others do.
        read: Seconds to read one training row and collate it.
        draw: Seconds to draw one row of a batch.
        step: Of one LiSSA step of a group, with this process's rows of a batch, kept in memory.
        gradient: Of one test gradient.
        product: Of the measured residual's products, a row.
        score: Of the scores of a group, a row.
        passes: Over the rows for these two.
        row_bytes: Of a collated row; 0 if rows are not kept, because they differ in shape.
        vector_bytes: Of one vector, P numbers.
        process_bytes: The most that the process held while all this was measured, its model and a group included.
    """

    start: float
    read: float
    draw: float
    step: float
    gradient: float
    product: float
    score: float
    passes: int
    row_bytes: int
    vector_bytes: int
    process_bytes: int


class Plan(NamedTuple):
    """What each of `work.ranks` processes will need.

    Attributes:
        work: What is to be done.
        seconds: By part; their sum is the time that the run takes.
        memory: Bytes.
        traffic: Bytes sent.
    """

    work: Work
    seconds: dict[str, float]
    memory: float
    traffic: float

    @property
    def total_seconds(self) -> float:
        """How long the run takes."""
        return sum(self.seconds.values())


def predicted(work: Work, rates: Rates, network: Network, *, most_kept: int) -> Plan:
    """The plan, from what was measured: see the module for the parts.

    Args:
        work: What is to be done.
        rates: Measured for `work.rows` rows of a batch and `work.together` right-hand sides.
        network: What connects the processes.
        most_kept: Bytes of rows that a process keeps in memory; more are read anew each time.

    Example:
        >>> work = Work(1000, 20, 10, 100, 50, 1, 1, 1)
        >>> rates = Rates(0.5, 1e-5, 0.0, 1e-3, 1e-3, 1e-5, 1e-4, 2, 4, 400, 10**8)
        >>> plan = predicted(work, rates, Network(), most_kept=10**6)
        >>> [round(seconds, 4) for seconds in plan.seconds.values()], round(plan.total_seconds, 2)
        ([0.5, 0.01, 0.02, 0.1, 0.02, 0.2], 0.85)
    """
    share, groups = work.n / work.ranks, work.tests / work.together
    kept = 0 < rates.row_bytes * share <= most_kept
    runs = groups * work.repeats
    anew = runs * work.steps * work.rows + groups * share * rates.passes
    drawn = work.repeats * work.steps * work.batch_size
    vectors = work.together * rates.vector_bytes
    sums = runs * work.steps + groups * bool(work.measured) + groups
    seconds = {
        "start": rates.start,
        "reading": (share if kept else anew) * rates.read + drawn * rates.draw,
        "gradients": work.tests / work.ranks * rates.gradient,
        "LiSSA": runs * work.steps * (rates.step + network.sum_seconds(vectors, work.ranks)),
        "residual": groups * share * rates.product,
        "scoring": groups * share * rates.score,
    }
    return Plan(
        work,
        seconds,
        memory=rates.process_bytes
        + (rates.row_bytes * share if kept else 0)
        + 16 * work.n  # a pass's order, and one more while it is drawn
        + BYTES_OF_INDEX * drawn,
        traffic=sums * sent_by_sum(vectors, work.ranks),
    )


def measured(
    session: Session,
    train: Rows,
    tests: Rows,
    works: Sequence[Work],
    ranks: Ranks,
    network: Network,
    *,
    stepping: Functional,
) -> list[Rates]:
    """The rates for each of `works`, which differ in the number of processes alone.

    Those of the most processes come first, whose batches are smallest: what a process held at most then says what it
    needs for each.

    Args:
        session: Of a public call.
        train: Training instances; the first `PROBE_ROWS` of this process's share are read.
        tests: Test instances; the first serve for all.
        works: What is to be done.
        ranks: The processes that measure together; for as many, a step is measured with the sum between them.
        network: What connects them.
        stepping: What LiSSA multiplies by.
    """
    to_step = replace(session, model=stepping)
    train, share = session.rows(train), ranks.share(len(train))
    held = share[:PROBE_ROWS] or range(1)
    firsts: list[float] = []
    train.batch(held[:1])
    start = time.perf_counter()
    train.gather(held)
    if not train.kept_bytes:
        train.batch(held)
    read = (time.perf_counter() - start) / len(held)
    one = works[0]
    few = range(min(one.together, len(tests)))
    gradient = _seconds(lambda: session.gradients("test", tests, few), firsts=firsts) / len(few)
    gradients = session.gradients("test", tests, few)[1]
    vectors = tree.map(lambda t: t[_cycled(few, one.together)], gradients)
    score_rows = held[: 4 * session.rows_at_once(train, 1)]

    def score() -> None:
        for _ in scored.scores(session, train, vectors, chosen=score_rows, description=""):
            pass

    product = products.stacked_products(session.model)
    some = tree.map(lambda t: t[: one.measured], vectors)
    chunk = _cycled(held, min(one.n, session.rows_at_once(train, max(1, one.measured))))
    per_product = 0.0
    if one.measured:
        per_product = _seconds(lambda: product(some, lambda: session.batch(train, chunk)), firsts=firsts) / len(chunk)
    per_score = _seconds(score, firsts=firsts) / len(score_rows)

    def both() -> Params | None:
        return scored.with_products(session, train, vectors, one.measured, chosen=score_rows)

    more: float | None = None  # what a product takes where the scores are found on the way
    if one.measured and both() is not None:
        more = max(0.0, _seconds(both) / len(score_rows) - per_score)
    draw = _seconds(lambda: torch.randperm(10**6).tolist()) / 10**6
    found = {}
    for work in sorted(works, key=lambda work: -work.ranks):
        if work.ranks == ranks.size > 1:
            step = _shared_step_seconds(to_step, train, vectors, work.rows, ranks)
            step = max(0.0, step - network.sum_seconds(sum(t.nbytes for t in vectors.values()), ranks.size))
        else:
            step = _step_seconds(to_step, train, vectors, _cycled(held, work.rows), work.steps)
        in_one = more is not None and work.ranks == 1 and work.together * work.n <= scored.MOST_FOUND
        found[work] = Rates(
            start=sum(firsts),
            read=read,
            draw=draw,
            step=step,
            gradient=gradient,
            product=more if more is not None and in_one else per_product,
            score=per_score,
            passes=1 if in_one or not work.measured else 2,
            row_bytes=train.kept_bytes // len(held),
            vector_bytes=sum(p.nbytes for p in session.model.params.values()),
            process_bytes=_held_bytes(session.model.device),
        )
    return [found[work] for work in works]


def network_of(ranks: Ranks, otherwise: Network) -> Network:
    """What was measured between these processes; `otherwise`, if there is but one."""
    if ranks.size == 1:
        return otherwise
    small, large = ({"x": torch.zeros(size // 4)} for size in (4, REDUCE_SAMPLE))
    latency = _seconds(lambda: ranks.sum(small), ranks) / (2 * (ranks.size - 1))
    seconds = _seconds(lambda: ranks.sum(large), ranks) - 2 * (ranks.size - 1) * latency
    measured = Network(sent_by_sum(REDUCE_SAMPLE, ranks.size) / max(seconds, 1e-9), latency)
    return ranks.agreed(measured)


def _step_seconds(session: Session, train: Rows, vectors: Params, rows: list[int], steps_of_run: int) -> float:
    """Of one step, as the difference of two runs, so that what a run begins and ends with does not count."""
    alike = steps_of_run if train.gathered else 0
    solve = products.inverse_products(session.model, 1.0, 1e6, steps_alike=alike)  # which numbers does not matter

    def steps(count: int) -> None:
        solve(vectors, lambda: (session.batch(train, indices) for indices in repeat(rows, count)))

    few, many = 16, 32  # one look at the residual, as in any 16 steps of a long run
    return max(0.0, (_seconds(partial(steps, many)) - _seconds(partial(steps, few))) / (many - few))


def _shared_step_seconds(session: Session, train: Rows, vectors: Params, rows: int, ranks: Ranks) -> float:
    """The same with the processes in step, each with so many rows of a batch."""
    shares = [ranks.share(len(train), rank) for rank in range(ranks.size)]
    batch = [i for share in shares for i in _cycled(share[:PROBE_ROWS], rows)]
    choice = Choice("lissa", damping=1.0, scale=1e6, steps=0, batch_size=len(batch))

    def steps(count: int) -> None:
        solve = recursion.solver(session, train, choice, lambda: [[batch] * count], measured=lambda _: 0, ranks=ranks)
        solve(vectors, Record())

    few, many = 16, 32
    return max(0.0, (_seconds(partial(steps, many), ranks) - _seconds(partial(steps, few), ranks)) / (many - few))


def _cycled(rows: Sequence[int], count: int) -> list[int]:
    """So many of the rows, from the first on, again and again if there are fewer."""
    return [rows[i % len(rows)] for i in range(count)] if rows else []


def _seconds(call: Callable[[], Any], ranks: Ranks | None = None, firsts: list[float] | None = None) -> float:
    """The median of a few calls after a first, what that took more goes to `firsts`; the first of `ranks` counts."""

    def timed() -> float:
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    first, taken = timed(), []
    while True:
        taken.append(timed())
        enough = len(taken) >= 15 or sum(taken) > (PROBE_SECONDS if len(taken) >= 3 else 4 * PROBE_SECONDS)
        if ranks.agreed(enough) if ranks else enough:
            median = sorted(taken)[len(taken) // 2]
            if firsts is not None:
                firsts.append(max(0.0, first - median))
            return median


def _held_bytes(device: torch.device) -> int:
    """The most memory that was held at once: the GPU's, or the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def in_words(plans: Sequence[Plan], *, memory: float | None = None, seconds: float | None = None) -> str:
    """A table of the plans, and which of them fits with the fewest processes.

    Args:
        plans: For several numbers of processes.
        memory: Bytes that a process may hold.
        seconds: That the run may take.
    """
    lines = [
        f"{'processes':>9} {'time':>10} {'memory each':>12} {'sent each':>12}   where the time goes",
    ]
    for plan in plans:
        total = plan.total_seconds
        parts = ", ".join(f"{name} {part / total:.0%}" for name, part in plan.seconds.items() if part >= 0.005 * total)
        lines.append(
            f"{plan.work.ranks:>9} {duration(total):>10} {size_in_words(plan.memory):>12} "
            f"{size_in_words(plan.traffic):>12}   {parts}"
        )
    if memory is not None or seconds is not None:
        fits = [
            plan
            for plan in plans
            if plan.memory <= (memory or math.inf) and plan.total_seconds <= (seconds or math.inf)
        ]
        wanted = " and ".join(
            [f"{size_in_words(memory)} each"] * (memory is not None) + [f"{duration(seconds)}"] * (seconds is not None)
        )
        best = min(fits, key=lambda plan: plan.work.ranks, default=None)
        count = best.work.ranks if best else 0
        suffices = "1 process does" if count == 1 else f"{count} processes do"
        lines.append(f"Within {wanted}: {suffices}." if best else f"None of these is within {wanted}.")
    return "\n".join(lines)


def duration(seconds: float | None) -> str:
    """In the unit that suits: 12.3 s, 4.5 min, 3.2 h, 1.5 days."""
    value = seconds or 0.0
    for limit, divisor, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if value < limit:
            return f"{value / divisor:.3g} {unit}"
    return f"{value / 86400:.3g} days"


def size_in_words(size: float | None) -> str:
    """In units of 1000: 1.2 GB."""
    value, units = size or 0.0, ["B", "kB", "MB", "GB", "TB", "PB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"
