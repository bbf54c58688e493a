"""Stretches: some LiSSA steps after each other, of which it is known what they will see before any is taken.

Knows batches as graphs of their losses, or as expansions in a last layer's outputs, and which form of iterate suits
which; knows nothing of when a run ends.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from lissa import checks, tree
from lissa.input_layers import InputLayer, ProductsInOutputs, input_layers
from lissa.iterates import Inputs, Iterates, LookedUp, Lookup, Multiplied, Pace, Squares, Whole
from lissa.kernels import twice_differentiable
from lissa.last_layer import Expansion, LastLayer
from lissa.lstm import with_directional_lstm
from lissa.types import Batch, LossFn, Params


class Stretch(NamedTuple):
    """Some steps, for any right-hand sides: `begin(h, v, onward)` makes their iterates, by name."""

    products: list[Callable[[Params], Params]]
    begin: Callable[[Params, Params, Params], dict[str, Iterates]]

    def take(self, h: Params, v: Params, onward: Params) -> Squares:
        """Writes the last iterate into `onward`, which may be `h` itself."""
        iterates = self.begin(h, v, onward)
        for j, product in enumerate(self.products):
            answers = product({name: each.seen(j) for name, each in iterates.items()})
            for name, each in iterates.items():
                each.step(j, answers[name])
        parts = [each.end() for each in iterates.values()]
        return Squares(*(torch.stack(t).sum(0) for t in zip(*parts, strict=True)))


MOST_DAMPED = 0.5
"""Above this `damping / scale`, a step wipes out too much of the iterate for stretches: `e^-n` grows fast."""

SHRINKS = 2.0**-16
"""How small `e^n` may become within a stretch; it is divided by."""


def most_rows(inputs: int) -> int:
    """Rows of a stretch: the products of rows with each other then cost about as much as passing over the iterates.

    Those are `rows / 2` multiplications a row and output, of 12.5 ps; these are about eight passes a stretch over
    `inputs` numbers an output, of 0.2 ns. The sum is least at `16 sqrt(inputs)`, and flat around it.
    """
    return max(128, round(16 * inputs**0.5))


class Graph(NamedTuple):
    """A batch's loss, and how it sees some of the parameters."""

    loss: Tensor
    layers: dict[str, InputLayer]

    @property
    def fills(self) -> float:
        """The part of a stretch that it takes: its rows over `most_rows`."""
        return max((_fills(layer.inputs) for layer in self.layers.values() if not layer.is_lookup), default=0.0)


class Expanded(NamedTuple):
    """A batch in its layer's outputs."""

    batch: Expansion

    @property
    def fills(self) -> float:
        """See `Graph`."""
        return _fills(self.batch.inputs)


def _fills(inputs: Tensor) -> float:
    return len(inputs) / most_rows(inputs.shape[1])


Filling = TypeVar("Filling", Graph, Expanded)


def in_lists(batches: Iterable[Filling], c: float, most: int) -> Iterator[list[Filling]]:
    """Batches in lists that make a stretch: as many as fit into one, a single one where damping is strong."""
    if c > MOST_DAMPED:
        most = 1
    elif c:
        most = min(most, math.floor(math.log(SHRINKS) / math.log1p(-c)))
    waiting: list[Filling] = []
    filled = 0.0
    for batch in batches:
        filled += batch.fills
        if waiting and (filled > 1 or len(waiting) == most):
            yield waiting
            waiting, filled = [], batch.fills
        waiting.append(batch)
    if waiting:
        yield waiting


def of_expansions(layer: LastLayer, some: list[Expanded], c: float, rate: float) -> Stretch:
    """The steps of these expansions, a list of `in_lists`."""
    pace, batches = Pace.of(len(some), c, rate), [each.batch for each in some]
    if len(batches) == 1 or c > MOST_DAMPED:
        products = [partial(layer, batch) for batch in batches]
        return Stretch(products, lambda h, v, onward: {k: Whole(h[k], v[k], onward[k], pace) for k in h})
    inputs = Inputs(layer, [batch.inputs for batch in batches])

    def product(D: Tensor, seen: Params) -> Params:
        return {"layer": torch.bmm(seen["layer"].transpose(0, 1), D).transpose(0, 1)}  # D is symmetric

    products = [partial(product, batch.hessians / len(batch.losses)) for batch in batches]
    return Stretch(products, lambda h, v, onward: {"layer": Multiplied(layer, inputs, h, v, onward, pace)})


class Graphs:
    """Makes stretches of batches' graphs, which hang on one set of leaves.

    Args:
        call: Who wants them, for errors.
        loss_fn: `loss_fn(params, batch) -> ()`.
        params: Where derivatives are taken.
    """

    def __init__(self, call: str, loss_fn: LossFn, params: Params):
        checks.point(call, params)
        scalar = checks.scalar_loss(call, with_directional_lstm(loss_fn))
        self._loss_fn = checks.deterministic(call, scalar, params)
        self._leaves = tree.leaves(params)

    def of(self, batch: Batch) -> Graph:
        """The graph of one batch."""
        with torch.enable_grad(), twice_differentiable():
            loss = self._loss_fn(self._leaves, batch)
        return Graph(loss, input_layers(loss, self._leaves))

    def stretch(self, graphs: list[Graph], c: float, rate: float) -> Stretch:
        """The steps of these graphs, a list of `in_lists`."""
        pace = Pace.of(len(graphs), c, rate)
        layers = _alike(graphs) if c <= MOST_DAMPED else {}
        products: list[Callable[[Params], Params]] = [
            ProductsInOutputs(graph.loss, self._leaves, {key: graph.layers[key] for key in layers}) for graph in graphs
        ]
        makers = {key: _maker(key, layers.get(key, []), pace) for key in self._leaves}

        def begin(h: Params, v: Params, onward: Params) -> dict[str, Iterates]:
            return {key: make(h[key], v[key], onward[key]) for key, make in makers.items()}

        return Stretch(products, begin)


def _maker(key: str, layers: list[InputLayer], pace: Pace) -> Callable[[Tensor, Tensor, Tensor], Iterates]:
    """Makes the iterates of one leaf, which batches see through these layers, or as it is if there are none."""
    if not layers:
        return lambda h, v, onward: Whole(h, v, onward, pace)
    if layers[0].is_lookup:
        lookups = [Lookup.of(layer.inputs, layer.padding) for layer in layers]
        return lambda h, v, onward: LookedUp(lookups, h, v, onward, pace)
    layer = LastLayer(key, None)
    inputs = Inputs(layer, [each.inputs for each in layers])
    return lambda h, v, onward: Multiplied(layer, inputs, {key: h}, {key: v}, {key: onward}, pace)


def _alike(graphs: list[Graph]) -> dict[str, list[InputLayer]]:
    """Of each leaf that all batches see through a layer of one kind, these layers; none that multiplies too many."""
    found = {}
    for key in graphs[0].layers:
        layers = [graph.layers[key] for graph in graphs if key in graph.layers]
        lookups = {layer.is_lookup for layer in layers}
        if len(layers) == len(graphs) and len(lookups) == 1 and (lookups.pop() or graphs[0].fills <= 1):
            found[key] = layers
    return found
