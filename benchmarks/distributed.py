"""Do two processes do twice the work? The same job by one process and by several, in turn, in one run.

`python -m benchmarks.distributed` starts the processes, one thread each, with torchrun. It first checks that the scores
are the same in float64, then times rounds of three: the first process alone while the others wait; all together; and
each the whole job, apart from the others, which says what the machine has for several. Ratios are taken within a round,
because a machine's speed drifts. Results go to `benchmarks/results/distributed.json`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.timing import environment, ratio, summary
from bridge import SimpleInfluence

AGREES = 1e-10
"""Scores of one process and of several, in float64: sums in another order."""

RESULTS = Path(__file__).parent / "results"


class Job:
    """Both ends of the ranking of n training examples for some test examples of a network with P = 85,000 parameters.

    Its numbers are random, which costs what others cost; damping makes the system positive definite.
    """

    def __init__(self, n: int, dtype: torch.dtype):
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(n + 8, 784, generator=generator, dtype=dtype)
        y = torch.randint(10, (n + 8,), generator=generator)
        self.train, self.test = TensorDataset(x[:n], y[:n]), TensorDataset(x[n:], y[n:])
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(784, 100), nn.Tanh(), nn.Linear(100, 60), nn.Tanh(), nn.Linear(60, 10)).to(
            dtype
        )

    def scores(self, process_group: Any, *, steps: int, batch_size: int) -> torch.Tensor:
        """The scores that are ranked, for each test example."""
        influence = SimpleInfluence.from_dataset(
            self.model,
            self.train,
            loss_fn=F.cross_entropy,
            ridge=5.0,
            scale=50.0,
            recursion_depth=steps,
            lissa_batch_size=batch_size,
            progress=False,
            process_group=process_group,
        )
        found = influence.interpret_both_ends(self.test, k=20)
        return torch.tensor(
            [[e.score for e in (*one.most_helpful, *one.most_harmful)] for one in found], dtype=torch.float64
        )


def worker(arguments: argparse.Namespace) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    first = dist.get_rank() == 0

    exact = Job(1000, torch.float64)
    together = exact.scores("all", steps=20, batch_size=100)
    if first:
        gap = float((together - exact.scores(None, steps=20, batch_size=100)).abs().max())
        if not gap <= AGREES:
            raise SystemExit(f"The scores differ by {gap:.1e}.")

    job = Job(arguments.n, torch.float32)
    seconds: dict[str, list[float]] = {"one": [], "all": [], "apart": []}
    processor: dict[str, list[float]] = {"one": [], "all": [], "apart": []}
    for turn in range(arguments.rounds + 1):
        for name, group in (("one", None), ("all", "all"), ("apart", None)):
            dist.barrier()
            start, busy = time.perf_counter(), time.process_time()
            if first or name != "one":
                job.scores(group, steps=arguments.steps, batch_size=arguments.batch_size)
            busy = time.process_time() - busy
            dist.barrier()
            if turn:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
                processor[name].append(busy)
    if first:
        one, several, apart = (summary(seconds[name]) for name in ("one", "all", "apart"))
        ideal = summary([s / dist.get_world_size() for s in apart.rounds])
        found = {
            "processes": dist.get_world_size(),
            "n": arguments.n,
            "parameters": sum(p.numel() for p in job.model.parameters()),
            "steps": arguments.steps,
            "batch_size": arguments.batch_size,
            "test_examples": len(job.test),
            "largest_gap_in_float64": gap,
            "seconds_of_one": list(one[:3]),
            "seconds_of_all": list(several[:3]),
            "seconds_apart": list(apart[:3]),
            "speedup": list(ratio(one, several)[:3]),
            "speedup_that_the_machine_has": list(ratio(one, ideal)[:3]),
            "share_of_it": list(ratio(ideal, several)[:3]),
            # Where others use the machine too: what a process had of its processor, waiting not counted.
            "processor_seconds_of_one": summary(processor["one"]).median,
            "processor_seconds_of_first_of_all": summary(processor["all"]).median,
            "rounds": arguments.rounds,
            **environment(),
        }
        print(json.dumps(found, indent=2))
        if arguments.out:
            arguments.out.write_text(json.dumps(found, indent=2) + "\n")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--n", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "distributed.json")
    arguments = parser.parse_args()
    if dist.is_torchelastic_launched():
        worker(arguments)
        return
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(arguments.processes)]
    command = [sys.executable, *launcher, "-m", "benchmarks.distributed", *sys.argv[1:]]
    raise SystemExit(subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode)


if __name__ == "__main__":
    main()
