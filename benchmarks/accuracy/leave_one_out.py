"""Scores against the truth: refits without each of 50 training points, MNIST 5k softmax regression, L2 0.01.

Removing example i of n from the objective `sum_i loss_i / n + l2 |params|^2 / 2` (the penalty stays) raises the test
loss by about `score_i / n`. Three predictions, by the tuned solver with nothing set but the damping: the first-order
scores; those of `leave_one_out_scores`, which take the example's own curvature out; and, beside them, AllenNLP's
defaults, which solve with a damping of 30.
"""

import torch

from benchmarks.accuracy.tasks import Task, fit
from lissa import batch_stream, influence_scores, leave_one_out_scores, lissa_init, lissa_update, solve_tuned, tree


def run(task: Task, points: int = 50) -> dict:
    digit = task.mistakes()[0]
    v = task.gradient(digit)
    solution = solve_tuned(
        task.matvec, v, task.train, damping=task.l2, rtol=1e-3, generator=torch.Generator().manual_seed(0)
    )
    scores = influence_scores(task.example_loss_fn, task.params, solution.value, task.train)
    reference = influence_scores(task.example_loss_fn, task.params, allennlp(task, v), task.train)
    ranked = scores.abs().sort(descending=True).indices[:500]
    chosen = ranked[torch.linspace(0, 499, points).long()]
    without = leave_one_out_scores(
        task.matvec, task.example_loss_fn, task.params, v, task.train, chosen,
        damping=task.l2, rtol=1e-3, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    changes = torch.stack([change(task, int(i), digit) for i in chosen])
    result = {"task": task.name, "points": points, "relative_residual": float(solution.relative_residual)}
    predictions = {
        "tuned, first order": scores[chosen],
        "tuned, own curvature taken out": without,
        "AllenNLP's defaults": reference[chosen],
    }
    for name, predicted in predictions.items():
        predicted = predicted / task.n
        result[name] = {
            "pearson": float(torch.corrcoef(torch.stack([predicted, changes]))[0, 1]),
            "slope": float((predicted * changes).sum() / (predicted * predicted).sum()),
            "predicted": predicted.tolist(),
        }
        print(f"{name}: Pearson {result[name]['pearson']:.5f}, slope {result[name]['slope']:.4f}", flush=True)
    return result | {"changes": changes.tolist()}


def change(task: Task, index: int, digit: int) -> torch.Tensor:
    """What the test loss rises by if the example's loss is taken out of the sum (weights `1 / n` as before)."""
    x, y = task.train
    keep = torch.arange(task.n) != index
    # The mean over n - 1 examples times (n - 1) / n is the sum over n: the penalty is scaled to match.
    without = task._replace(train=(x[keep], y[keep]), l2=task.l2 * task.n / (task.n - 1))
    test = (task.test[0][digit : digit + 1], task.test[1][digit : digit + 1])
    refitted = fit(without, task.params)
    return task.loss_fn(refitted, test) - task.loss_fn(task.params, test)


def allennlp(task: Task, v: dict) -> dict:
    """Its defaults: damping 3e-3 times scale 1e4 = 30, batches of 8, a quarter of a pass."""
    batches = batch_stream(task.train, 8, generator=torch.Generator().manual_seed(0))
    state = lissa_init(v)
    for _ in range(int(-(-task.n // 8) * 0.25)):
        state = lissa_update(task.matvec, v, state, next(batches), damping=30.0, scale=1e4)
    return tree.scale(1e-4, state.h)
