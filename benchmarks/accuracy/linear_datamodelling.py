"""The linear datamodelling score: do summed influences predict what training on a random half of the data does?

For each test example, Spearman's rank correlation over random half subsets between its loss after a refit on the subset
and the prediction `- sum of the scores of the examples kept`; the mean over test examples. MNIST 5k softmax regression,
L2 0.01. Beside the tuned solver: plain gradient products, and AllenNLP's defaults.

Source: S. M. Park et al., TRAK: attributing model behavior at scale, ICML 2023, section 2.
"""

import torch
from scipy.stats import spearmanr
from torch import Tensor

from benchmarks.accuracy.leave_one_out import allennlp
from benchmarks.accuracy.tasks import Task, fit
from lissa import influence_scores, solve_tuned, tree


def run(task: Task, subsets: int = 100, tests: int = 25) -> dict:
    chosen = torch.randperm(len(task.test[1]), generator=torch.Generator().manual_seed(0))[:tests]
    vectors = [task.gradient(int(i)) for i in chosen]
    scores = {
        "tuned": scored(task, [solve(task, v) for v in vectors]),
        "plain gradient products": scored(task, vectors),
        "AllenNLP's defaults": scored(task, [allennlp(task, v) for v in vectors[:10]]),
    }
    kept, losses = refits(task, chosen, subsets)
    result: dict = {"task": task.name, "subsets": subsets, "tests": tests}
    for name, values in scores.items():
        # Positive = helpful: the more of it is kept, the lower the loss.
        predicted = -(kept.to(values.dtype) @ values.mT)
        each = [float(spearmanr(predicted[:, j], losses[:, j]).statistic) for j in range(len(values))]
        result[name] = {"mean": sum(each) / len(each), "each": each}
        print(f"{name}: LDS {result[name]['mean']:.3f} over {len(each)} test examples", flush=True)
    return result


def solve(task: Task, v: dict) -> dict:
    return solve_tuned(task.matvec, v, task.train, damping=task.l2, generator=torch.Generator().manual_seed(0)).value


def scored(task: Task, ihvps: list[dict]) -> Tensor:
    stacked = tree.map(lambda *t: torch.stack(t), *ihvps)
    return influence_scores(task.example_loss_fn, task.params, stacked, task.train)


def refits(task: Task, chosen: Tensor, subsets: int) -> tuple[Tensor, Tensor]:
    """Which examples each subset keeps, shape `(subsets, n)`, and the test losses after its refit."""
    generator = torch.Generator().manual_seed(1)
    x, y = task.train
    test = (task.test[0][chosen], task.test[1][chosen])
    kept, losses = torch.zeros(subsets, task.n, dtype=torch.bool), []
    for s in range(subsets):
        index = torch.randperm(task.n, generator=generator)[: task.n // 2]
        kept[s, index] = True
        params = fit(task._replace(train=(x[index], y[index])), task.params, tolerance=1e-5)
        losses.append(task.example_loss_fn(params, test))
    return kept, torch.stack(losses)
