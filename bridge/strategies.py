"""Each computation on examples first the fast way, for all at once, and one by one for models that refuse.

`torch.vmap` and forward mode do not take every model: packed sequences, branches on the data, `.item()`. Here the
choice is made, by trying, and said once. Knows losses, batches and vectors; knows nothing of instances or modules.
"""

import logging
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, grad_and_value
from torch.utils import _pytree as pytree

from bridge.functional import Functional, example_losses, loss_and_gradient, rows_of
from bridge.row_losses import row_losses
from bridge.rows import likeness_of_leaves
from lissa import (
    Batch,
    Expansion,
    Params,
    SolverError,
    influence_scores,
    scoring_plan,
    take,
    tree,
)
from lissa.influence import Scored, scores_of_row_losses
from lissa.scoring import ForwardWork, ScoringPlan, forward_work, plan_scoring
from lissa.types import LossFn

logger = logging.getLogger(__name__)

STACK_LIMIT = 2**27
"""Most numbers in one stack of vectors or gradients (512 MiB in float32)."""

NUMBERS_AT_ONCE = {"cpu": 2**23, "cuda": 2**24}
"""Most numbers that a forward and backward pass over a batch of training instances keeps, by type of device. On a CPU
32 MiB in float32: of more, an allocator gives memory back and gets it anew, which takes longer than to compute."""


