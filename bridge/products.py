"""Hessian-vector products and LiSSA for K stacked vectors: the fastest way that the model takes.

Knows losses, batches and vectors, and `lissa`'s ways to multiply; knows nothing of instances, or of what is scored.
"""

import logging
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.utils import _pytree as pytree

from bridge.functional import Functional
from bridge.strategies import (
    first_that_runs,
    is_out_of_memory,
    itemsize,
    length,
    numbers_in,
    pass_limit,
    rows,
    stack_limit,
)
from lissa import (
    Batch,
    BatchMatvec,
    LastLayer,
    LossFn,
    Params,
    Solution,
    hvp,
    solve_lissa,
    solve_lissa_in_outputs,
    solve_lissa_last_layer,
    solve_lissa_stacked,
    traced,
    tree,
)
from lissa.output_recursion import numbers_in_outputs
from lissa.scoring import forward_work
from lissa.stacked import Chunks, StackedHvp, StackedMatvec, linearised_stacked_hvp
from lissa.stretches import most_rows

logger = logging.getLogger(__name__)

Solve: TypeAlias = Callable[[Params, Callable[[], Iterable[Batch]]], Solution]
"""`(v_1, ..., v_K), make -> (H + damping I)^-1 v_k` on the batches that `make` makes, stacked."""


def for_each_vector(
    task: str,
    fn: Callable[[Params, Any], Any],
    *stacked: Callable[[Params, Any], Any],
    chunk_size: int | None = None,
) -> Callable[[Params, Any], Any]:
    """`(v_1, ..., v_K), make -> fn(v_k, make())` for all k, stacked; the first way that runs is kept.

    Args:
        task: What it is, in words.
        fn: A function of one vector and what `make` makes, anew for each attempt: by vmap, or one vector by one.
        *stacked: Functions of K stacked vectors that do the same and are tried before.
        chunk_size: Most vectors in one vmap.
    """

    def all_stacked(one: Callable[[Params, Any], Any]) -> Callable[[Params, Callable[[], Any]], Any]:
        return lambda vectors, make: one(vectors, make())

    def at_once(vectors: Params, make: Callable[[], Any]) -> Any:
        return torch.vmap(lambda v: fn(v, make()), randomness="same", chunk_size=chunk_size)(vectors)

    def one_by_one(vectors: Params, make: Callable[[], Any]) -> Any:
        results = [fn(vector, make()) for vector in rows(vectors)]
        return pytree.tree_map(lambda *leaves: torch.stack(leaves), *results)

    return first_that_runs(task, *map(all_stacked, stacked), at_once, one_by_one)


def stacked_products(model: Functional) -> Callable[[Params, Callable[[], Batch]], Params]:
    """`(v_1, ..., v_K), make -> H v_k` on the batch that `make` makes, stacked."""
    matvec = partial(hvp, model.loss_fn, model.params)
    stacked = stacked_matvec(model)
    return for_each_vector(
        "Hessian-vector products", lambda v, batch: matvec(batch, v), lambda vectors, batch: stacked(batch, vectors)
    )


def linearised_product(model: Functional, batch: Batch) -> Callable[[Params], Params]:
    """`v -> H v` at one batch, with the gradient's graph built once, unless the model has no second derivative."""

    def at_once(v: Params) -> Params:
        graph.append(linearised_stacked_hvp(model.loss_fn, model.params, batch)) if not graph else None
        return tree.map(lambda t: t[0], graph[0](tree.map(lambda t: t.unsqueeze(0), v)))

    if model.last_layer is not None:
        return partial(of_one(model.last_layer), batch)
    graph: list[Callable[[Params], Params]] = []
    return first_that_runs("Hessian-vector products", at_once, lambda v: hvp(model.loss_fn, model.params, batch, v))


