"""Scores of many vectors from one gradient, by what parameters are multiplied with.

Where parameters W enter a graph, as in `z_r = W a_r` for some rows r, a loss's derivative along a vector x is a sum
over these rows of `dL / dz_r . X a_r`, with X what x is of W. Neither the forward pass nor its derivative is gone
through for each vector. Which example a row is of is found out, not assumed.

Knows autograd's graphs, from which it reads what rows are multiplied by; knows nothing of modules.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lissa.hvp import nodes, pulled_back, result_shape
from lissa.lstm_layer import BIAS, WEIGHTS, Layer
from lissa.parts import row_parts
from lissa.types import Params

GRADIENTS_AT_ONCE = {"cpu": 2**20, "cuda": 2**22}
"""Most numbers of examples' gradients at a time: with fewer, each product with the vectors is a thin one."""

OUTPUTS_AT_ONCE = 2**10
"""Most outputs of vectors at a time, so that hundreds of rows are multiplied by them: for a few rows alone, a product
takes twice as long to make ready as to compute."""

MOST_OFF = 1 / 16
"""How far the factor between a row's two gradients may be from a whole number, in any of its entries."""

MOST_ROUNDED = 2.0**-10
"""Most that the largest factor may be rounded by, before the backward pass rounds too: 8,192 examples in float32."""


class Use(NamedTuple):
    """Where parameters enter a graph.

    Attributes:
        node: The operation that takes them.
        place: As which of its arguments.
    """

    node: Any
    place: int

    @property
    def parameters(self) -> GradientEdge:
        """What it takes: a parameter, or what was computed from parameters alone."""
        return GradientEdge(*self.node.next_functions[self.place])


class Uses(NamedTuple):
    """Where all parameters enter the graph of some losses."""

    all: list[Use]

    @property
    def rows(self) -> list[GradientEdge]:
        """Places of the graph that a gradient of the losses is to be taken in, for `scores`."""
        return [use.parameters if _is_lstm(node) else GradientEdge(node, 0) for node, use in self._by_node.items()]

    @property
    def _by_node(self) -> dict[Any, Use]:
        """One use of each node."""
        return {use.node: use for use in self.all}

    def scores(self, gradients: Sequence[Tensor], losses: Tensor, leaves: Params, vectors: Params) -> Tensor | None:
        """`grad_i . x_k`: over all uses, and rows r of example i, the sum of `dL_i / dz_r . X_k a_r`, shape `(K, B)`.

        The gradient of `u . losses` in z is linear in u. It is taken for `u_i = i` too: what a row of example i has is
        i times as long then. None, if there is a row of which that is not so, or there are too many examples for the
        precision. A row of several examples may happen to look like one of another, for all vectors alike: the scores
        of one vector, found in another way, tell.

        Args:
            gradients: Of the sum of the losses in `rows`, the latest that was taken.
            losses: Shape `(B,)`, each a function of its own example. Their graph is kept.
            leaves: The parameters.
            vectors: K of them, stacked.

        Returns:
            The scores, constants to autograd.

        Example:
            >>> w = torch.tensor([[3.0], [1.0]], requires_grad=True)
            >>> losses = (torch.tensor([[1.0, 0.0], [0.0, 2.0]]) @ w).square().sum(1) / 2
            >>> found = uses(losses)
            >>> gradients = torch.autograd.grad(losses.sum(), found.rows, retain_graph=True)
            >>> found.scores(gradients, losses, {"w": w}, {"w": torch.tensor([[[1.0], [1.0]]])})
            tensor([[3., 4.]])

        Source: I. Goodfellow, Efficient per-example gradient computations, 2015, for the norms of gradients.
        """
        B, operations = len(losses), list(self._by_node)
        if B * torch.finfo(losses.dtype).eps > MOST_ROUNDED:
            return None
        once = _of_rows(operations, gradients)
        numbers = torch.arange(1, B + 1, dtype=losses.dtype, device=losses.device)
        numbered = _of_rows(operations, torch.autograd.grad(losses, self.rows, numbers, retain_graph=True))
        rows: dict[Any, _Rows] = {}
        for node, g, i_g in zip(operations, once, numbered, strict=True):
            of_node = _rows_of(g, i_g, B)
            if of_node is None:
                return None
            rows[node] = of_node
        with torch.no_grad():
            parts = [_along(use, rows[use.node], _directions(use.parameters, leaves, vectors)) for use in self.all]
        return torch.stack(parts).sum(0)


