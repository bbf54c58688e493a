"""Each computation first the fast way, for all examples or vectors at once, and one by one for models that refuse.

`torch.vmap` and forward mode do not take every model: packed sequences, branches on the data, `.item()`. Here the
choice is made, by trying, and said once. Knows losses, batches and vectors; knows nothing of instances or modules.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bridge.functional import Functional, example_losses, loss_and_gradient
from lissa import Batch, Params, SolverError, influence_scores, per_example_gradients, tree

logger = logging.getLogger(__name__)

STACK_LIMIT = 2**27
"""Most numbers in one stack of vectors or gradients (512 MiB in float32)."""

VECTORS_AT_ONCE = 16
"""Most vectors pushed forward through a model together where gradients of a whole batch would not fit."""


def first_that_runs(task: str, *ways: Callable[..., Any]) -> Callable[..., Any]:
    """`ways[0]` with `ways[1]`, ... to fall back on: the first that runs is used from then on.

    If none runs, the error is that of the last, the simplest. A `SolverError` is an answer, not a refusal.

    Example:
        >>> def refuses(x):
        ...     raise RuntimeError("no")
        >>> first_that_runs("squares", refuses, lambda x: x * x)(3)
        9
    """
    open_ways = list(ways)

    def run(*args: Any) -> Any:
        refusal: Exception | None = None
        for way in open_ways[:-1]:
            try:
                result = way(*args)
                break
            except SolverError:
                raise
            except Exception as error:
                refusal = refusal or error
        else:
            way = open_ways[-1]
            result = way(*args)
        if refusal is not None:
            del open_ways[: open_ways.index(way)]
            logger.warning("Computing %s a slower way, because the model refused the fast one: %s", task, refusal)
        return result

    return run


def scores(model: Functional) -> Callable[[Params, Batch], Tensor]:
    """`score(ihvps, stack) -> (K, B)`: `+ grad_i . ihvp_k` for each row i of a stack of one-example batches."""
    losses = example_losses(model.loss_fn)
    P = tree.numel(model.params)

    def at_once(ihvps: Params, stack: Batch) -> Tensor:
        if length(stack) * P <= STACK_LIMIT:
            return influence_scores(losses, model.params, ihvps, stack)
        return influence_scores(losses, model.params, ihvps, stack, method="jvp", chunk_size=VECTORS_AT_ONCE)

    def by_gradients(ihvps: Params, stack: Batch) -> Tensor:
        return influence_scores(losses, model.params, ihvps, stack, method="per-example-gradients")

    def one_by_one(ihvps: Params, stack: Batch) -> Tensor:
        def score(row: Batch) -> Tensor:
            gradient = loss_and_gradient(model.loss_fn, model.params, row)[1]
            return torch.vmap(tree.vdot, in_dims=(0, None))(ihvps, gradient)

        return torch.stack([score(row) for row in rows(stack)], dim=1)

    return first_that_runs("scores", at_once, by_gradients, one_by_one)


def gradients(model: Functional) -> Callable[[Batch], Params]:
    """`gradients(stack) -> (B, *shape)`: the gradient of each row of a stack of one-example batches."""
    losses = example_losses(model.loss_fn)

    def one_by_one(stack: Batch) -> Params:
        return stack_vectors([loss_and_gradient(model.loss_fn, model.params, row)[1] for row in rows(stack)])

    return first_that_runs("gradients", partial(per_example_gradients, losses, model.params), one_by_one)


def losses(model: Functional) -> Callable[[Batch], Tensor]:
    """`losses(stack) -> (B,)`: the loss of each row of a stack of one-example batches."""
    fast = example_losses(model.loss_fn)

    def at_once(stack: Batch) -> Tensor:
        with torch.no_grad():
            return fast(model.params, stack)

    def one_by_one(stack: Batch) -> Tensor:
        with torch.no_grad():
            return torch.stack([model.loss_fn(model.params, row) for row in rows(stack)])

    return first_that_runs("losses", at_once, one_by_one)


def for_each_vector(task: str, fn: Callable[[Params, Any], Any]) -> Callable[[Params, Any], Any]:
    """`(v_1, ..., v_K), make -> fn(v_k, make())` for all k by vmap, or one by one; results are stacked.

    Args:
        task: What it is, in words.
        fn: A function of one vector and an iterable, made anew for each attempt.
    """

    def at_once(vectors: Params, make: Callable[[], Any]) -> Any:
        return torch.vmap(lambda v: fn(v, make()), randomness="same")(vectors)

    def one_by_one(vectors: Params, make: Callable[[], Any]) -> Any:
        results = [fn(vector, make()) for vector in rows(vectors)]
        return pytree.tree_map(lambda *leaves: torch.stack(leaves), *results)

    return first_that_runs(task, at_once, one_by_one)


def stack_vectors(vectors: list[Params]) -> Params:
    """K vectors as one parameter dict with a dimension more in front."""
    return {name: torch.stack([vector[name] for vector in vectors]) for name in vectors[0]}


def rows(stack: Any) -> list[Any]:
    """The rows of the tensors in `stack`."""
    return [
        pytree.tree_map(lambda leaf: leaf[i] if isinstance(leaf, Tensor) else leaf, stack)  # noqa: B023
        for i in range(length(stack))
    ]


def length(stack: Any) -> int:
    """How many rows the tensors in `stack` have."""
    return next(len(leaf) for leaf in pytree.tree_leaves(stack) if isinstance(leaf, Tensor))
