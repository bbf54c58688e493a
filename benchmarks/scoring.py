"""Claim: the cost model of `lissa.scoring` picks the fastest way to score in nine of ten cases, and is never far off.

Times jvp, per-example gradients and double-vjp, each with the chunks that the plan would give it, over a grid of models
(linear, MLP, linear layers along a sequence, embeddings, a transformer layer), sequence lengths L, numbers of training
examples n and of vectors T, and over models and T that are not of the grid, nor of those that the model was made for.
Each with both kinds of losses that there are: of a function that returns one for each example, and of batches of one by
`torch.vmap`, for a model that reports the mean of a batch alone. All must give the same scores first. One thread; the
three are timed in turn, all cases twice, and the least of all times is taken, as others may use the machine. Where a
chunk is one of many alike, one is timed. The allocator is put into the state that it comes to in a long run: glibc
keeps freed memory of up to 64 MiB once a tensor of half that was freed, and less before, when each chunk pays for page
faults. On a GPU, of wall time and after synchronisation, the cases come in an order drawn at random, so that those that
a time limit leaves out are of all kinds; what was measured is written after each model.

    python -m benchmarks.scoring
    python -m benchmarks.scoring --device cuda --limit-seconds 170
"""

import argparse
import itertools
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import lissa
from benchmarks.timing import environment
from bridge.functional import example_losses, functional
from lissa.kernels import twice_differentiable
from lissa.scoring import forward_work, plan_scoring

RESULTS = Path(__file__).parent / "results"
EXAMPLES = {"cpu": (100, 1000), "cuda": (1000, 10_000)}
VECTORS, OTHER_VECTORS = (1, 3, 10, 30, 100), (2, 5, 15, 50)
MOST = 2**25
"""Numbers in the vectors of a case."""


class Case(NamedTuple):
    name: str
    length: int
    make: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]


