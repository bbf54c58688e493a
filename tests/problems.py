"""A zoo of models as plain functions of a parameter dict, for the tests and the benchmarks.

Each builder returns a `Problem`: the same loss in every form that the library takes, with parameters and a batch drawn
from `seed` alone. `ZOO` names the builders; a new model is one builder and one entry there.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

Params = dict[str, Tensor]


class Problem(NamedTuple):
    """One loss in every form: `loss_fn` is the mean of `example_loss_fn`, and is `output_loss_fn` of `output_fn`."""

    name: str
    loss_fn: Callable[[Params, Any], Tensor]
    example_loss_fn: Callable[[Params, Any], Tensor]
    output_fn: Callable[[Params, Any], Tensor]
    output_loss_fn: Callable[[Tensor, Any], Tensor]
    params: Params
    batch: Any


def classification(name: str, output_fn: Callable[[Params, Any], Tensor], params: Params, batch: Any) -> Problem:
    """The cross-entropy of `output_fn`'s logits, whose last dimension is the classes; the labels are `batch[-1]`.

    Where an example has several logits (a sequence), its loss is their mean.
    """

    def example_loss_fn(params: Params, batch: Any) -> Tensor:
        logits, labels = output_fn(params, batch), batch[-1]
        losses = cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
        return losses.reshape(len(labels), -1).mean(1)

    def output_loss_fn(logits: Tensor, batch: Any) -> Tensor:
        return cross_entropy(logits.flatten(0, -2), batch[-1].flatten())

    def loss_fn(params: Params, batch: Any) -> Tensor:
        return output_loss_fn(output_fn(params, batch), batch)

    return Problem(name, loss_fn, example_loss_fn, output_fn, output_loss_fn, params, batch)


def softmax_regression(
    *, seed: int = 0, dtype: torch.dtype = torch.float64, batch_size: int = 8, features: int = 5, classes: int = 3
) -> Problem:
    """Linear logits: the loss is convex, and its Hessian is `mean x x^T (diag(p) - p p^T)`."""
    g = torch.Generator().manual_seed(seed)
    params = {
        "weight": normal(g, features, classes, dtype=dtype) / features**0.5,
        "bias": normal(g, classes, dtype=dtype) / 4,
    }
    batch = (normal(g, batch_size, features, dtype=dtype), labels(g, batch_size, classes=classes))
    return classification("softmax regression", lambda p, b: b[0] @ p["weight"] + p["bias"], params, batch)


def mlp(
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    batch_size: int = 8,
    features: int = 5,
    widths: tuple[int, ...] = (6, 4),
    classes: int = 3,
    activation: Callable[[Tensor], Tensor] = torch.tanh,
) -> Problem:
    """Fully connected layers with an activation between them."""
    g = torch.Generator().manual_seed(seed)
    sizes = (features, *widths, classes)
    params = {}
    for i, (rows, columns) in enumerate(itertools.pairwise(sizes)):
        params[f"{i}.weight"] = normal(g, rows, columns, dtype=dtype) / rows**0.5
        params[f"{i}.bias"] = normal(g, columns, dtype=dtype) / 4
    batch = (normal(g, batch_size, features, dtype=dtype), labels(g, batch_size, classes=classes))

    def output_fn(params: Params, batch: Any) -> Tensor:
        h = batch[0]
        for i in range(len(sizes) - 1):
            h = h if i == 0 else activation(h)
            h = h @ params[f"{i}.weight"] + params[f"{i}.bias"]
        return h

    return classification("MLP", output_fn, params, batch)


def tied_weights(
    *, seed: int = 0, dtype: torch.dtype = torch.float64, batch_size: int = 8, vocabulary: int = 7, width: int = 4
) -> Problem:
    """A bigram model whose one matrix is both the embedding of the input word and the output layer."""
    g = torch.Generator().manual_seed(seed)
    params = {
        "embedding": normal(g, vocabulary, width, dtype=dtype),
        "mix": normal(g, width, width, dtype=dtype) / width**0.5,
    }
    batch = (labels(g, batch_size, classes=vocabulary), labels(g, batch_size, classes=vocabulary))

    def output_fn(params: Params, batch: Any) -> Tensor:
        hidden = torch.tanh(params["embedding"][batch[0]] @ params["mix"])
        return hidden @ params["embedding"].mT

    return classification("tied weights", output_fn, params, batch)


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    """Standard normal entries, the same for every dtype up to rounding."""
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)


def labels(generator: torch.Generator, *shape: int, classes: int) -> Tensor:
    """Integers below `classes`."""
    return torch.randint(classes, shape, generator=generator)


def random_vector(problem: Problem, seed: int = 1) -> Params:
    """A standard normal vector, shaped like the parameters."""
    g = torch.Generator().manual_seed(seed)
    return {k: normal(g, *p.shape, dtype=p.dtype) for k, p in problem.params.items()}


def random_vectors(problem: Problem, count: int, seed: int = 1) -> Params:
    """`count` standard normal vectors, stacked along a new first dimension."""
    g = torch.Generator().manual_seed(seed)
    return {k: normal(g, count, *p.shape, dtype=p.dtype) for k, p in problem.params.items()}


ZOO: dict[str, Callable[..., Problem]] = {
    "softmax regression": softmax_regression,
    "MLP": mlp,
    "tied weights": tied_weights,
}
"""Builders by name; all take `seed`, `dtype` and `batch_size`."""
