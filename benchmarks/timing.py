"""Times and memory of several ways to do the same thing, measured side by side in one process.

A machine's speed drifts, and others use it too: each round times every candidate in turn, as the quickest of a few
short blocks of calls (a block that was interrupted says nothing), and ratios are taken within a round before their
median. Knows callables; knows nothing of what they compute.
"""

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

BLOCKS = 4
"""Blocks of calls in a round, for calls short enough to fit several into a millisecond."""


class Timing(NamedTuple):
    """Seconds of one call: median and quartiles over the rounds, and every round for ratios."""

    median: float
    lower: float
    upper: float
    rounds: list[float]


def side_by_side(
    candidates: Mapping[str, Callable[[], Any]], *, seconds: float = 2.0, rounds: int = 7, device: str = "cpu"
) -> dict[str, Timing]:
    """Times every candidate in each of at least `rounds` rounds, for about `seconds` in all; warm-up comes before."""
    repeats = {}
    for name, call in candidates.items():
        call()
        once = _seconds(call, 2, device)
        repeats[name] = max(1, int(0.001 / once))  # about a millisecond a block, above the clock's grain
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    stop = time.perf_counter() + seconds
    while len(next(iter(taken.values()))) < rounds or time.perf_counter() < stop:
        for name, call in candidates.items():
            blocks = BLOCKS if repeats[name] > 1 else 1
            taken[name].append(min(_seconds(call, repeats[name], device) for _ in range(blocks)))
    return {name: summary(values) for name, values in taken.items()}


def summary(values: list[float]) -> Timing:
    """Median and quartiles."""
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, lower, upper, values)


def ratio(a: Timing, b: Timing) -> Timing:
    """`a / b`, round by round."""
    return summary([x / y for x, y in zip(a.rounds, b.rounds, strict=True)])


def _seconds(call: Callable[[], Any], repeats: int, device: str) -> float:
    synchronise(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronise(device)
    return (time.perf_counter() - start) / repeats


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_bytes(call: Callable[[], Any], device: str = "cpu") -> int:
    """The most memory that was allocated at once during `call()`, its result included, what existed before not."""
    call()
    if device == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        synchronise(device)
        del kept
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        kept = call()
    del kept
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak


def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "processor": _processor(),
        "load": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.system(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
