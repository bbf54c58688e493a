"""Claim: the memory of the whole job does not grow with n, whether scores are ranked or written to a file.

An MLP with 85,170 parameters, synthetic instances that are made when they are read, 10 test instances, 100 LiSSA steps:
all gradients would take n x 341 KB, 6.8 GB for n = 20,000. Each job runs in a process of its own; what is shown is the
most resident memory above that after the imports, pages of the mapped file not counted, and seconds of wall time; on a
GPU also the most memory that was allocated there.

    python -m benchmarks.simple_influence.memory [--device cuda]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import bridge
from benchmarks.timing import environment

RESULTS = Path(__file__).parents[1] / "results"
TESTS = 10
JOBS: list[dict[str, Any]] = [
    {"n": 2_000},
    {"n": 20_000},
    {"n": 20_000, "max_memory": 10**8},
    {"n": 20_000, "to_file": True},
    {"n": 200_000},
    {"n": 200_000, "to_file": True},
]


class Synthetic(Dataset):
    """Rows of 784 numbers and a class, the same each time they are read, and held by nobody."""

    def __init__(self, n: int):
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if not 0 <= i < self.n:
            raise IndexError(i)
        return torch.randn(784, generator=torch.Generator().manual_seed(i)), i % 10


def job(n: int, max_memory: int | None = None, to_file: bool = False, device: str = "cpu") -> dict[str, Any]:
    """Runs it here and says what it took."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", bridge.InfluenceWarning)
    model = nn.Sequential(nn.Linear(784, 100), nn.Tanh(), nn.Linear(100, 60), nn.Tanh(), nn.Linear(60, 10)).to(device)
    tests = [Synthetic(TESTS)[i] for i in range(TESTS)]
    start, before = time.perf_counter(), resident()
    peak, done = [before], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    influence = bridge.SimpleInfluence.from_dataset(
        model, Synthetic(n), loss_fn=F.cross_entropy, recursion_depth=100, max_memory=max_memory, progress=False
    )
    if to_file:
        with tempfile.TemporaryDirectory() as folder:
            influence.scores_to_file(tests, Path(folder) / "scores.npy")
    else:
        influence.interpret_instances(tests)
    done.set()
    watcher.join()
    return {
        "n": n, "max_memory": max_memory, "to_file": to_file, "above_import": peak[0] - before,
        "seconds": time.perf_counter() - start,
        **({"allocated_on_gpu": torch.cuda.max_memory_allocated()} if device == "cuda" else {}),
    }  # fmt: skip


def resident() -> int:
    """Bytes of this process in memory that no file backs."""
    pages = [int(x) for x in Path("/proc/self/statm").read_text().split()]
    return (pages[1] - pages[2]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simple_influence.memory", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--job", type=json.loads, help="one job, here: the arguments of `job`")
    arguments = parser.parse_args()
    if arguments.job is not None:
        print(json.dumps(job(**arguments.job)))
        return
    rows = []
    for settings in [{**settings, "device": arguments.device} for settings in JOBS]:
        command = [sys.executable, "-m", "benchmarks.simple_influence.memory", "--job", json.dumps(settings)]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        row = rows[-1]
        limit = "" if row["max_memory"] is None else f", max_memory={row['max_memory']:.0e}"
        how = "scores to a file" if row["to_file"] else "top 20"
        on_gpu = f", {row['allocated_on_gpu'] / 1e6:.0f} MB of the GPU's" if "allocated_on_gpu" in row else ""
        print(
            f"n = {row['n']:7,}, {how}{limit}: {row['above_import'] / 1e6:.0f} MB{on_gpu}, {row['seconds']:.0f} s",
            flush=True,
        )
        record = {"environment": environment(), "rows": rows}
        (RESULTS / f"simple-influence-memory-{arguments.device}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