class Mean(nn.Module):
    """Over the sequence."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(-2)


def cases() -> Iterator[Case]:
    for d in (64, 784, 4096):
        yield Case(f"linear {d}", 1, lambda d=d: nn.Linear(d, 10), lambda n, d=d: torch.randn(n, d))
    for h in (32, 128, 400):
        yield Case(f"MLP {h}", 1, lambda h=h: mlp(h), lambda n: torch.randn(n, 64))
    for h, L in itertools.product((32, 128), (4, 16, 64)):
        yield Case(f"sequence {h}", L, lambda h=h: mlp(h, Mean()), lambda n, L=L: torch.randn(n, L, 64))
    for V, L in itertools.product((500, 4000), (8, 32)):
        yield Case(
            f"embedding {V}", L, lambda V=V: nn.Sequential(nn.Embedding(V, 50), Mean(), nn.Linear(50, 10)),
            lambda n, V=V, L=L: torch.randint(V, (n, L)),
        )  # fmt: skip
    for L in (8, 32):
        yield Case("transformer 64", L, transformer, lambda n, L=L: torch.randn(n, L, 64))


def other_cases() -> Iterator[Case]:
    """Widths, depths, lengths and layers that the grid has not."""
    for d, C in ((200, 5), (1500, 20), (3000, 2)):
        yield Case(f"linear {d}x{C}", 1, lambda d=d, C=C: nn.Linear(d, C), lambda n, d=d: torch.randn(n, d))
    for h in (48, 220, 600):
        yield Case(f"MLP {h}", 1, lambda h=h: mlp(h), lambda n: torch.randn(n, 64))
    for h, L in ((60, 20), (100, 8), (200, 24), (16, 100)):
        yield Case(f"sequence {h}", L, lambda h=h: mlp(h, Mean()), lambda n, L=L: torch.randn(n, L, 64))
    for V, D, L in ((1000, 30, 16), (300, 100, 50), (8000, 20, 12)):
        yield Case(
            f"embedding {V}x{D}", L, lambda V=V, D=D: nn.Sequential(nn.Embedding(V, D), Mean(), nn.Linear(D, 2)),
            lambda n, V=V, L=L: torch.randint(V, (n, L)),
        )  # fmt: skip
    for L in (16, 40):
        yield Case("transformer 64", L, transformer, lambda n, L=L: torch.randn(n, L, 64))
    yield Case("convolutions", 1, convolutions, lambda n: torch.randn(n, 1, 16, 16))


def mlp(h: int, *pool: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(64, h), nn.Tanh(), nn.Linear(h, h), nn.Tanh(), *pool, nn.Linear(h, 10))


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(64, 2, 128, dropout=0.0, batch_first=True)
    return nn.Sequential(layer, Mean(), nn.Linear(64, 10))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(192, 10)
    )


def measure(case: Case, vectors_of_case: Sequence[int], device: str, budget: float) -> Iterator[dict[str, Any]]:
    """A row for each n, kind of losses and T: expected and measured seconds of each method."""
    if device == "cpu":
        torch.empty(2**23 - 2**18)  # freed at once, see above
    net = case.make().eval().to(device)
    model = functional(net, [name for name, _ in net.named_parameters()], output_loss=F.cross_entropy)
    P = lissa.tree.numel(model.params)

    def of_examples(params: lissa.Params, batch: lissa.Batch) -> Tensor:
        return F.cross_entropy(functional_call(net, params, (batch[0],)), batch[1], reduction="none")

    for n in EXAMPLES[device]:
        x, y = case.inputs(n).to(device), torch.randint(2, (n,)).to(device)
        kinds = {
            "of examples": (of_examples, (x, y)),
            "of batches of one": (example_losses(model.loss_fn), (x.unsqueeze(1), y.unsqueeze(1))),
        }
        for (kind, (losses, stack)), T in itertools.product(kinds.items(), vectors_of_case):
            if T * P > MOST:
                continue
            vectors = {name: torch.randn(T, *p.shape).to(device) for name, p in model.params.items()}
            work = forward_work(losses, model.params, lissa.take(stack, slice(0, 1)))
            plan = plan_scoring(work, examples=n, vectors=T, parameters=P, device=device)
            score = partial(lissa.influence_scores, losses, model.params, vectors)
            parts = {method: lissa.take(stack, slice(0, size)) for method, size in plan.chunk_sizes.items()}
            found = torch.stack([score(part, method=method)[:, :1] for method, part in parts.items()])
            gap = float((found - found[0]).abs().max() / found[0].abs().max())
            calls: dict[str, Callable[[], Any]] = {
                method: partial(score, part, method=method) for method, part in parts.items()
            }
            times = least(calls, device, budget)
            seconds = {method: time_ * n / plan.chunk_sizes[method] for method, time_ in times.items()}
            yield {
                "case": case.name, "L": case.length, "P": P, "n": n, "T": T, "losses": kind, "gap": gap,
                "work": work._asdict(), "plan": plan.method, "chunks": plan.chunk_sizes, "expected": plan.seconds,
                "seconds": seconds,
            }  # fmt: skip


def least(calls: dict[str, Callable[[], Any]], device: str, budget: float) -> dict[str, float]:
    """Seconds of the quickest of several calls of each, in turn: more of those that take about as long."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for rounds in range(200):
        quickest = min(map(min, times.values())) if rounds else 0.0
        close = {
            name: min(values, default=0.0)
            for name, values in times.items()
            if rounds < 2 or min(values) < 1.4 * quickest
        }
        longer = 1 if len(close) == 1 else 5 if sorted(close.values())[1] < 1.15 * quickest else 2
        if rounds >= 4 and time.perf_counter() - start > budget * longer:
            break
        for name in close:
            before = clock(device)
            calls[name]()
            times[name].append(clock(device) - before)
    return {name: min(values) for name, values in times.items()}


