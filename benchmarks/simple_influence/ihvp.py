"""Seconds until `(H + damping I)^-1 v` has a relative error of 1e-2: ours by itself, others at the best of a grid.

MNIST 5k (n = 4,000), damping 0.01, 100 gradients of test losses, float32, one thread: softmax regression with that L2
penalty, at its minimum, and a tanh MLP of 784-100-60-10 (P = 85,170), with its Gauss-Newton matrix, as its Hessian is
not definite. The error is the largest of all right-hand sides, against block CG to a residual of 1e-5, which is
compared with plain CG first. Times are processor seconds. Ours is `lissa.solve_tuned_stacked` with nothing set but the
damping, choice of the method and estimates included; of others the search for their setting is left out. Tools that
solve for one right-hand side after the other are timed on a few, and count in proportion.

Each tool runs in a process of its own. A tool that is missing is left out:

    pip install --no-deps allennlp==2.10.1 mlxtend==0.25.0 captum==0.9.0 pyDVL==0.10.0 dattri==0.3.0 \\
        curvlinops-for-pytorch==3.0.1    (and what they import; none needs torchvision for this)
    python -m benchmarks.simple_influence.ihvp
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import bridge
import lissa
from benchmarks.accuracy import tasks
from benchmarks.simple_influence import ihvp_peers
from benchmarks.simple_influence.problem import AIM, TESTS, Problem, Run, alone, memory, timed, with_answers
from benchmarks.timing import environment
from lissa import Params, tree

RESULTS = Path(__file__).parents[1] / "results"
DAMPING = 1e-2


def softmax_regression(name: str) -> Problem:
    train, test = ((x.float(), y) for x, y in tasks.mnist_5k())
    task = tasks.softmax_regression("MNIST 5k", train, test, DAMPING, tolerance=1e-4)
    model = nn.Linear(784, 10, bias=False)
    with torch.no_grad():
        model.weight.copy_(task.params["weight"].T)
    return with_answers(name, model, train, test, DAMPING)


def mlp(name: str) -> Problem:
    train, test = ((x.float(), y) for x, y in tasks.mnist_5k())
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 100), nn.Tanh(), nn.Linear(100, 60), nn.Tanh(), nn.Linear(60, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(10):
        for index in torch.randperm(len(train[1])).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(train[0][index]), train[1][index]).backward()
            optimizer.step()
    return with_answers(name, model, train, test, DAMPING)


def ours(problem: Problem) -> Iterator[Run]:
    """Nothing set but the damping: spectrum, choice of the method, solve and check are on the clock."""
    matvec = lissa.traced(problem.matvec)
    vectors = torch.vmap(problem.unflatten)(problem.rhs)

    def solve() -> Params:
        generator = torch.Generator().manual_seed(0)
        return lissa.solve_tuned_stacked(
            matvec, vectors, problem.train, damping=problem.damping, generator=generator
        ).value

    first, _ = timed(solve)
    seconds, x = timed(solve)
    yield Run("by itself", first - seconds, seconds, problem.error(torch.vmap(tree.flatten)(x)), TESTS)


def ours_by_the_bridge(problem: Problem) -> Iterator[Run]:
    """`bridge.SimpleInfluence(solver="auto")`, from the model and the instances, the gradients on the clock too."""
    if "Gauss-Newton" in problem.name:
        return

    def solve() -> Params:
        train, test = (list(zip(*data, strict=True)) for data in (problem.train, problem.test))
        influence = bridge.SimpleInfluence.from_dataset(
            problem.model, train, loss_fn=F.cross_entropy, solver="auto", ridge=problem.damping, progress=False
        )
        return influence.inverse_hvps(test)

    first, _ = timed(solve)
    seconds, x = timed(solve)
    yield Run("by itself", first - seconds, seconds, problem.error(torch.vmap(tree.flatten)(x)), TESTS)


def ours_cg(problem: Problem) -> Iterator[Run]:
    """One Krylov space for each, in step."""
    product = partial(lissa.traced(problem.matvec), problem.train)
    vectors = torch.vmap(problem.unflatten)(problem.rhs)
    warm_up = timed(lambda: torch.vmap(product)(vectors))[0]

    def solvers() -> ihvp_peers.Solvers:
        for rtol in (1e-2, 7e-3, 5e-3):
            solve = partial(lissa.solve_cg, product, damping=problem.damping, rtol=rtol)
            yield f"rtol {rtol:g}", lambda solve=solve: torch.vmap(lambda v: tree.flatten(solve(v).value))(vectors)

    yield from ihvp_peers.until_reached(problem, solvers(), warm_up)


PROBLEMS: dict[str, Callable[[str], Problem]] = {
    "softmax regression, P = 7,840": softmax_regression,
    "MLP, P = 85,170, Gauss-Newton": mlp,
}
OURS = "ours"
TOOLS: dict[str, Callable[[Problem], Iterator[Run]]] = {
    OURS: ours,
    "ours, bridge, solver='auto'": ours_by_the_bridge,
    "ours, plain CG": ours_cg,
    **ihvp_peers.TOOLS,
}


def measure(problem: Problem, tool: str) -> dict[str, Any]:
    """All settings of a tool until the aim is reached, the best of them, and the memory it took beyond the problem."""
    runs: list[Run] = []
    with memory() as peak:
        for run in TOOLS[tool](problem):
            runs.append(run)
            print(f"{problem.name}, {tool}: {run.in_words()}", file=sys.stderr, flush=True)
    reached = [run for run in runs if run.error <= AIM]
    best = min(reached, key=lambda run: run.seconds) if reached else min(runs, key=lambda run: run.error, default=None)
    return {
        "best": best and best._asdict(),
        "reached": bool(reached),
        "runs": [run._asdict() for run in runs],
        "peak_bytes": peak[0],
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| problem | tool | best setting | seconds | times ours | error | warm-up | peak memory | timed on |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        best = row.get("best")
        head = f"| {row['problem']} | {row['tool']} "
        if not best:
            lines.append(head + f"| {row['failure']} | - | - | - | - | - | - |")
            continue
        mine = next((r["best"] for r in rows if r["problem"] == row["problem"] and r["tool"] == OURS), None)
        ratio = best["seconds"] / mine["seconds"] if mine else float("nan")
        error = f"{best['error']:.1e}" + ("" if row["reached"] else ", not reached")
        lines.append(
            head + f"| {best['setting']} | {best['seconds']:.2f} | {ratio:.1f} | {error} | {best['warm_up']:.2f} s "
            f"| {row['peak_bytes'] / 1e6:.0f} MB | {best['timed']} of {TESTS} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """The error over the seconds of every run, a line for each tool."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    problems = list(dict.fromkeys(row["problem"] for row in rows))
    figure, panels = plt.subplots(1, len(problems), figsize=(5 * len(problems), 4), sharey=True, squeeze=False)
    colours = {tool: f"C{i % 10}" for i, tool in enumerate(TOOLS)}
    for axes, problem in zip(panels[0], problems, strict=True):
        for row in (row for row in rows if row["problem"] == problem and row.get("runs")):
            runs = sorted(row["runs"], key=lambda run: run["seconds"])
            later = list(TOOLS).index(row["tool"]) >= 10  # colours come again
            marker = "*" if row["tool"] == OURS else "s" if later else "o"
            seconds, errors = [run["seconds"] for run in runs], [min(run["error"], 2.0) for run in runs]
            axes.loglog(seconds, errors, marker, color=colours[row["tool"]], label=row["tool"])
        axes.axhline(AIM, color="0.6", linewidth=1)
        axes.set(xlabel="processor seconds, 100 right-hand sides", title=problem)
    panels[0][0].set_ylabel("largest relative error")
    panels[0][0].legend(fontsize="xx-small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simple_influence.ihvp", description=__doc__)
    parser.add_argument("--problem", default="", help="problems whose name contains this; rows of others are kept")
    parser.add_argument("--only", default="", help="tools whose name contains this; rows of others are kept")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    problems = [name for name in PROBLEMS if arguments.problem in name]
    tools = [tool for tool in TOOLS if arguments.only in tool]
    if not problems or not tools:
        parser.error(f"nothing has that name; problems are {'; '.join(PROBLEMS)}, and tools are {'; '.join(TOOLS)}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "simple-influence-ihvp-cpu.json"
    known = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = {(row["problem"], row["tool"]): row for row in known}
    for name in problems:
        problem = PROBLEMS[name](name)
        for tool in tools:
            rows[name, tool] = {"problem": name, "tool": tool, **alone(measure, problem, tool)}
            keep(rows, path)
    print(path.with_suffix(".md").read_text())


def keep(rows: dict[tuple[str, str], dict[str, Any]], path: Path) -> None:
    """Writes what is measured so far."""
    keys = [(name, tool) for name in PROBLEMS for tool in TOOLS if rows.get((name, tool), {}).get("runs") != []]
    kept = [rows[key] for key in keys if key in rows]
    path.write_text(json.dumps({"environment": environment(), "rows": kept}, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(kept) + "\n")
    plot(kept, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
