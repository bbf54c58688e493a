"""Runs the benchmark: checks every product, then times it beside the plain double backward and one gradient.

`python -m benchmarks.hvp` prints the table and writes JSON and a plot under `benchmarks/results`.
"""

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.hvp import memory
from benchmarks.hvp.claims import in_words, verdicts
from benchmarks.hvp.models import FULL, MODELS, QUICK, Row
from benchmarks.hvp.report import markdown, plot
from benchmarks.hvp.strategies import PLAIN, available, gradient
from benchmarks.timing import environment, peak_bytes, ratio, side_by_side
from tests.problems import Params, Problem, random_vector, random_vectors

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Relative: products that differ by more than some thousand roundings are not the same product, and are not timed."""


def measure(row: Row, *, device: str, seconds: float, only: str | None) -> dict[str, Any]:
    """Checks and times all strategies on one row."""
    problem, vectors = on(device, MODELS[row.model](dtype=row.dtype, batch_size=row.batch_size), row.vectors)
    expected = available()[PLAIN](problem, vectors, row.vectors)()
    runs, first, failures = {"gradient": gradient(problem, vectors, row.vectors)}, {}, {}
    for name, strategy in available().items():
        if only and only not in name and name != PLAIN:
            continue
        try:
            start = time.perf_counter()
            run = strategy(problem, vectors, row.vectors)
            run()
            first[name] = time.perf_counter() - start
            error = relative_error(run(), expected)  # the second call: the first one of a traced function is eager
        except Exception as problem_of_strategy:  # a library that cannot do a model is a finding, not a crash
            failures[name] = f"{type(problem_of_strategy).__name__}: {problem_of_strategy}".split("\n")[0][:300]
            continue
        if not error <= TOLERANCE[row.dtype]:
            failures[name] = f"wrong: relative error {error:.1e}"
            continue
        runs[name] = run
    times = side_by_side(runs, seconds=seconds, device=device)
    peaks = {name: peak_bytes(run, device) for name, run in runs.items()}
    cells = {}
    for name in runs:
        speedup, gradients = ratio(times[PLAIN], times[name]), ratio(times[name], times["gradient"])
        cells[name] = {
            "milliseconds": [1e3 * t for t in times[name][:3]],
            "gradients": list(gradients[:3]),
            "gradients_per_vector": gradients.median / row.vectors,
            "speedup_over_plain": list(speedup[:3]),
            "memory_in_gradients": peaks[name] / peaks["gradient"],
            "first_call_seconds": first.get(name),
            "rounds": len(times[name].rounds),
        }
    return {
        "row": str(row),
        **row._asdict(),
        "dtype": str(row.dtype),
        "device": device,
        "cells": cells,
        "failures": failures,
    }


def on(device: str, problem: Problem, count: int) -> tuple[Problem, Params]:
    vectors = random_vector(problem) if count == 1 else random_vectors(problem, count)
    moved = problem._replace(
        params={k: p.to(device) for k, p in problem.params.items()}, batch=tuple(t.to(device) for t in problem.batch)
    )
    return moved, {k: t.to(device) for k, t in vectors.items()}


def relative_error(got: list[Tensor], expected: list[Tensor]) -> float:
    a, b = (torch.cat([t.to_dense().double().reshape(-1) for t in ts]) for ts in (got, expected))
    return float((a - b).norm() / b.norm())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hvp", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the small models only, under two minutes")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="plain functions only on cuda")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=4.0, help="timing for each row, after compiling")
    parser.add_argument("--model", help="only models whose name contains this")
    parser.add_argument("--strategy", help="only strategies whose name contains this, and the plain double backward")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "results", help="folder")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")

    rows = []
    whole = not (arguments.model or arguments.strategy)  # a part is not the table
    chunks = memory.by_chunk(arguments.device) if whole and not arguments.quick else []
    for row in QUICK if arguments.quick else FULL:
        if arguments.model and arguments.model not in row.model:
            continue
        rows.append(measure(row, device=arguments.device, seconds=arguments.seconds, only=arguments.strategy))
        print(markdown(rows[-1:]), flush=True)
        if whole:
            save(rows, chunks, arguments.output, f"hvp-{'quick-' if arguments.quick else ''}{arguments.device}")
    print(in_full(rows, chunks))


def in_full(rows: list[dict[str, Any]], chunks: list[dict[str, Any]]) -> str:
    parts = [markdown(rows), *([memory.markdown(chunks)] if chunks else []), in_words(verdicts(rows, chunks))]
    return "\n\n".join(parts)


def save(rows: list[dict[str, Any]], chunks: list[dict[str, Any]], folder: Path, name: str) -> None:
    """Writes what there is so far, after each row: a long run that is cut off has still said something."""
    record = {"environment": environment(), "rows": rows, "memory_by_chunk": chunks}
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / f"{name}.md").write_text(in_full(rows, chunks) + "\n")
    plot(rows, folder / f"{name}.png")


if __name__ == "__main__":
    main()