def stack_limit(model: Functional) -> int:
    """Most numbers in one stack of vectors or gradients: an eighth of the memory, as a few are held at a time."""
    return STACK_LIMIT if model.max_memory is None else max(1, model.max_memory // itemsize(model) // 8)


def pass_limit(model: Functional) -> int:
    """Most numbers that one pass over a batch keeps: an eighth of the memory."""
    return min(NUMBERS_AT_ONCE.get(model.device.type, NUMBERS_AT_ONCE["cuda"]), stack_limit(model))


def itemsize(model: Functional) -> int:
    """Bytes of a number."""
    return next(iter(model.params.values())).element_size()


def first_that_runs(task: str, *ways: Callable[..., Any]) -> Callable[..., Any]:
    """`ways[0]` with `ways[1]`, ... to fall back on: the first that runs is used from then on.

    If none runs, the error is that of the last, the simplest. A `SolverError` is an answer, not a refusal, and neither
    is it one to run out of memory.

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
                if is_out_of_memory(error):
                    raise
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
    """`score(ihvps, stack) -> (K, B)`: `+ grad_i . ihvp_k` for each row i of a stack of one-example batches.

    Where memory does not suffice for the stack, for halves of it.
    """
    last_layer = model.last_layer
    if last_layer is not None:
        return in_halves(lambda ihvps, stack: last_layer.scores(together(stack), ihvps))
    losses = example_losses(model.loss_fn)
    gradients_at_once = max(1, stack_limit(model) // tree.numel(model.params))
    numbers = None if model.max_memory is None else stack_limit(model)
    plans: dict[tuple[int, int], ScoringPlan] = {}

    def at_once(ihvps: Params, stack: Batch) -> Tensor:
        kind = length(ihvps), (numbers_in(stack) // length(stack)).bit_length()  # up to twice as long is alike
        if kind not in plans:
            plans[kind] = scoring_plan(
                losses, model.params, stack, length(ihvps), examples=ROWS_AT_ONCE, numbers=numbers
            )
        return influence_scores(losses, model.params, ihvps, stack, method=plans[kind])

    def by_gradients(ihvps: Params, stack: Batch) -> Tensor:
        method, chunk_size = "per-example-gradients", gradients_at_once
        return influence_scores(losses, model.params, ihvps, stack, method=method, chunk_size=chunk_size)

    def flat(t: Tensor) -> Tensor:
        return t.reshape(len(t), t[0].numel())

    def one_by_one(ihvps: Params, stack: Batch) -> Tensor:
        found = [loss_and_gradient(model.loss_fn, model.params, row)[1] for row in rows(stack)]
        gradients = stack_vectors(found)
        products = [flat(x) @ flat(gradients[k]).mT for k, x in ihvps.items()]
        return torch.stack(products).sum(0)

    def a_few_at_a_time(ihvps: Params, stack: Batch) -> Tensor:
        size = max(1, pass_limit(model) // tree.numel(model.params))
        parts = [slice(start, start + size) for start in range(0, length(stack), size)]
        return torch.cat([one_by_one(ihvps, take(stack, part)) for part in parts], dim=1)

    return first_that_runs("scores", *map(in_halves, (at_once, by_gradients)), a_few_at_a_time)


def row_scores(model: Functional, ihvps: Params, batch: Batch, count: int, *, products: int = 0) -> Scored:
    """Losses and scores of the `count` rows of one batch, and the sum of their products with the first of the vectors.

    Raises:
        NoRowLossesError: If the model's loss is not a mean over rows that can be told apart.
    """
    return scores_of_row_losses(
        lambda params: row_losses(model.loss_fn, params, batch, count),
        model.params,
        ihvps,
        products=products,
        by_uses=True,
    )


def by_gradients(model: Functional, example: Batch, examples: int, vectors: int) -> bool:
    """Whether gradients of single examples, all like the one in a batch of one, are the quickest to score by.

    They are expected to be where there are many vectors and an example is a long sequence.
    """
    work = _work(model, example)
    device = next(iter(model.params.values())).device.type
    plan = plan_scoring(work, examples=examples, vectors=vectors, parameters=tree.numel(model.params), device=device)
    return plan.method == "per-example-gradients"


def _work(model: Functional, example: Batch) -> ForwardWork:
    """What the loss of an example takes, which is that of others of the same shapes."""
    known, kind = _works.setdefault(model.loss_fn, {}), likeness_of_leaves(example)
    if kind not in known:
        known[kind] = forward_work(model.loss_fn, model.params, example)
    return known[kind]


_works: weakref.WeakKeyDictionary[LossFn, dict[Hashable, ForwardWork]] = weakref.WeakKeyDictionary()
"""It only decides on speed, so no result depends on it."""


def takes_vmap(model: Functional, example: Batch) -> bool:
    """Whether gradients of several examples can be taken at once, found out on one, a batch of one."""
    stack = pytree.tree_map(lambda leaf: leaf.unsqueeze(0) if isinstance(leaf, Tensor) else leaf, example)
    try:
        torch.vmap(grad(model.loss_fn), in_dims=(None, rows_of(stack)))(model.params, stack)
    except Exception as error:
        return is_out_of_memory(error)
    return True


def in_halves(fn: Callable[[Params, Batch], Tensor]) -> Callable[[Params, Batch], Tensor]:
    """`fn(vectors, stack) -> (K, B)`, on halves of the stack, and halves of those, where memory does not suffice.

    Example:
        >>> def of_two_at_most(vectors, stack):
        ...     if len(stack) > 2:
        ...         raise torch.OutOfMemoryError("too many")
        ...     return stack.unsqueeze(0)
        >>> in_halves(of_two_at_most)({}, torch.arange(5))
        tensor([[0, 1, 2, 3, 4]])
    """

    def run(vectors: Params, stack: Batch) -> Tensor:
        try:
            return fn(vectors, stack)
        except (RuntimeError, MemoryError) as error:
            n = length(stack)
            if n == 1 or not is_out_of_memory(error):
                raise
        logger.warning("Out of memory for %d examples: going on with %d at a time.", n, -(-n // 2))
        halves = (slice(0, -(-n // 2)), slice(-(-n // 2), n))
        return torch.cat([run(vectors, take(stack, half)) for half in halves], dim=-1)

    return run


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory ran out: torch has a class for that on accelerators only."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def rows_at_once(model: Functional, example: Batch, vectors: int) -> int:
    """How many instances, like the one in the batch `example`, go into one product with so many vectors."""
    if model.last_layer is not None:
        numbers = numbers_in(example) + 2 * vectors * example.gradients.shape[1]
        return max(1, min(ROWS_AT_ONCE, pass_limit(model) // numbers))
    try:
        work = _work(model, example)
    except Exception as error:  # whoever needs the loss of the example will hear of it
        logger.debug("Cannot count the work of an example: %s", error)
        return ROWS_UNPLANNED
    numbers = numbers_in(example) + work.written + 2 * vectors * work.largest
    return max(1, min(ROWS_AT_ONCE, pass_limit(model) // max(1, numbers)))


ROWS_AT_ONCE, ROWS_UNPLANNED = 1024, 128
"""Most rows in one product, and how many where an example's work cannot be counted."""


def losses_and_gradients(model: Functional) -> Callable[[Batch], tuple[Tensor, Params]]:
    """`stack -> (B,), (B, *shape)`: loss and gradient of each row of a stack of one-example batches."""
    last_layer = model.last_layer
    if last_layer is not None:
        return lambda stack: (together(stack).losses, last_layer.gradients(together(stack)))

    def at_once(stack: Batch) -> tuple[Tensor, Params]:
        gradients, values = torch.vmap(grad_and_value(model.loss_fn), in_dims=(None, rows_of(stack)))(
            model.params, stack
        )
        return values, gradients

    def one_by_one(stack: Batch) -> tuple[Tensor, Params]:
        found = [loss_and_gradient(model.loss_fn, model.params, row) for row in rows(stack)]
        return torch.stack([loss for loss, _ in found]), stack_vectors([gradient for _, gradient in found])

    of_many = first_that_runs("gradients", at_once, one_by_one)
    return lambda stack: (of_many if length(stack) >= MANY_ROWS else one_by_one)(stack)


MANY_ROWS = 3
"""Rows from which on vmap pays, which takes as long for one as two do without."""


def losses(model: Functional) -> Callable[[Batch], Tensor]:
    """`losses(stack) -> (B,)`: the loss of each row of a stack of one-example batches."""
    if model.last_layer is not None:
        return lambda stack: together(stack).losses
    fast = example_losses(model.loss_fn)

    def at_once(stack: Batch) -> Tensor:
        with torch.no_grad():
            return fast(model.params, stack)

    def one_by_one(stack: Batch) -> Tensor:
        with torch.no_grad():
            return torch.stack([model.loss_fn(model.params, row) for row in rows(stack)])

    return first_that_runs("losses", at_once, one_by_one)


def stack_vectors(vectors: list[Params]) -> Params:
    """K vectors as one parameter dict with a dimension more in front."""
    return {name: torch.stack([vector[name] for vector in vectors]) for name in vectors[0]}


def together(stack: Expansion) -> Expansion:
    """A stack of expansions of one instance each as one expansion."""
    return Expansion(*(t.squeeze(1) for t in stack))


def rows(stack: Any) -> list[Any]:
    """The rows of the tensors in `stack`."""
    return [
        pytree.tree_map(lambda leaf: leaf[i] if isinstance(leaf, Tensor) else leaf, stack)  # noqa: B023
        for i in range(length(stack))
    ]


def numbers_in(stack: Any) -> int:
    """How many numbers the tensors in `stack` hold."""
    return sum(leaf.numel() for leaf in pytree.tree_leaves(stack) if isinstance(leaf, Tensor))


def length(stack: Any) -> int:
    """How many rows the tensors in `stack` have."""
    return next(len(leaf) for leaf in pytree.tree_leaves(stack) if isinstance(leaf, Tensor))
