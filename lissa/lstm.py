"""LSTMs that `torch.autograd` differentiates twice several times as fast, for products with one vector or many.

On a CPU, torch differentiates an LSTM on packed sequences twice by taking every small operation of every time step
apart, four times over; `lissa.lstm_layer` has the passes written out. Here torch's functions are told from each other.

Knows how torch calls an LSTM; knows nothing of losses, or of what the vectors are.
"""

import contextlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lissa.leafwise import is_constant
from lissa.lstm_layer import Layer, rows, steps_of
from lissa.types import Batch, LossFn, Params


class DirectionalLSTM(TorchFunctionMode):
    """Inside it, `nn.LSTM` computes the same, and `torch.autograd` differentiates it twice several times as fast.

    Second derivatives are constants to autograd; there is no third. What has another form (projections, dropout at
    work, mixed dtypes) and what a transform of `torch.func` is at work on stays torch's.

    Args:
        curved: Whether gradients are to be differentiated in what they are taken at, and not only in their cotangents.
            It may be set anew between two gradients of one loss.

    Example:
        >>> lstm = torch.nn.LSTM(2, 3)
        >>> x = torch.ones(4, 1, 2, requires_grad=True)
        >>> with DirectionalLSTM():
        ...     loss = lstm(x)[0].square().sum()
        >>> gradient = torch.autograd.grad(loss, x, create_graph=True)
        >>> torch.autograd.grad(gradient, x, [torch.ones(4, 1, 2)])[0].shape
        torch.Size([4, 1, 2])
    """

    def __init__(self, *, curved: bool = True):
        super().__init__()
        self.curved = curved
        self.met = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls `func`, `torch.lstm` in our way."""
        if kwargs or func not in (torch.lstm, _PACK) or not is_constant():
            return func(*args, **(kwargs or {}))
        self.met = True
        if func is _PACK:
            return _packed(*args) if _are_lengths(*args) else func(*args)
        packed = isinstance(args[1], Tensor)
        call = _of_packed(*args) if packed else _of_padded(*args)
        if call is not None:
            return call.run(lambda: self.curved, packed)
        return func(*args)


def with_directional_lstm(loss_fn: LossFn) -> LossFn:
    """`loss_fn` inside `DirectionalLSTM`, unless it has been seen to have no LSTM: small losses are faster without.

    Example:
        >>> with_directional_lstm(lambda params, batch: params["w"].sum())({"w": torch.ones(2)}, None)
        tensor(2.)
    """

    def inside(params: Params, batch: Batch) -> Tensor:
        if loss_fn in _without_lstm:
            return loss_fn(params, batch)
        with DirectionalLSTM() as mode:
            loss = loss_fn(params, batch)
        if not mode.met:
            with contextlib.suppress(TypeError):  # what cannot be referred to weakly is not remembered
                _without_lstm.add(loss_fn)
        return loss

    return inside


_without_lstm: weakref.WeakSet[LossFn] = weakref.WeakSet()
"""It only decides on speed, so no result depends on it."""

_PACK: Any = torch._VF._pack_padded_sequence
"""What `nn.utils.rnn.pack_padded_sequence` calls."""


def _are_lengths(x: Tensor, lengths: Tensor, batch_first: bool) -> bool:
    """Whether they can be lengths of sequences in order; otherwise torch says what is wrong."""
    T, B = (x.shape[1], x.shape[0]) if batch_first else x.shape[:2]
    possible = lengths.shape == (B,) and B > 0
    return possible and int(lengths[-1]) >= 1 and int(lengths[0]) <= T and not bool((lengths.diff() > 0).any())


def _packed(x: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """The rows of the first time step, of the second, ..., and how many each has; `lengths` do not rise."""
    T, B = (x.shape[1], x.shape[0]) if batch_first else x.shape[:2]
    there = torch.arange(int(lengths[0])).unsqueeze(1) < lengths
    time, sequence = there.nonzero(as_tuple=True)
    index = sequence * T + time if batch_first else time * B + sequence
    return rows(x.flatten(0, 1), index.to(x.device)), there.sum(1)


class _Call(NamedTuple):
    """What `torch.lstm` is called with, its rows packed: those of the first time step, of the second, ...

    Attributes:
        data: Shape `(N, inputs)`.
        sizes: How many rows each time step has; they never rise.
        initial: `h` and `c`, shape `(layers * directions, B, H)`.
        weights: For each layer and direction `W_ih`, `W_hh`, and the biases if there are any.
        directions: 1 or 2.
        batch_first: Whether padded results have the batch in front.
    """

    data: Tensor
    sizes: list[int]
    initial: Sequence[Tensor]
    weights: list[Sequence[Tensor]]
    directions: int
    batch_first: bool

    def run(self, is_curved: Callable[[], bool], packed: bool) -> tuple[Tensor, Tensor, Tensor]:
        """What `torch.lstm` returns."""
        x, steps, lasts = self.data, steps_of(self.sizes, self.data.device), []
        for start in range(0, len(self.weights), self.directions):
            outputs = []
            for k in range(start, start + self.directions):
                way = steps.backwards if k > start else None
                W_ih, W_hh, *biases = self.weights[k]
                W, b = torch.cat([W_ih, W_hh], 1), sum(biases) if biases else W_ih.new_zeros(len(W_ih))
                initial = [t[k] for t in self.initial]
                *last, _, h, _ = Layer.apply(x if way is None else rows(x, way), *initial, W, b, steps, is_curved)
                h = h[len(initial[0]) :]
                outputs.append(h if way is None else rows(h, way))
                lasts.append(last)
            x = torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]
        if not packed:
            x = x.unflatten(0, (len(self.sizes), -1))
            x = x.transpose(0, 1) if self.batch_first else x
        h, c = map(torch.stack, zip(*lasts, strict=True))
        return x, h, c


def _of_packed(
    data: Tensor, batch_sizes: Tensor, initial: Any, weights: Any, has_biases: bool, layers: int, dropout: float,
    train: bool, bidirectional: bool,
) -> _Call | None:  # fmt: skip
    if dropout and train:
        return None
    return _call(data, batch_sizes.tolist(), initial, weights, has_biases, layers, bidirectional, False)


def _of_padded(
    x: Tensor, initial: Any, weights: Any, has_biases: bool, layers: int, dropout: float, train: bool,
    bidirectional: bool, batch_first: bool,
) -> _Call | None:  # fmt: skip
    if (dropout and train) or x.ndim != 3 or not x.numel():
        return None
    x = x.transpose(0, 1) if batch_first else x
    sizes = [x.shape[1]] * len(x)
    return _call(x.flatten(0, 1), sizes, initial, weights, has_biases, layers, bidirectional, batch_first)


def _call(
    data: Tensor, sizes: list[int], initial: Any, weights: Any, has_biases: bool, layers: int, bidirectional: bool,
    batch_first: bool,
) -> _Call | None:  # fmt: skip
    """The call, or None if it has a form that is torch's alone."""
    directions = 2 if bidirectional else 1
    each = 4 if has_biases else 2
    tensors = [data, *initial, *weights]
    if len(weights) != each * layers * directions or any(t.dtype != data.dtype for t in tensors):
        return None  # projections have a weight more
    if torch.is_autocast_enabled(data.device.type):
        return None
    cut = [weights[start : start + each] for start in range(0, len(weights), each)]
    return _Call(data, sizes, initial, cut, directions, batch_first)