def uses(losses: Tensor) -> Uses | None:
    """Where parameters enter the graph of these losses; None if one does in a way that is not known.

    Known are matrix products, biases, embeddings and our LSTM layers.

    Example:
        >>> w, b = torch.ones(2, 1, requires_grad=True), torch.ones(1, requires_grad=True)
        >>> found = uses(torch.addmm(b, torch.ones(3, 2), w).square().sum(1))
        >>> [(use.node.name(), use.place) for use in found.all]
        [('AddmmBackward0', 0), ('AddmmBackward0', 2)]
    """
    found: list[Use] = []
    of_data: dict[Any, bool] = {}
    for node in nodes(losses):
        inputs = [(place, to) for place, (to, _) in enumerate(node.next_functions) if to is not None]
        entering = [place for place, to in inputs if not of_data[to]]
        known = bool(entering) and _is_known(node, entering, others=len(inputs) - len(entering))
        if known:
            found += [Use(node, place) for place in entering]
        elif len(inputs) > len(entering) > 0:
            return None
        of_data[node] = known or len(inputs) > len(entering)
    return Uses(found) if of_data.get(losses.grad_fn) else None


class _Rows(NamedTuple):
    """What the losses say of the rows of an operation's result, but for those of which they say nothing.

    Attributes:
        gradients: Shape `(N, m)`, of one example after another.
        chosen: Which rows these are.
        counts: How many rows each example has, shape `(B,)`.
    """

    gradients: Tensor
    chosen: Tensor
    counts: Tensor

    def summed(self, of_rows: Tensor) -> Tensor:
        """`(K, N) -> (K, B)`."""
        return torch.segment_reduce(of_rows.mT.contiguous(), "sum", lengths=self.counts, initial=0.0).mT

    def times(self, a: Tensor, X: Tensor) -> Tensor:
        """`g_r . X_k^T a_r`, summed over the rows of an example, for X of shape `(K, d, m)`: shape `(K, B)`."""
        (K, d, m), N, B = X.shape, len(self.chosen), len(self.counts)
        a = a.index_select(0, self.chosen)
        if K * N > N + K * B:
            return self._by_example(a, X.flatten(1))
        found, some = a.new_empty(N, K), max(1, OUTPUTS_AT_ONCE // m)
        for X_k, of_k in zip(X.split(some), found.split(some, 1), strict=True):
            outputs = X_k.mT.reshape(-1, d).mT
            for x, g, scores in row_parts(outputs.shape[1], a, self.gradients, of_k):
                scores.copy_(torch.bmm((x @ outputs).view(len(x), len(X_k), m), g.unsqueeze(2))[:, :, 0])
        return self.summed(found.mT)

    def _by_example(self, a: Tensor, X: Tensor) -> Tensor:
        """The same, by the gradients `sum of a_r g_r^T` of some examples at a time, for X of shape `(K, d m)`."""
        found, start = [], 0
        for (lengths,) in row_parts(X.shape[1], self.counts, most=GRADIENTS_AT_ONCE):
            stop = start + int(lengths.sum())
            example = torch.repeat_interleave(torch.arange(len(lengths), device=a.device), lengths)
            place = torch.arange(stop - start, device=a.device) - (lengths.cumsum(0) - lengths)[example]
            shape = len(lengths), int(lengths.max())
            x, g = (
                t.new_zeros(*shape, t.shape[1]).index_put_((example, place), t[start:stop]) for t in (a, self.gradients)
            )
            found.append(X @ torch.bmm(x.mT, g).flatten(1).mT)
            start = stop
        return torch.cat(found, 1)


def _is_known(node: Any, entering: list[int], others: int) -> bool:
    """Whether parameters enter, as these arguments beside so many others, in a way that `_along` knows."""
    name = node.name()
    if _is_lstm(node):
        return set(entering) <= {WEIGHTS, BIAS}
    if name == "MmBackward0":
        return entering == [1]
    if name == "AddmmBackward0":
        return entering == [2] or (entering in ([0], [0, 2]) and _is_bias(node, 0))
    if name == "AddBackward0":
        return others == len(entering) == 1 and _is_bias(node, entering[0])
    return name == "EmbeddingBackward0" and not node._saved_scale_grad_by_freq


def _is_bias(node: Any, place: int) -> bool:
    """Whether what enters is added to each row of the result."""
    return result_shape(*node.next_functions[place]) == result_shape(node)[-1:]


def _is_lstm(node: Any) -> bool:
    return getattr(node, "_forward_cls", None) is Layer


def _of_rows(operations: list[Any], gradients: Sequence[Tensor]) -> list[Tensor]:
    """Gradients in the rows of what these operations gave, each of shape `(N, m)`: an LSTM's layer has its own."""
    found = [node.da if _is_lstm(node) else g for node, g in zip(operations, gradients, strict=True)]
    return [g.detach().reshape(-1, g.shape[-1]) for g in found]


def _rows_of(gradients: Tensor, numbered: Tensor, count: int) -> _Rows | None:
    """The rows in order of the examples that they are of, if their two gradients say of which."""
    numbers = []
    for g, i_g in row_parts(gradients.shape[1], gradients, numbered):
        largest, place = g.abs().max(1, keepdim=True)
        number = torch.where(largest > 0, i_g.gather(1, place) / g.gather(1, place), 0.0).round_()
        gap = torch.addcmul(i_g, number, g, value=-1).abs_().amax(1, keepdim=True)
        right = (gap <= MOST_OFF * largest) & (number <= count)
        if not bool((right & ((number > 0) | (largest == 0))).all()):
            return None
        numbers.append(number[:, 0].long())
    of_all = torch.cat(numbers)
    counts = torch.bincount(of_all, minlength=count + 1)
    chosen = of_all.argsort(stable=True)[int(counts[0]) :]
    return _Rows(gradients.index_select(0, chosen), chosen, counts[1:])


def _directions(parameters: GradientEdge, leaves: Params, vectors: Params) -> Tensor:
    """What K vectors are of what enters, shape `(K, *shape)`: of a parameter its part, else a derivative."""
    for key, leaf in leaves.items():
        if getattr(parameters.node, "variable", None) is leaf:
            return vectors[key]
    like = next(iter(vectors.values()))
    cotangent = like.new_zeros(result_shape(*parameters[:2]), requires_grad=True)
    inputs = tuple(leaves.values())
    with torch.enable_grad():  # linear in the cotangent, whose derivative is wanted
        pulled = torch.autograd.grad([parameters], inputs, [cotangent], create_graph=True, materialize_grads=True)
    return pulled_back(pulled, (cotangent,), [vectors[key] for key in leaves])[0]


def _along(use: Use, rows: _Rows, X: Tensor) -> Tensor:
    """What this use adds to the scores of K vectors, of which X is of what enters, shape `(K, B)`."""
    node, g = use.node, rows.gradients
    if _is_lstm(node):
        return rows.times(node.z, X.mT) if use.place == WEIGHTS else rows.summed(X @ g.mT)
    name = node.name()
    if name == "EmbeddingBackward0":
        looked_up = node._saved_indices.flatten()[rows.chosen]
        there = (looked_up != node._saved_padding_idx).unsqueeze(1)
        parts = row_parts(4 * g.shape[1], looked_up, g * there)
        return rows.summed(
            torch.cat([torch.stack([(x.index_select(0, i) * part).sum(1) for x in X]) for i, part in parts], 1)
        )
    if name == "MmBackward0":
        return rows.times(node._saved_self, X)
    if name == "AddmmBackward0" and use.place == 2:
        return rows.times(node._saved_mat1, X) * node._saved_alpha
    factor = node._saved_beta if name == "AddmmBackward0" else node._saved_alpha if use.place == 1 else 1
    return rows.summed(X.flatten(1) @ g.mT) * factor
