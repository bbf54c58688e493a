"""Does a plan come true? Five runs, each planned in one process and done in another, time and memory side by side.

`python -m benchmarks.plan` prints what was predicted and what was measured, and writes `benchmarks/results/plan.json`.
The runs differ in model, size, reading and number of processes. Memory is the most that a process ever held.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset, TensorDataset, default_collate

from benchmarks.timing import environment
from bridge import SimpleInfluence

RESULTS = Path(__file__).parent / "results"

WITHIN = 0.3
"""How far a plan may be off."""


class Transformer(nn.Module):
    """Two layers of width 64 on 32 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.encoder(self.embed(x)).mean(1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 100), nn.Tanh(), nn.Linear(100, 60), nn.Tanh(), nn.Linear(60, 10))


def cnn() -> nn.Module:
    first = nn.Sequential(nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 8, 5, stride=2), nn.Tanh())
    return nn.Sequential(first, nn.Conv2d(8, 16, 5, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(256, 10))


class Run(NamedTuple):
    """A run: `tests` explained by `n` training examples."""

    model: Callable[[], nn.Module]
    n: int
    tests: int
    batch_size: int
    steps: int
    processes: int = 1
    kept: bool = True
    """Whether examples are collated once and kept; with a `collate_fn` of the user's they are read each time."""


RUNS = {
    "softmax regression": Run(lambda: nn.Linear(784, 10), n=20_000, tests=32, batch_size=32, steps=600),
    "MLP": Run(mlp, n=5_000, tests=16, batch_size=64, steps=300),
    "MLP, two processes": Run(mlp, n=20_000, tests=8, batch_size=1024, steps=100, processes=2),
    "CNN, read each time": Run(cnn, n=2_000, tests=8, batch_size=64, steps=60, kept=False),
    "transformer": Run(Transformer, n=600, tests=4, batch_size=16, steps=80),
}


def influence_of(run: Run) -> tuple[SimpleInfluence, Dataset[Any]]:
    generator = torch.Generator().manual_seed(0)
    count = run.n + run.tests
    x = torch.rand(count, 784, generator=generator)
    if run.model is Transformer:
        x = torch.randint(1000, (count, 32), generator=generator)
    y = torch.randint(5, (count,), generator=generator)
    torch.manual_seed(0)
    influence = SimpleInfluence.from_dataset(
        run.model(),
        TensorDataset(x[: run.n], y[: run.n]),
        loss_fn=F.cross_entropy,
        ridge=10.0,
        scale=100.0,
        recursion_depth=run.steps,
        lissa_batch_size=run.batch_size,
        progress=False,
        collate_fn=None if run.kept else default_collate,
    )
    return influence, TensorDataset(x[run.n :], y[run.n :])


def worker(name: str, what: str) -> None:
    """One process that plans the run or does it, and prints what it found."""
    torch.set_num_threads(1)
    if "PROCESSOR_TIME" in os.environ:
        time.perf_counter = time.process_time
    run = RUNS[name]
    influence, tests = influence_of(run)
    start = time.perf_counter()
    if what == "plan":
        (plan,) = influence.plan(tests, ranks=[run.processes])
        found = {"seconds": plan.total_seconds, "memory": plan.memory, "parts": plan.seconds, "sent": plan.traffic}
        found["probe_seconds"] = time.perf_counter() - start
    else:
        influence.interpret_instances(tests, k=10)
        found = {"seconds": time.perf_counter() - start}
        found["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(json.dumps(found))


def of_worker(name: str, what: str) -> dict[str, Any]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RUNS[name].processes)]
    command = [sys.executable, *(launcher if RUNS[name].processes > 1 else [])]
    command += ["-W", "ignore"] if RUNS[name].processes == 1 else []
    command += ["-m", "benchmarks.plan", "--worker", name, what]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--worker", nargs=2, metavar=("RUN", "WHAT"), help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=3, help="of each; the median is told")
    parser.add_argument(
        "--processor-time", action="store_true", help="leave out waiting, on a machine that others use too"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "plan.json")
    arguments = parser.parse_args()
    if arguments.worker:
        worker(*arguments.worker)
        return
    if arguments.processor_time:
        os.environ["PROCESSOR_TIME"] = "1"
    rows = []
    print(f"{'run':<22} {'seconds planned':>15} {'taken':>7} {'MB planned':>11} {'held':>6}  off by")
    for name in RUNS:
        rounds = [(of_worker(name, "plan"), of_worker(name, "run")) for _ in range(arguments.rounds)]
        off = {
            key: sorted(plan[key] / run[key] - 1 for plan, run in rounds)[len(rounds) // 2]
            for key in ("seconds", "memory")
        }
        plan, run = rounds[len(rounds) // 2]
        verdict = "" if max(map(abs, off.values())) <= WITHIN else "  MORE THAN 30%"
        print(
            f"{name:<22} {plan['seconds']:>15.2f} {run['seconds']:>7.2f} {plan['memory'] / 1e6:>11.0f} "
            f"{run['memory'] / 1e6:>6.0f}  {off['seconds']:+.0%}, {off['memory']:+.0%}{verdict}",
            flush=True,
        )
        rows.append({"run": name, "off": off, "rounds": rounds, **RUNS[name]._replace(model=None)._asdict()})
    arguments.out.write_text(
        json.dumps({"processor_time": arguments.processor_time, "runs": rows, **environment()}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
