"""Where all parameters in use are those of one linear layer: instances as expansions of their losses in its outputs.

Each instance then goes through the model once a call, however often it is multiplied by or scored. Knows modules and
rows of instances; what can be done with an expansion is `lissa.last_layer`'s affair.
"""

import itertools
import logging
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bridge.functional import Functional
from bridge.row_losses import NoRowLossesError, row_losses
from bridge.rows import Rows, are_rows
from lissa import Batch, Expansion, LastLayer, Params, expansion_of_graph, tree
from lissa.host import to_device
from lissa.hvp import gradient_of_graph, pull_back
from lissa.stacked import norms

logger = logging.getLogger(__name__)

MOST_OUTPUTS = 64
"""Most outputs of the layer: an instance takes the square of their number."""

AT_ONCE = 512
"""Most instances in one pass through the model."""

AGREES = 1e-3
"""Relative precision of the comparison: float32 keeps more, bfloat16 does not and goes without."""

CHECKED = 8
"""Instances on which the derivatives are compared."""


def layer_of(module: nn.Module, names: Iterable[str]) -> tuple[nn.Linear, LastLayer] | None:
    """The one linear layer that has all the named parameters, if there is one and no other module shares them."""
    wanted = set(names)
    owners = {
        (prefix, name): child
        for prefix, child in module.named_modules(remove_duplicate=False)
        for name, p in child.named_parameters(recurse=False, remove_duplicate=False)
        if any(p is q for key, q in module.named_parameters() if key in wanted)
    }
    layers = set(owners.values())
    if len(layers) != 1 or type(layer := layers.pop()) is not nn.Linear or len(owners) != len(wanted):
        return None
    if layer.out_features > MOST_OUTPUTS:
        return None
    keys: dict[str, str | None] = {"weight": None, "bias": None}
    keys |= {name: f"{prefix}.{name}" if prefix else name for prefix, name in owners}
    return layer, LastLayer(**keys)


def expanded(model: Functional, module: nn.Module, train: Rows, share: range) -> tuple[Functional, "Expander"] | None:
    """The model on expansions and what makes them, if that is possible and gives the model's own derivatives.

    Gradient and a product are compared on a few training instances, as one batch; a loss that is no mean over
    instances, or a layer whose parameters have their effect elsewhere too, shows there.

    Args:
        model: The module as functions of the parameters in use.
        module: The module.
        train: Training instances.
        share: Those that may be read.
    """
    found = layer_of(module, model.params)
    if found is None:
        return None
    layer, last_layer = found
    expand = Expander(model, layer)
    if not _agrees(model, last_layer, ExpandedRows(train, expand), train, share[:CHECKED]):
        return None
    return model._replace(loss_fn=last_layer.loss_fn(model.params), last_layer=last_layer), expand


def _agrees(model: Functional, last_layer: LastLayer, rows: "ExpandedRows", train: Rows, chosen: range) -> bool:
    if not chosen:
        return True
    try:
        batch = rows.batch(chosen)
        gradient, product = _gradient_and_product(model, train.batch(chosen))
    except Exception as error:  # a model that cannot be expanded, or an instance that will be named by whoever needs it
        logger.info("Going without expansions of the last layer: %s", error)
        return False
    mean = tree.map(lambda t: t.mean(0, keepdim=True), last_layer.gradients(batch))
    for got, right in ((mean, gradient), (last_layer(batch, gradient), product)):
        if not bool((norms(tree.sub(got, right)) <= AGREES * norms(right)).all()):
            logger.info("Going without expansions of the last layer: the model's derivatives are others.")
            return False
    return True


def _gradient_and_product(model: Functional, batch: Batch) -> tuple[Params, Params]:
    """`g = grad L` and `H g`, each stacked alone, from one graph. Of a random loss neither is what it is elsewhere."""
    leaves = tree.leaves(model.params)
    with torch.enable_grad():
        graph = gradient_of_graph(model.loss_fn(leaves, batch), tuple(leaves.values()))
    gradient = tuple(g.detach() for g in graph)
    product = pull_back(graph, tuple(leaves.values()), gradient, retain_graph=False)
    stacked = [{k: t.unsqueeze(0) for k, t in zip(leaves, found, strict=True)} for found in (gradient, product)]
    return stacked[0], stacked[1]


