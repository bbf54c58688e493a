"""How often do stated intervals and bounds of scores hold? 200 random softmax regressions, 8 repeats."""

from functools import partial

import torch

from lissa import (
    ggnvp,
    influence_scores,
    per_example_gradients,
    score_bound,
    score_interval,
    solve_dense,
    solve_lissa,
    tree,
)
from lissa.sampling import batch_stream
from tests.problems import random_vector, softmax_regression

DAMPING, SCALE, STEPS, REPEATS = 0.5, 3.0, 60, 8


def run(problems: int = 200) -> dict:
    inside, total, bounded = 0, 0, 0
    for seed in range(problems):
        problem = softmax_regression(seed=seed, batch_size=40)
        matvec = partial(ggnvp, problem.output_fn, problem.output_loss_fn, problem.params)
        full = partial(matvec, problem.batch)
        v = random_vector(problem, seed)
        batches = batch_stream(problem.batch, 4, generator=torch.Generator().manual_seed(seed), replacement=True)
        solution = solve_lissa(
            matvec, v, batches, damping=DAMPING, scale=SCALE, steps=STEPS, average_after=STEPS // 2, repeats=REPEATS,
            full_matvec=full,
        )  # fmt: skip
        score = partial(influence_scores, problem.example_loss_fn, problem.params, batch=problem.batch)
        exact = score(ihvp=solve_dense(full, v, damping=DAMPING).value)
        interval = score_interval(score(ihvp=solution.samples))
        error = (interval.score - exact).abs()
        gradients = per_example_gradients(problem.example_loss_fn, problem.params, problem.batch)
        norms = torch.stack([tree.norm(tree.map(lambda t, i=i: t[i], gradients)) for i in range(len(error))])
        inside += int((error <= interval.half_width).sum())
        bounded += int((error <= score_bound(norms, solution.residual_norm, damping=DAMPING)).sum())
        total += len(error)
    print(
        f"{total} scores of {problems} problems: interval covers {inside / total:.3f}, bound holds in {bounded / total}"
    )
    return {"problems": problems, "scores": total, "interval_covers": inside / total, "bound_holds": bounded / total}
