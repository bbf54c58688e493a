"""The whole job, scores of n = 1,000 training examples for T tests and the top 20, by every tool and by the bridge.

MNIST, softmax regression and an MLP of 784-100-60-10 with its Gauss-Newton matrix, damping 0.01, float32, one thread.
First the error: the largest of |scores - right scores| / |right scores| of a test, against a solve to a residual of
1e-5. Each tool has settings that aim at 1e-2; captum's approximation has a low rank and does not get there. Then the
processor seconds of the first call with so many tests and of a later one, and the peak memory above what the data take.
What solves for one test after the other is timed on three, and counts in proportion.

Each tool runs in a process of its own; one that is missing is left out, see `benchmarks.simple_influence.ihvp`.

    python -m benchmarks.simple_influence.peers
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.utils.data import DataLoader, TensorDataset

import bridge
import lissa
from benchmarks.accuracy import tasks
from benchmarks.simple_influence.ihvp_peers import FEW, convex
from benchmarks.simple_influence.problem import Problem, alone, memory, timed, with_answers
from benchmarks.timing import environment
from lissa import tree

RESULTS = Path(__file__).parents[1] / "results"
DAMPING, RTOL = 1e-2, 1e-2
TRAIN, K = 1000, 20

Job = Callable[[int], Tensor]
"""`job(T) -> (T, n)`: the scores for the first T tests, everything done anew."""


def softmax_regression(name: str) -> Problem:
    return trained(name, nn.Linear(784, 10), steps=300)


def mlp(name: str) -> Problem:
    model = nn.Sequential(nn.Linear(784, 100), nn.Tanh(), nn.Linear(100, 60), nn.Tanh(), nn.Linear(60, 10))
    return trained(name, model, steps=100)


def trained(name: str, model: nn.Module, steps: int) -> Problem:
    """As `workloads.digits` trains them."""
    train, test = ((x.float(), y) for x, y in tasks.mnist_5k())
    train = lissa.take(train, slice(0, TRAIN))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(train[0]), train[1]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return with_answers(name, model, train, test, DAMPING)


def by_the_bridge(problem: Problem, solver: str) -> Job:
    """The MLP as others get it, with its outputs linearised."""
    model = convex(problem)
    train, test = (list(zip(*data, strict=True)) for data in (problem.train, problem.test))

    def job(tests: int) -> Tensor:
        influence = bridge.SimpleInfluence.from_dataset(
            model, train, loss_fn=F.cross_entropy, solver=solver, ridge=problem.damping, rtol=RTOL, progress=False
        )
        return influence.scores(test[:tests])

    return job


def pydvl(problem: Problem) -> Job:
    """Block CG, whose tolerance is `rtol^2 |v|`."""
    from pydvl.influence.torch import CgInfluence

    model = convex(problem)

    def job(tests: int) -> Tensor:
        influence = CgInfluence(
            model, F.cross_entropy, problem.damping, rtol=RTOL**0.5, atol=1e-8, solve_simultaneously=True
        )
        influence.fit(DataLoader(TensorDataset(*problem.train), batch_size=TRAIN))
        x, y = (t[:tests] for t in problem.test)
        return influence.influences(x, y, *problem.train)

    return job


def dattri(problem: Problem) -> Job:
    """CG of as many steps as the aim needs."""
    from dattri.algorithm.influence_function import IFAttributorCG
    from dattri.task import AttributionTask

    model = convex(problem)

    def loss(params: Any, batch: Any) -> Tensor:
        return F.cross_entropy(functional_call(model, params, (batch[0],)), batch[1])

    def job(tests: int) -> Tensor:
        task = AttributionTask(loss, model, {k: p.detach() for k, p in model.named_parameters()})
        attributor = IFAttributorCG(task, max_iter=25, regularization=problem.damping)
        loaders = [
            DataLoader(TensorDataset(*data), batch_size=len(data[0]))
            for data in (problem.train, tuple(t[:tests] for t in problem.test))
        ]
        attributor.cache(loaders[0])
        return attributor.attribute(*loaders).mT

    return job


def captum(problem: Problem) -> Job:
    """Its defaults, a rank of 50 from 200 products; divided by n, as its Hessian is that of the sum."""
    from captum.influence._core.arnoldi_influence_function import ArnoldiInfluenceFunction

    def job(tests: int) -> Tensor:
        influence = ArnoldiInfluenceFunction(
            convex(problem), TensorDataset(*problem.train), "", lambda *_: 1.0, batch_size=TRAIN,
            loss_fn=nn.CrossEntropyLoss(reduction="none"), hessian_reg=TRAIN * problem.damping,
        )  # fmt: skip
        return TRAIN * influence.influence(tuple(t[:tests] for t in problem.test))

    return job


def curvlinops(problem: Problem) -> Job:
    """Its CG, and gradients and scores by `torch.func`."""
    from curvlinops import CGInverseLinearOperator, GGNLinearOperator
    from curvlinops.examples import IdentityLinearOperator

    params = list(problem.model.parameters())

    def gradients(data: tuple[Tensor, ...]) -> Tensor:
        def loss(params: Any, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(functional_call(problem.model, params, (x,)), y)

        found = torch.vmap(grad(loss), in_dims=(None, 0, 0))(problem.params, *data)
        return torch.cat([t.flatten(1) for t in found.values()], 1)

    def job(tests: int) -> Tensor:
        G = GGNLinearOperator(problem.model, nn.CrossEntropyLoss(), params, [problem.train], check_deterministic=False)
        identity = IdentityLinearOperator([tuple(p.shape) for p in params], problem.rhs.device, problem.rhs.dtype)
        inverse = CGInverseLinearOperator(
            G + problem.damping * identity, tolerance=RTOL, eps=0, max_iter=200, max_tridiag_iter=0
        )
        x = inverse @ gradients(tuple(t[:tests] for t in problem.test)).mT.contiguous()
        return (gradients(problem.train) @ x).mT

    return job


def hand_written(problem: Problem) -> Job:
    """What tutorials have: for each test LiSSA by double backward, here on full batches, and a gradient an example."""
    model, (x, y) = convex(problem), problem.train
    params = list(model.parameters())

    def gradient(x: Tensor, y: Tensor, create_graph: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(F.cross_entropy(model(x), y), params, create_graph=create_graph)

    full = partial(lissa.traced(problem.matvec), problem.train)
    largest = lissa.largest_eigenvalue(full, problem.params, generator=torch.Generator().manual_seed(0))
    scale = 0.55 * (float(largest) + problem.damping)
    c = problem.damping / scale
    steps = int(4.6 / c)  # ln(100) times those of the slowest mode

    def job(tests: int) -> Tensor:
        ihvps = []
        for k in range(tests):
            v = h = gradient(problem.test[0][k : k + 1], problem.test[1][k : k + 1])
            for _ in range(steps):
                grads = gradient(x, y, create_graph=True)
                products = torch.autograd.grad(sum((g * h).sum() for g, h in zip(grads, h, strict=True)), params)
                h = [
                    v + (1 - problem.damping / scale) * h - H_h / scale
                    for v, h, H_h in zip(v, h, products, strict=True)
                ]
            ihvps.append(torch.cat([t.flatten() for t in h]) / scale)
        rows = [torch.cat([t.flatten() for t in gradient(x[i : i + 1], y[i : i + 1])]) for i in range(len(y))]
        return torch.stack([torch.stack([row @ ihvp for row in rows]) for ihvp in ihvps])

    return job


WORKLOADS: dict[str, Callable[[str], Problem]] = {
    "softmax regression, P = 7,850": softmax_regression,
    "MLP, P = 85,170, Gauss-Newton": mlp,
}
TOOLS: dict[str, Callable[[Problem], Job]] = {
    "bridge, solver='auto'": partial(by_the_bridge, solver="auto"),
    "bridge, solver='cg'": partial(by_the_bridge, solver="cg"),
    "pyDVL, block CG": pydvl,
    "dattri, CG": dattri,
    "curvlinops, CG": curvlinops,
    "captum, Arnoldi": captum,
    "hand-written loop": hand_written,
}
OURS = "bridge, solver='auto'"


def measure(problem: Problem, tool: str, counts: list[int]) -> dict[str, Any]:
    """The runs of a tool, one for each number of tests, from its own first call on."""
    job, runs = TOOLS[tool](problem), []
    gradients = torch.vmap(tree.flatten)(
        lissa.per_example_gradients(problem.example_loss_fn, problem.params, problem.train)
    )
    right = problem.right @ gradients.mT
    for tests in counts:
        done = min(tests, FEW) if tool == "hand-written loop" else tests

        def call(done: int = done) -> Tensor:
            scores = job(done).detach()
            scores.topk(K, dim=1)
            return scores

        with memory() as peak:
            first, scores = timed(call)
        error = float(((scores - right[:done]).norm(dim=1) / right[:done].norm(dim=1)).max())
        seconds = timed(call)[0]
        share = tests / done
        runs.append(
            {
                "tests": tests, "error": error, "first_seconds": first * share, "seconds": seconds * share,
                "peak_bytes": peak[0], "timed": done,
            }
        )  # fmt: skip
        print(f"{problem.name}, {tool}, {tests} tests: {seconds * share:.2f} s, error {error:.1e}", file=sys.stderr)
    return {"runs": runs}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| workload | tests | tool | error of scores | first call | later call | times ours | peak memory |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in WORKLOADS:
        here = [row for row in rows if row["workload"] == name]
        lines += [
            f"| {name} | - | {row['tool']} | {row['failure']} | - | - | - | - |" for row in here if "failure" in row
        ]
        found = [(row["tool"], run) for row in here for run in row.get("runs", [])]
        ours = {run["tests"]: run["seconds"] for tool, run in found if tool == OURS}
        for tool, run in sorted(found, key=lambda pair: pair[1]["tests"]):
            ratio = run["seconds"] / ours.get(run["tests"], float("nan"))
            note = f" (timed on {run['timed']})" if run["timed"] < run["tests"] else ""
            lines.append(
                f"| {name} | {run['tests']} | {tool} | {run['error']:.1e} | {run['first_seconds']:.2f} s "
                f"| {run['seconds']:.2f} s{note} | {ratio:.1f} | {run['peak_bytes'] / 1e6:.0f} MB |"
            )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds over the number of tests, a line for each tool."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(WORKLOADS), figsize=(10, 4), sharey=True)
    for axes, name in zip(panels, WORKLOADS, strict=True):
        for i, tool in enumerate(TOOLS):
            runs = [
                run for row in rows if (row["workload"], row["tool"]) == (name, tool) for run in row.get("runs", [])
            ]
            style = "*-" if tool == OURS else "o-"
            axes.loglog([r["tests"] for r in runs], [r["seconds"] for r in runs], style, color=f"C{i}", label=tool)
        axes.set(xlabel="tests", title=f"{name}, n = 1,000")
    panels[0].set_ylabel("processor seconds")
    panels[0].legend(fontsize="xx-small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simple_influence.peers", description=__doc__)
    parser.add_argument("--workload", default="", help="workloads whose name contains this; rows of others are kept")
    parser.add_argument("--only", default="", help="tools whose name contains this; rows of others are kept")
    parser.add_argument("--tests", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "simple-influence-peers-cpu.json"
    known = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = {(row["workload"], row["tool"]): row for row in known}
    for name, make in WORKLOADS.items():
        if arguments.workload not in name:
            continue
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            problem = make(name)
        for tool in TOOLS:
            if arguments.only in tool:
                rows[name, tool] = {"workload": name, "tool": tool, **alone(measure, problem, tool, arguments.tests)}
                kept = [rows[name, tool] for name in WORKLOADS for tool in TOOLS if (name, tool) in rows]
                path.write_text(json.dumps({"environment": environment(), "rows": kept}, indent=1) + "\n")
                path.with_suffix(".md").write_text(table(kept) + "\n")
                plot(kept, path.with_suffix(".png"))
    print(path.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