def inverse_products(
    model: Functional,
    damping: float,
    scale: float,
    *,
    steps_alike: int = 0,
    example: Callable[[], Batch] | None = None,
    batch_size: int = 1,
) -> Solve:
    """`(v_1, ..., v_K), make -> (H + damping I)^-1 v_k` by LiSSA on the batches that `make` makes, stacked.

    On a CPU, a few vectors at a time, so that what a step passes over stays in the cache.

    Args:
        model: The model.
        damping: In the units of the Hessian.
        scale: In the units of the Hessian.
        steps_alike: Steps on batches of one or two shapes, if all batches are. Of many steps, the product is recorded
            and replayed.
        example: Makes a batch of one instance, which tells how those that will come see the parameters.
        batch_size: Instances in a batch.
    """
    settings = {"damping": damping, "scale": scale, "throw": False}
    layer = model.last_layer
    if layer is not None:
        in_outputs = _in_outputs(model, layer, **settings)
        return _in_groups(lambda K: in_outputs)
    matvec, stacked = partial(hvp, model.loss_fn, model.params), stacked_matvec(model)
    recorded = traced(partial(product_of_each, model.loss_fn, model.params))
    most = vectors_at_once(model)
    chunks = Chunks(most, GRAPHS if most > 1 else 1)

    def solver(*first: Callable[[Params, Iterable[Batch]], Solution]) -> Solve:
        return for_each_vector(
            "inverse Hessian-vector products",
            lambda v, batches: solve_lissa(matvec, v, batches, **settings),
            *first,
            partial(solved_together, stacked),
            chunk_size=most,
        )

    def solved_together(matvec: StackedMatvec, vectors: Params, batches: Iterable[Batch]) -> Solution:
        return solve_lissa_stacked(matvec, vectors, batches, **settings, chunks=chunks)

    def solved_in_outputs(vectors: Params, batches: Iterable[Batch]) -> Solution:
        some = seen()
        return solve_lissa_in_outputs(
            model.loss_fn,
            model.params,
            vectors,
            batches,
            **settings,
            at_once=min(IN_OUTPUTS_AT_ONCE, some.batches),
            steps_at_once=min(GRAPHS_IN_OUTPUTS, max(1, some.batches // 4)),
        )

    solve, solve_recorded = solver(), solver(partial(solved_together, recorded))
    solve_in_outputs = solver(solved_in_outputs)
    seen = cache(partial(_seen_in_outputs, model, example, batch_size))

    def of(K: int) -> Solve:
        is_long = steps_alike * -(-K // most) >= MANY_STEPS
        much = MUCH_IN_OUTPUTS_BESIDE_RECORDING if is_long else MUCH_IN_OUTPUTS
        if K * tree.numel(model.params) >= much and K * seen().numbers >= much:  # to look at an example may pay
            return solve_in_outputs
        return solve_recorded if is_long else solve

    return _in_groups(of)


class _InOutputs(NamedTuple):
    """What LiSSA in outputs has to do with.

    Attributes:
        numbers: How many of a vector need not be passed over at each step; 0 where that is not most of them.
        batches: How many batches' intermediate results fit into the memory of a pass.
    """

    numbers: int
    batches: int


def _seen_in_outputs(model: Functional, example: Callable[[], Batch] | None, batch_size: int) -> _InOutputs:
    if example is None or model.device.type != "cpu":  # a GPU passes over them in no time
        return _InOutputs(0, 1)
    try:
        batch = example()
        found = numbers_in_outputs(model.loss_fn, model.params, batch)
        kept = numbers_in(batch) + forward_work(model.loss_fn, model.params, batch).written
    except Exception as error:  # whoever needs the loss of the example will hear of it
        logger.debug("Cannot tell how a batch sees the parameters: %s", error)
        return _InOutputs(0, 1)
    is_most = 2 * found >= tree.numel(model.params)
    return _InOutputs(found if is_most else 0, max(1, pass_limit(model) // (batch_size * max(1, kept))))


def _in_outputs(model: Functional, layer: LastLayer, **settings: Any) -> Solve:
    """LiSSA for the parameters of a last layer, in the space of its outputs."""
    inputs = 1 if layer.weight is None else model.params[layer.weight].shape[1]
    outputs = len(next(iter(model.params.values())))
    held = max(tree.numel(model.params), 4 * most_rows(inputs) * outputs)  # for a right-hand side, in a stretch
    most = stack_limit(model)
    if model.device.type == "cpu":
        most = min(most, CACHE_BYTES // itemsize(model))
    at_once = max(1, most // held)
    return lambda vectors, make: solve_lissa_last_layer(layer, vectors, make(), **settings, at_once=at_once)


def _in_groups(of: Callable[[int], Solve]) -> Solve:
    """`of(K)` for K right-hand sides, or a few of them at a time, where memory does not suffice."""

    def solve(vectors: Params, make: Callable[[], Iterable[Batch]]) -> Solution:
        K = size = length(vectors)
        solve_some = of(K)
        parts: list[Solution] = []
        start = 0
        while start < K:
            try:
                some = {name: t[start : start + size] for name, t in vectors.items()}
                parts.append(solve_some(some, make)._replace(state=()))
                start += size
            except (RuntimeError, MemoryError) as error:
                if size == 1 or not is_out_of_memory(error):
                    raise
                size = -(-size // 2)
                logger.warning("Out of memory: going on with %d right-hand sides at a time.", size)
        return parts[0] if len(parts) == 1 else pytree.tree_map(lambda *t: torch.cat(t), *parts)

    return solve


def stacked_matvec(model: Functional) -> StackedMatvec:
    """`matvec(batch, (v_1, ..., v_K)) -> H v_k`, stacked."""
    return StackedHvp(model.loss_fn, model.params) if model.last_layer is None else model.last_layer


def of_one(matvec: StackedMatvec) -> BatchMatvec:
    """`matvec(batch, v) -> H v` for one vector."""
    return lambda batch, v: tree.map(lambda t: t[0], matvec(batch, tree.map(lambda t: t.unsqueeze(0), v)))


def vectors_at_once(model: Functional) -> int:
    """How many vectors LiSSA steps through together."""
    bytes_of_one = sum(p.nbytes for p in model.params.values())
    return max(1, CACHE_BYTES // bytes_of_one) if model.device.type == "cpu" else stack_limit(model)


def product_of_each(loss_fn: LossFn, params: Params, batch: Batch, vectors: Params) -> Params:
    """`H v_k` of K stacked vectors by `torch.func` alone, which a recording takes."""
    of_one = partial(hvp, loss_fn, params, batch, mode="reverse-over-reverse")
    return torch.vmap(of_one)(vectors)


MANY_STEPS = 500
"""Steps from which on a recording of the product pays: it takes 50 to 200 ms and saves about 0.3 ms a step."""

GRAPHS = 16
"""Graphs of a loss that are kept at a time, where vectors are small and graphs are therefore too."""

MUCH_IN_OUTPUTS, MUCH_IN_OUTPUTS_BESIDE_RECORDING = 2**18, 2**21
"""Numbers that K vectors have in input layers, from which on LiSSA in outputs pays: it takes about 0.4 ms a step to be
done without passing over them, and 0.7 ms that a recording saves."""

IN_OUTPUTS_AT_ONCE, GRAPHS_IN_OUTPUTS = 64, 32
"""Most right-hand sides and steps that LiSSA in outputs takes together: of more, a step costs as much for each."""

CACHE_BYTES = 2**23
"""The size of a stack of vectors that LiSSA steps through at a time on a CPU: several such fit into a shared cache."""
