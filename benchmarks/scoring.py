"""Claim: the cost model of `lissa.scoring` picks the faster way to score in nine of ten cases, and is never far off.

Times jvp and per-example gradients, each with the chunks that the plan would give it, over a grid of models (linear,
MLP, linear layers along a sequence, embeddings, a transformer layer), sequence lengths L, numbers of training examples
n and of vectors T. Both must give the same scores first. One thread; both are timed in turn, and the least of several
times is taken, as others may use the machine. Where a chunk is one of many alike, one is timed.

    python -m benchmarks.scoring
"""

import itertools
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lissa
from benchmarks.timing import environment
from bridge.functional import example_losses, functional
from lissa.kernels import twice_differentiable
from lissa.scoring import forward_work, plan_scoring

RESULTS = Path(__file__).parent / "results"
EXAMPLES, VECTORS = (100, 1000), (1, 3, 10, 30, 100)
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


def mlp(h: int, *pool: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(64, h), nn.Tanh(), nn.Linear(h, h), nn.Tanh(), *pool, nn.Linear(h, 10))


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(64, 2, 128, dropout=0.0, batch_first=True)
    return nn.Sequential(layer, Mean(), nn.Linear(64, 10))


def measure(case: Case) -> Iterator[dict[str, Any]]:
    """A row for each n and T: expected and measured seconds of both methods."""
    net = case.make().eval()
    model = functional(net, [name for name, _ in net.named_parameters()], output_loss=F.cross_entropy)
    P, losses = lissa.tree.numel(model.params), example_losses(model.loss_fn)
    for n, T in itertools.product(EXAMPLES, VECTORS):
        if T * P > MOST:
            continue
        stack = (case.inputs(n).unsqueeze(1), torch.randint(10, (n, 1)))
        vectors = {name: torch.randn(T, *p.shape) for name, p in model.params.items()}
        work = forward_work(losses, model.params, lissa.take(stack, slice(0, 1)))
        plan = plan_scoring(work, examples=n, vectors=T, parameters=P)
        score = partial(lissa.influence_scores, losses, model.params, vectors)
        parts = {method: lissa.take(stack, slice(0, size)) for method, size in plan.chunk_sizes.items()}
        found = [score(part, method=method)[:, :1] for method, part in parts.items()]
        gap = float((found[0] - found[1]).abs().max() / found[0].abs().max())
        times = least({method: partial(score, part, method=method) for method, part in parts.items()})
        seconds = {method: time_ * n / plan.chunk_sizes[method] for method, time_ in times.items()}
        chosen = seconds[plan.method]
        yield {
            "case": case.name, "L": case.length, "P": P, "n": n, "T": T, "gap": gap, "plan": plan.method,
            "seconds": seconds, "times_the_best": chosen / min(seconds.values()),
        }  # fmt: skip


def least(calls: dict[str, Callable[[], Any]], budget: float = 0.3) -> dict[str, float]:
    """Seconds of the quickest of three to nine calls of each, in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for rounds in range(9):
        if rounds >= 3 and time.perf_counter() - start > budget:
            break
        for name, call in calls.items():
            before = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - before)
    return {name: min(values) for name, values in times.items()}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    with twice_differentiable():
        for case in cases():
            for row in measure(case):
                if row["gap"] > 1e-3:  # float32, whose sums of up to 80,000 terms may cancel
                    raise SystemExit(f"The methods differ: {row}")
                rows.append(row)
                jvp, gradients = (1e3 * seconds for seconds in row["seconds"].values())
                print(
                    f"{row['case']:15} L={row['L']:2} P={row['P']:6} n={row['n']:4} T={row['T']:3}: jvp {jvp:8.2f} ms, "
                    f"gradients {gradients:8.2f} ms, {row['plan']}, {row['times_the_best']:.2f}",
                    flush=True,
                )
    worst = max(row["times_the_best"] for row in rows)
    faster = sum(row["times_the_best"] == 1 for row in rows) / len(rows)
    print(f"{len(rows)} cases: the faster method in {faster:.1%}, at most {worst:.2f} times its time")
    record = {"environment": environment(), "picks_the_faster": faster, "worst": worst, "rows": rows}
    (RESULTS / "scoring-cpu.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