class Expander:
    """Makes a batch of instances into its expansion.

    Args:
        model: The module as functions.
        layer: The layer inside of it.
    """

    def __init__(self, model: Functional, layer: nn.Linear):
        self.model = model
        self._layer = layer
        m = layer.out_features
        numbers = layer.in_features + 1 + m + m * m  # inputs, loss, gradient, Hessian
        self.row_bytes = numbers * next(iter(model.params.values())).element_size()

    def __call__(self, batch: Batch, count: int) -> Expansion:
        """The expansion of a batch of `count` instances.

        Raises:
            NoRowLossesError: If the model does not call the layer once with a row for each instance, or its loss is not
                a mean over rows that can be told apart.
        """
        with _outputs_kept(self._layer) as kept, torch.enable_grad():
            losses = row_losses(self.model.loss_fn, self.model.params, batch, count)
        if len(kept) != 1 or kept[0][0].shape[:-1] != (count,) or not losses.requires_grad:
            raise NoRowLossesError(f"The layer is called {len(kept)} times, or not with a row for each instance.")
        inputs, outputs = kept[0]
        return expansion_of_graph(losses, outputs, inputs)


@contextmanager
def _outputs_kept(layer: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Inside, each call of the layer leaves its inputs and outputs, and what follows depends on these outputs alone."""
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> Tensor:
        kept.append((inputs[0].detach(), outputs.detach().requires_grad_()))
        return kept[-1][1]

    handle = layer.register_forward_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()


class ExpandedRows(Rows):
    """Instances as expansions: rows alike, whatever shapes the instances have.

    Args:
        rows: The instances.
        expand: Makes an expansion of a batch.
    """

    def __init__(self, rows: Rows, expand: Expander):
        super().__init__(rows, rows.batch, expand.model.device, most_bytes=rows.most_bytes)
        self._rows = rows
        self._expand = expand

    def batch(self, indices: Iterable[int]) -> Expansion:
        """The expansion of the instances `indices`."""
        indices = list(indices)
        if self._holds(indices):
            return _taken(self._gathered, [i - self._held.start for i in indices])
        chosen = sorted(set(indices))
        found = self._expanded(chosen)
        return found if chosen == indices else _taken(found, [bisect_left(chosen, i) for i in indices])

    def held_losses(self, indices: list[int]) -> Tensor | None:
        """The losses of the instances `indices`, if these are among those gathered."""
        if not indices or not self._holds(indices):
            return None
        return self._gathered.losses[_index([i - self._held.start for i in indices], self._device)]

    def _expanded(self, chosen: Sequence[int]) -> Expansion:
        """Of the instances `chosen`, which rise, in groups of equal shapes."""
        whole: list[Tensor] = []
        for found, stack in self._rows.examples(AT_ONCE, chosen):
            together = pytree.tree_map(lambda leaf: leaf.squeeze(1) if isinstance(leaf, Tensor) else leaf, stack)
            if not are_rows(together, len(found)):
                raise NoRowLossesError("A batch is not made of tensors with a row for each instance.")
            part = self._expand(together, len(found))
            if len(found) == len(chosen):  # in their order, as nothing else was read in between
                return part
            whole = whole or [t.new_empty(len(chosen), *t.shape[1:]) for t in part]
            rows = _index(_places(chosen, found), self._device)
            for t, some in zip(whole, part, strict=True):
                t[rows] = some
        return Expansion(*whole)

    def gather(self, share: range | None = None) -> None:
        """Expands all instances, or those of `share`, once, if they fit into `most_bytes`."""
        share = range(len(self)) if share is None else share
        if self._gathered is not None or not len(share):
            return
        if self._expand.row_bytes * len(share) > self.most_bytes:
            return
        try:
            self._gathered, self._held = self._expanded(share), share
        except Exception:  # whoever needs the instance will hear of it, with its number
            return

    def examples(self, size: int, chosen: Iterable[int] | None = None) -> Iterator[tuple[list[int], Batch]]:
        """See `Rows.examples`."""
        todo = iter(range(len(self)) if chosen is None else chosen)
        while some := list(itertools.islice(todo, size)):
            yield some, _as_batches_of_one(self.batch(some))


def _taken(batch: Expansion, rows: list[int]) -> Expansion:
    """These rows; a view of them if they are one stretch."""
    index = _index(rows, batch.inputs.device)
    return Expansion(*(t[index] for t in batch))


def _places(chosen: Sequence[int], found: Sequence[int]) -> list[int]:
    """Where in `chosen`, which rises, those found are."""
    start = bisect_left(chosen, found[0])
    stretch = range(start, start + len(found))
    return [*stretch] if [*chosen[start : stretch.stop]] == [*found] else [bisect_left(chosen, i) for i in found]


def _index(rows: list[int], device: torch.device) -> slice | Tensor:
    """What takes these rows: a slice if they are one stretch."""
    first, count = rows[0], len(rows)
    stretch = rows[-1] - first == count - 1 and rows == list(range(first, first + count))
    return slice(first, first + count) if stretch else to_device(torch.tensor(rows), device)


def _as_batches_of_one(batch: Expansion) -> Expansion:
    """Each row a batch of one."""
    return Expansion(*(t.unsqueeze(1) for t in batch))
