"""How accurate is each solver, at what cost? Relative error of the ihvp against the dense solve, over damping and B.

Wine, digits and MNIST 5k by softmax regression, digits by a small tanh MLP (Gauss-Newton). The costs are passes over
the data, all products counted, those of the tuning and of the looks at the residual too, and seconds.
"""

import time
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.accuracy.tasks import Counter, Task, digits, mnist_5k, small_mlp, softmax_regression, wine
from lissa import (
    batch_stream,
    choose_settings,
    mean_matvec,
    nystroem_preconditioner,
    solve_cg,
    solve_dense,
    solve_lissa,
    solve_minres,
    solve_tuned,
    take,
    tree,
)

DAMPINGS = (0.1, 0.01, 0.001)
BATCH_SIZES = (1, 16, 64)
CHUNK = 1000
RTOL = 1e-2
SMALL = 1000
"""Up to this many parameters the reference is the dense solve; beyond, CG to a residual of 1e-9."""


def run() -> dict:
    rows = []
    for task in tasks():
        for damping in DAMPINGS:
            rows += compare(task, damping)
    return {"rtol": RTOL, "rows": rows}


def tasks() -> list[Task]:
    train, test = mnist_5k()
    return [
        softmax_regression("wine", *wine(), l2=0.01),
        softmax_regression("digits", *digits(), l2=0.01),
        small_mlp("digits", *digits(), l2=0.01),
        softmax_regression("MNIST 5k", train, test, l2=0.01),
    ]


def compare(task: Task, damping: float) -> list[dict]:
    v = task.gradient((task.mistakes() or [0])[0])
    exact = reference(task, v, damping)
    rows = []
    for name, solve in solvers(task, v, damping).items():
        count = Counter(task)
        start = time.perf_counter()
        solution = solve(count)
        seconds = time.perf_counter() - start
        error = float(tree.norm(tree.sub(solution.value, exact)) / tree.norm(exact))
        row = {
            "task": task.name, "damping": damping, "solver": name, "error": error,
            "relative_residual": float(solution.relative_residual), "passes": count.passes, "seconds": seconds,
        }  # fmt: skip
        rows.append(row)
        print(
            f"{task.name}, damping {damping:g}, {name}: error {error:.1e}, residual {row['relative_residual']:.1e}, "
            f"{count.passes:.1f} passes, {seconds:.1f} s",
            flush=True,
        )
    return rows


def solvers(task: Task, v: dict, damping: float) -> dict[str, Callable[[Counter], object]]:
    """Each from a counted product on batches to a `Solution`."""

    def full(count: Counter) -> Callable[[dict], dict]:
        return mean_matvec(count, [take(task.train, slice(i, i + CHUNK)) for i in range(0, task.n, CHUNK)])

    def preconditioned(count: Counter):
        generator = torch.Generator().manual_seed(0)
        M = nystroem_preconditioner(full(count), v, damping=damping, generator=generator, rank=20)
        return solve_cg(full(count), v, damping=damping, rtol=RTOL, preconditioner=M)

    def lissa(count: Counter, B: int, tail: float):
        """With the settings that the tuning rule gives for this batch size, and the depth of the literature."""
        generator = torch.Generator().manual_seed(0)
        settings = choose_settings(
            count, v, task.train, damping=damping, generator=generator, batch_size=B, method="averaged"
        )
        steps = int(2.5 * settings.scale / damping)
        batches = batch_stream(task.train, B, generator=generator, drop_last=True)
        after = int(steps * (1 - tail)) if tail else None
        return solve_lissa(
            count, v, batches, damping=damping, scale=settings.scale, steps=steps, average_after=after,
            full_matvec=full(count), throw=False,
        )  # fmt: skip

    def tuned(count: Counter, method: str):
        generator = torch.Generator().manual_seed(0)
        settings = choose_settings(count, v, task.train, damping=damping, generator=generator, rtol=RTOL, method=method)
        return solve_tuned(
            count, v, task.train, damping=damping, generator=generator, rtol=RTOL, settings=settings, throw=False
        )

    chosen = {
        "CG": lambda count: solve_cg(full(count), v, damping=damping, rtol=RTOL),
        "CG, Nystroem preconditioner": preconditioned,
        "MINRES": lambda count: solve_minres(full(count), v, damping=damping, rtol=RTOL),
        "tuned": partial(tuned, method="auto"),
        "tuned LiSSA": partial(tuned, method="lissa"),
        "tuned variance-reduced LiSSA": partial(tuned, method="variance-reduced"),
    }
    if tree.numel(v) <= SMALL:
        chosen["dense"] = lambda count: solve_dense(full(count), v, damping=damping)
    for B in BATCH_SIZES:
        chosen[f"LiSSA, batch {B}, last iterate"] = partial(lissa, B=B, tail=0.0)
        chosen[f"LiSSA, batch {B}, mean of the second half"] = partial(lissa, B=B, tail=0.5)
    return chosen


def reference(task: Task, v: dict, damping: float) -> dict:
    full = mean_matvec(task.matvec, [take(task.train, slice(i, i + CHUNK)) for i in range(0, task.n, CHUNK)])
    if tree.numel(v) <= SMALL:
        return solve_dense(full, v, damping=damping).value
    return solve_cg(full, v, damping=damping, rtol=1e-9).value
