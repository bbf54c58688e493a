"""The LiSSA stability map: which scales bear which batch sizes, with the predicted boundary drawn in.

The prediction is `(lambda_max + damping + trace / B) / 2`. Three boundaries are measured beside it:

- safe: the least scale from which on no run is ever worse than the answer 0 once it has settled (its relative error
  stays below 1 from three quarters of `2.5 scale / damping` steps on), over all right-hand sides, streams and steps;
- typical: where the root mean square of those errors is 1;
- mean square: where the mean square error of infinitely many runs on independent batches stops shrinking. With
  `A_t = H_t + damping I` that is `max_S E tr(S A_t S A_t) / (2 tr(S S A))` over positive semidefinite S, by L-BFGS on a
  factor of S of fixed rank: a lower bound that is close to the maximum, and exact in the limit of full rank.

The middle one feels rare batches only if a run meets them; the last one counts them all. The runs are made three times,
each with other right-hand sides and streams.
"""

import itertools
import math

import torch
from torch import Tensor

from benchmarks.accuracy.tasks import Task
from lissa import LissaState, estimate_spectrum, index_stream, lissa_update, mean_matvec, solve_cg, take, tree

BATCH_SIZES = (1, 4, 16, 64)
FACTORS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.5, 1.75, 2.0)
"""Scales, in units of the predicted boundary."""

DIGITS, STREAMS, REPLICATES = 4, 8, 3
LOOK = 20
RANKS = (24, 96)


def run(task: Task) -> dict:
    full = mean_matvec(task.matvec, [take(task.train, slice(i, i + 1000)) for i in range(0, task.n, 1000)])
    found = estimate_spectrum(full, task.params, generator=torch.Generator().manual_seed(0))
    largest, trace = float(found.largest), float(found.trace)
    rows = []
    for replicate, B in itertools.product(range(REPLICATES), BATCH_SIZES):
        vectors = [task.gradient(digit) for digit in task.mistakes()[replicate * DIGITS :][:DIGITS]]
        exact = [solve_cg(full, v, damping=task.l2, rtol=1e-4).value for v in vectors]
        predicted = (largest + task.l2 + trace / B) / 2
        seeds = range(replicate * STREAMS, (replicate + 1) * STREAMS)
        typical, worst = errors(task, vectors, exact, B, [f * predicted for f in FACTORS], seeds)
        row = {
            "batch_size": B, "replicate": replicate, "predicted": predicted, "factors": FACTORS, "rms_error": typical,
            "worst_error": worst, "safe": crossing(worst), "typical": crossing(typical),
        }  # fmt: skip
        if replicate == 0:
            row["mean_square"] = mean_square(task, B) / predicted
        rows.append(row)
        print(
            f"B = {B}, replicate {replicate}: predicted {predicted:.2f}; measured, over predicted: "
            + ", ".join(f"{name} {row[name]:.2f}" for name in ("safe", "typical", "mean_square") if name in row),
            flush=True,
        )
    return {"task": task.name, "lambda_max": largest, "trace": trace, "damping": task.l2, "rows": rows}


def errors(
    task: Task, vectors: list[dict], exact: list[dict], B: int, scales: list[float], seeds: range
) -> tuple[list[float], list[float]]:
    """Root mean square and largest relative error at each scale; all scales and vectors share each stream's batches."""
    x = task.train[0]
    p = torch.softmax(x @ task.params["weight"], 1)
    streams = [index_stream(task.n, B, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    # Shapes: (streams, features, scales, vectors, classes).
    v, solution = (torch.stack([t["weight"] for t in ts], 1)[None, :, None] for ts in (vectors, exact))
    scale = torch.tensor(scales, dtype=x.dtype)[None, None, :, None, None]
    steps = [int(2.5 * s / task.l2) for s in scales]

    def matvec(index: Tensor, h: dict) -> dict:
        rows, q = x[index], p[index][:, :, None, None]
        z = torch.einsum("rbf,rfskc->rbskc", rows, h["weight"])
        z = q * (z - (q * z).sum(-1, keepdim=True))
        return {"weight": torch.einsum("rbf,rbskc->rfskc", rows, z) / index.shape[1]}

    none = torch.zeros(())
    state = LissaState({"weight": v.expand(STREAMS, -1, len(scales), -1, -1)}, none, none)
    squares: list[list[Tensor]] = [[] for _ in scales]
    for t in range(1, max(steps) + 1):
        # A pass ends with a shorter batch for all streams at the same step.
        batch = torch.stack([next(stream) for stream in streams])
        state = lissa_update(matvec, {"weight": v}, state, batch, damping=task.l2, scale=scale)
        if t % LOOK == 0:
            state = state._replace(h=tree.map(lambda h: h.clamp(-1e12, 1e12), state.h))  # far beyond use, but finite
            square = (state.h["weight"] / scale - solution).square().sum((1, 4)) / solution.square().sum((1, 4))
            for s, T in enumerate(steps):
                if 3 * T / 4 < t <= T:
                    squares[s].append(square[:, s])
    stacked = [torch.stack(each) for each in squares]
    return [float(each.mean().sqrt()) for each in stacked], [float(each.max().sqrt()) for each in stacked]


def crossing(values: list[float]) -> float:
    """The factor at which the curve comes down through 1 for good, between factors by a straight line in logarithms."""
    above = [i for i, value in enumerate(values) if value >= 1]
    if not above:
        return FACTORS[0]
    if above[-1] == len(values) - 1:
        return math.inf
    (f0, e0), (f1, e1) = ((math.log(FACTORS[i]), math.log(values[i])) for i in (above[-1], above[-1] + 1))
    return math.exp(f0 + (f1 - f0) * e0 / (e0 - e1))


def mean_square(task: Task, B: int) -> float:
    """The scale below which the mean square error grows: `max_S E tr(S A_t S A_t) / (2 tr(S S A))` with `S = Z Z^T`."""
    used = task.train[0].abs().amax(0) > 0
    x, W = task.train[0][:, used], task.params["weight"]
    p = torch.softmax(task.train[0] @ W, 1)
    D = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    n, features, classes, damping = len(x), x.shape[1], W.shape[1], task.l2

    def quotient(Z: Tensor) -> Tensor:
        rank = Z.shape[-1]
        Y = (x @ Z.reshape(features, -1)).reshape(n, classes, rank)
        D_Y = D @ Y
        C = D_Y @ Y.mT
        one_example = (C * C.mT).sum() / n  # the mean of tr(S H_i S H_i)
        Z_H_Z = Y.reshape(-1, rank).mT @ D_Y.reshape(-1, rank) / n
        Z_Z = Z.reshape(-1, rank).mT @ Z.reshape(-1, rank)
        square = Z_H_Z.square().sum()  # tr(S H S H)
        numerator = damping**2 * Z_Z.square().sum() + 2 * damping * (Z_Z * Z_H_Z).sum()
        numerator = numerator + (1 - 1 / B) * square + one_example / B
        return numerator / (2 * (Z_Z * (Z_H_Z + damping * Z_Z)).sum())

    generator = torch.Generator().manual_seed(0)
    Z = torch.zeros(features, classes, 0)
    for rank in RANKS:
        new = torch.randn(features, classes, rank - Z.shape[-1], generator=generator)
        Z = torch.cat([Z, new / new.norm()], -1).requires_grad_()
        optimizer = torch.optim.LBFGS([Z], max_iter=120, history_size=10, line_search_fn="strong_wolfe")

        def closure(Z: Tensor = Z, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = -quotient(Z)
            loss.backward()
            return loss

        optimizer.step(closure)
        Z = (Z / Z.norm()).detach()
    return float(quotient(Z))