def clock(device: str) -> float:
    """Processor seconds on a CPU, which others do not add to; wall seconds on a GPU that has done all it was to do."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def judged(rows: list[dict[str, Any]]) -> dict[str, float]:
    """How often the fastest method was picked, the worst choice, and how far the expected times are off, typically."""
    off = [abs(math.log(row["expected"][name] / row["seconds"][name])) for row in rows for name in row["seconds"]]
    return {
        "rows": len(rows),
        "picks_the_fastest": sum(row["times_the_best"] == 1 for row in rows) / len(rows),
        "within_5_percent": sum(row["times_the_best"] < 1.05 for row in rows) / len(rows),
        "second_within_5_percent": sum(second(row) < 1.05 for row in rows) / len(rows),
        "worst": max(row["times_the_best"] for row in rows),
        "expected_is_off_by": math.exp(statistics.median(off)),
    }


def second(row: dict[str, Any]) -> float:
    """How many times as long the second fastest takes as the fastest: near one, nobody can say which is which."""
    fastest, then, _ = sorted(row["seconds"].values())
    return then / fastest


def sweep(device: str, budget: float) -> Iterator[list[dict[str, Any]]]:
    """Rows of all cases, a list for each case, with the same numbers each time."""
    of_each = [("grid", case, VECTORS) for case in cases()]
    of_each += [("others", case, OTHER_VECTORS) for case in other_cases()]
    if device != "cpu":
        random.Random(0).shuffle(of_each)
    torch.manual_seed(0)
    for kind, case, vectors in of_each:
        print(case.name, "along", case.length, flush=True)
        yield [{"kind": kind, **row} for row in measure(case, vectors, device, budget)]


def swept_twice(device: str, limit_seconds: float) -> list[dict[str, Any]]:
    """Rows with the least times of two sweeps, or of as much of them as there is time for; written as they come."""
    stop = time.perf_counter() + limit_seconds
    rows: list[dict[str, Any]] = []
    for again in (False, True):
        done = 0
        for of_case in sweep(device, budget=0.1 if device == "cpu" else 0.03):
            if again:
                for row, then in zip(rows[done:], of_case, strict=False):
                    row["seconds"] = {name: min(times, then["seconds"][name]) for name, times in row["seconds"].items()}
            else:
                rows += of_case
            done += len(of_case)
            write(device, rows)
            if time.perf_counter() > stop:
                return rows
    return rows


def write(device: str, rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Writes what was measured, and returns what is made of it, by kind."""
    for row in rows:
        row["times_the_best"] = row["seconds"][row["plan"]] / min(row["seconds"].values())
    by_kind = {kind: [row for row in rows if row["kind"] == kind] for kind in ("grid", "others")}
    found = {kind: judged(some) for kind, some in by_kind.items() if some}
    record = {"environment": environment(), **found, "rows": by_kind}
    (RESULTS / f"scoring-{device}.json").write_text(json.dumps(record, indent=1) + "\n")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=tuple(EXAMPLES), default="cpu")
    parser.add_argument("--limit-seconds", type=float, default=math.inf, help="begin no case after so many")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with twice_differentiable():
        rows = swept_twice(arguments.device, arguments.limit_seconds)
    for row in rows:
        print(
            f"{row['case']:17} L={row['L']:3} P={row['P']:7} n={row['n']:5} T={row['T']:3} {row['losses']:17}: "
            + ", ".join(f"{method} {1e3 * seconds:.2f}" for method, seconds in row["seconds"].items())
            + f" ms, {row['plan']}, {row['times_the_best']:.2f}"
        )
    for kind, of_kind in write(arguments.device, rows).items():
        print(
            f"{kind}: {of_kind['rows']} cases, the fastest method in {of_kind['picks_the_fastest']:.1%}, one within 5% "
            f"of it in {of_kind['within_5_percent']:.1%}, at most {of_kind['worst']:.2f} times its time; the second is "
            f"within 5% in {of_kind['second_within_5_percent']:.1%}; expected times are off by a factor of "
            f"{of_kind['expected_is_off_by']:.2f} in the median"
        )
    different = [row for row in rows if not row["gap"] <= 1e-3]  # float32, whose sums of up to 80,000 terms may cancel
    if different:
        raise SystemExit(f"The methods differ: {different}")


if __name__ == "__main__":
    main()
