"""The LiSSA stability map: which scales bear which batch sizes, with the predicted boundary drawn in.

The prediction is `(lambda_max + damping + trace / B) / 2`. The boundary is measured as the scale at which the squared
distance of the iterates to the solution neither grows nor shrinks in the long run, by bisection.
"""

import math

import torch

from benchmarks.accuracy.tasks import Task
from lissa import batch_stream, estimate_spectrum, lissa_update, mean_matvec, tree
from lissa.recursion import LissaState
from lissa.sampling import take

BATCH_SIZES = (1, 4, 16, 64)


def run(task: Task, runs: int = 8, steps: int = 600) -> dict:
    full = mean_matvec(task.matvec, [take(task.train, slice(i, i + 1000)) for i in range(0, task.n, 1000)])
    found = estimate_spectrum(full, task.params, generator=torch.Generator().manual_seed(0))
    largest, trace = float(found.largest), float(found.trace)
    rows = []
    for B in BATCH_SIZES:
        predicted = (largest + task.l2 + trace / B) / 2
        low, high = predicted / 4, predicted * 4
        for _ in range(7):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if growth(task, B, middle, runs, steps) > 0 else (low, middle)
        measured = math.sqrt(low * high)
        rows.append({"batch_size": B, "predicted": predicted, "measured": measured, "ratio": measured / predicted})
        print(f"B = {B}: predicted {predicted:.2f}, measured {measured:.2f}, ratio {measured / predicted:.2f}")
    return {"task": task.name, "lambda_max": largest, "trace": trace, "damping": task.l2, "rows": rows}


def growth(task: Task, B: int, scale: float, runs: int, steps: int) -> float:
    """The mean growth, a step, of the logarithm of the mean square of the homogeneous recursion.

    With right-hand side 0 the iterates are the distance to the solution. They are rescaled on the way, so that none
    overflows, over `runs` of them with batches of their own.
    """
    zero = tree.zeros_like(task.params)
    generator = torch.Generator().manual_seed(B)
    batches = batch_stream(task.train, B, generator=generator, replacement=True)
    starts = [tree.normal_like(zero, generator=generator) for _ in range(runs)]
    none = torch.zeros(())
    log_squares = []
    for h in starts:
        h = tree.scale(1 / tree.norm(h), h)
        log, curve = torch.zeros(()), []
        for _ in range(steps):
            state = LissaState(h, none, none)
            h = lissa_update(task.matvec, zero, state, next(batches), damping=task.l2, scale=scale).h
            size = tree.norm(h)
            log, h = log + 2 * torch.log(size), tree.scale(1 / size, h)
            curve.append(float(log))
        log_squares.append(curve)
    mean = torch.logsumexp(torch.tensor(log_squares), 0)
    return float(mean[-1] - mean[steps // 4]) / (steps - steps // 4)
