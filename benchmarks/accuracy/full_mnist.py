"""Passes over the data until the inverse-Hessian-vector product is right to 10% and to 1%, for three solvers.

MNIST, n = 55,000, softmax regression, L2 0.01, one misclassified test digit. Nothing is set but the damping. The passes
of the tuned solver include its estimate of the spectrum. The first epoch of the tuned solver is averaged LiSSA: its
answer is there before the first look at all the data.
"""

import time
from functools import partial
from pathlib import Path

import torch

from benchmarks.accuracy.tasks import Counter, Task, full_mnist, softmax_regression
from lissa import (
    batch_stream,
    choose_settings,
    lissa_init,
    lissa_update,
    mean_matvec,
    solve_cg,
    solve_lissa,
    solve_svrg,
    tree,
)
from lissa.sampling import take


def run(folder: Path, digits: int = 3, seeds: int = 3) -> dict:
    train, test = full_mnist(folder)
    task = softmax_regression("MNIST 55,000", train, test, l2=0.01, tolerance=3e-6)
    rows = []
    for digit in task.mistakes()[:digits]:
        exact, cg = references(task, digit)
        for seed in range(seeds):
            row = one(task, digit, seed, exact) | {"cg": cg, "cg_10": first(cg, 0.1), "cg_1": first(cg, 0.01)}
            rows.append(row)
            print(in_words(row), flush=True)
    return {"n": task.n, "damping": task.l2, "rows": rows}


def in_words(row: dict) -> str:
    return (
        f"digit {row['digit']} seed {row['seed']}: averaged LiSSA {row['averaged'][1]:.3f} after "
        f"{row['averaged'][0]:.2f} passes; tuned LiSSA 1% after {row['tuned_1']:.2f} passes "
        f"({row['seconds']:.1f} s); CG 10% after {row['cg_10']}, 1% after {row['cg_1']}; plain LiSSA best "
        f"{min(e for _, e in row['plain']):.3f} in {row['plain'][-1][0]:.1f} passes"
    )


def references(task: Task, digit: int) -> tuple[dict, list]:
    """The solution, and the error of CG after some numbers of passes."""
    v = task.gradient(digit)
    exact = reference(task, v)
    return exact, [(steps, distance(cg_after(task, v, steps), exact)) for steps in (12, 15, 18, 21, 24, 27)]


def distance(x: dict, exact: dict) -> float:
    return float(tree.norm(tree.sub(x, exact)) / tree.norm(exact))


def one(task: Task, digit: int, seed: int, exact: dict) -> dict:
    v = task.gradient(digit)
    error = partial(distance, exact=exact)
    count = Counter(task)
    generator = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    settings = choose_settings(count, v, task.train, damping=task.l2, generator=generator)
    tuning = count.passes
    averaged = solve_lissa(
        count, v, batch_stream(task.train, settings.batch_size, generator=generator, drop_last=True),
        damping=task.l2, scale=settings.scale, steps=settings.steps, average_after=settings.average_after,
    )  # fmt: skip
    averaged_row = (count.passes, error(averaged.value))
    count.examples = round(tuning * task.n)
    generator = torch.Generator().manual_seed(seed)
    full = mean_matvec(count, rows(task))
    batches = batch_stream(task.train, settings.batch_size, generator=generator, drop_last=True)
    x, tuned = None, []
    seconds = 0.0
    # Epoch by epoch, so that the error can be looked at between them; the tuned solver runs the same epochs.
    for _ in range(4):
        solution = solve_svrg(
            count, v, batches, full_matvec=full, inner_steps=settings.steps, damping=task.l2, scale=settings.scale,
            average_after=settings.average_after, epochs=1, rtol=settings.rtol, x=x,
        )  # fmt: skip
        extra = 0 if x is None else 1  # restarting computes the residual anew, which one long call need not
        x = solution.value
        task_passes = count.passes - extra * (len(tuned))
        tuned.append((task_passes, error(x), float(solution.relative_residual)))
        seconds = time.perf_counter() - start
        if solution.status == 1:
            break
    return {
        "digit": digit, "seed": seed, "settings": settings._asdict(), "tuning_passes": tuning, "tuned": tuned,
        "seconds": seconds, "averaged": averaged_row, "tuned_1": first(tuned, 0.01),
        "plain": plain(task, v, error, seed),
    }  # fmt: skip


def plain(task: Task, v: dict, error, seed: int) -> list:
    """The last iterate of batch-64 LiSSA at scale 2.6, every 0.5 passes."""
    batches = batch_stream(task.train, 64, generator=torch.Generator().manual_seed(seed), drop_last=True)
    state, out, every = lissa_init(v), [], task.n // 128
    for t in range(1, 12 * every + 1):
        state = lissa_update(task.matvec, v, state, next(batches), damping=task.l2, scale=2.6)
        if t % every == 0:
            out.append((t * 64 / task.n, error(tree.scale(1 / 2.6, state.h))))
    return out


def reference(task: Task, v: dict) -> dict:
    double = tree.map(torch.Tensor.double, task.params)
    data = (task.train[0].double(), task.train[1])
    exact = task._replace(params=double, train=data)
    solution = solve_cg(
        mean_matvec(exact.matvec, rows(exact)), tree.map(torch.Tensor.double, v), damping=task.l2, rtol=1e-7
    )
    return tree.map(torch.Tensor.float, solution.value)


def cg_after(task: Task, v: dict, steps: int) -> dict:
    return solve_cg(mean_matvec(task.matvec, rows(task)), v, damping=task.l2, rtol=1e-9, steps=steps).value


def rows(task: Task) -> list:
    return [take(task.train, slice(i, i + 5000)) for i in range(0, task.n, 5000)]


def first(curve: list, target: float) -> float:
    return next((row[0] for row in curve if row[1] <= target), float("inf"))
