"""Iterates of a stretch of LiSSA steps, of one leaf each, in the form that makes cheap what its batches see of them.

A step is `h_(j+1) = v + e h_j - S_j^T p_j / scale`: a batch sees `S_j h_j` and answers with `p_j`. With
`s_j = 1 + e + ... + e^(j-1)`,

    h_j = e^j u_j + s_j v,    u_(j+1) = u_j - x_j,    x_j = S_j^T p_j / (scale e^(j+1))

so that v and the decay e need not be seen to until the stretch ends, and `|h_(j+1)|` and `|h_(j+1) - h_j|` follow from
`|u_0|`, `|v|`, `<u_0, v>` and the inner products of each `x_j` with `u_j`, `v` and itself. Knows tensors of K stacked
right-hand sides; knows nothing of losses, nor of when a run has failed.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lissa import host
from lissa.last_layer import LastLayer
from lissa.stacked import norms, vdots
from lissa.types import Params


class Pace(NamedTuple):
    """The numbers that n steps of a stretch have in common.

    Attributes:
        c: `1 - e`, damping over scale.
        rate: `1 / scale`.
        powers: `e^0, ..., e^n`.
        sums: `s_0, ..., s_n`.
    """

    c: float
    rate: float
    powers: list[float]
    sums: list[float]

    @classmethod
    def of(cls, steps: int, c: float, rate: float) -> "Pace":
        """Of so many steps."""
        powers = [(1 - c) ** j for j in range(steps + 1)]
        return cls(c, rate, powers, [0.0, *itertools.accumulate(powers[:-1])])

    def __len__(self) -> int:
        return len(self.powers) - 1


class Squares(NamedTuple):
    """Of each step and right-hand side, shape `(steps, K)`: `|h_(j+1) - h_j|^2`, `|h_(j+1)|^2`."""

    residuals: Tensor
    iterates: Tensor


class Iterates(Protocol):
    """The iterates of a stretch, which end where they were told to."""

    def seen(self, j: int) -> Tensor:
        """`S_j h_j`, shape `(K, rows, m)`."""
        ...

    def step(self, j: int, p: Tensor) -> None:
        """Takes step j with the product `p_j` of the shape of what was seen."""
        ...

    def end(self) -> Squares:
        """Writes `h_n`, and tells what the steps were."""
        ...


class Whole:
    """Of a leaf that batches see as it is, `S_j = I`.

    Args:
        h: The first iterate, shape `(K, *shape)`.
        v: Right-hand sides.
        onward: Where the last iterate goes; it may be `h` itself.
        pace: Of the stretch.
    """

    def __init__(self, h: Tensor, v: Tensor, onward: Tensor, pace: Pace):
        self._h, self._v, self._pace = onward, v, pace
        self._residual = torch.empty_like(onward)  # the same in all steps: new memory is slow
        if onward is not h:
            onward.copy_(h)
        self._residuals: list[Tensor] = []
        self._iterates: list[Tensor] = []

    def seen(self, j: int) -> Tensor:
        """See `Iterates`."""
        return self._h

    def step(self, j: int, p: Tensor) -> None:
        """See `Iterates`."""
        residual = torch.sub(self._v, p, alpha=self._pace.rate, out=self._residual)
        self._h.add_(residual.sub_(self._h, alpha=self._pace.c))
        self._residuals.append(_square(residual))
        self._iterates.append(_square(self._h))

    def end(self) -> Squares:
        """See `Iterates`."""
        return Squares(torch.stack(self._residuals), torch.stack(self._iterates))


class Lookup(NamedTuple):
    """What a batch looks up in a matrix: `S W = W[rows][places]`, without gradient where `dropped`.

    Attributes:
        rows: Those that are looked up, each once.
        places: Which of `rows` each output is.
        dropped: Shape `(outputs, 1)`; None if there are none.
    """

    rows: Tensor
    places: Tensor
    dropped: Tensor | None

    @classmethod
    def of(cls, indices: Tensor, padding: int | None) -> "Lookup":
        """Of indices of any shape."""
        rows, places = torch.unique(indices.flatten(), return_inverse=True)
        return cls(rows, places, None if padding is None else (indices == padding).reshape(-1, 1))


class LookedUp:
    """Of a matrix of which each batch sees some rows: of the others nothing is touched before the stretch ends.

    Args:
        lookups: Of each batch.
        h: As for `Whole`, shape `(K, V, m)`.
        v: As for `Whole`.
        onward: As for `Whole`.
        pace: As for `Whole`.
    """

    def __init__(self, lookups: Sequence[Lookup], h: Tensor, v: Tensor, onward: Tensor, pace: Pace):
        self._lookups, self._u, self._v, self._pace = lookups, onward, v, pace
        self._chain = _Chain(pace, {"": h}, {"": v}, fresh=h is v)
        self._products: list[tuple[Tensor, Tensor, Tensor]] = []  # <x_j, u_j>, <x_j, v>, <x_j, x_j>
        if onward is not h:
            onward.copy_(h)

    def seen(self, j: int) -> Tensor:
        """See `Iterates`."""
        rows, places, dropped = self._lookups[j]
        self._u_rows, self._v_rows = self._u.index_select(1, rows), self._v.index_select(1, rows)
        h_rows = (self._u_rows * self._pace.powers[j]).add_(self._v_rows, alpha=self._pace.sums[j])
        return _without(h_rows.index_select(1, places), dropped)

    def step(self, j: int, p: Tensor) -> None:
        """See `Iterates`."""
        rows, places, dropped = self._lookups[j]
        x = torch.zeros_like(self._u_rows).index_add_(1, places, _without(p, dropped))
        x.mul_(self._pace.rate / self._pace.powers[j + 1])
        self._u.index_copy_(1, rows, self._u_rows - x)
        self._products.append((vdots({"": x}, {"": self._u_rows}), vdots({"": x}, {"": self._v_rows}), _square(x)))

    def end(self) -> Squares:
        """See `Iterates`."""
        self._u.mul_(self._pace.powers[-1]).add_(self._v, alpha=self._pace.sums[-1])
        return self._chain.squares(*map(torch.stack, zip(*self._products, strict=True)))


class Multiplied:
    """Of a matrix, and a bias perhaps, that each batch multiplies by its inputs `a`.

    Nothing of the iterate is touched before the stretch ends: `u_j a` is that of `u_0` less what the inner products of
    `a` with the inputs of the steps before make of their answers, as in blocked triangular solves.

    Args:
        layer: The keys of the matrix and the bias.
        inputs: Of all batches, with what follows from them.
        h: As for `Whole`, with the keys of the layer.
        v: As for `Whole`.
        onward: As for `Whole`.
        pace: As for `Whole`.
    """

    def __init__(self, layer: LastLayer, inputs: "Inputs", h: Params, v: Params, onward: Params, pace: Pace):
        self._layer, self._inputs, self._pace = layer, inputs, pace
        self._h, self._v, self._onward = h, v, onward
        self._fresh = all(h[k] is v[k] for k in h)
        self._chain = _Chain(pace, h, v, fresh=self._fresh)
        self._K = len(next(iter(v.values())))
        self._of_v = layer.outputs(inputs.rows, v)
        of_h = self._of_v if self._fresh else layer.outputs(inputs.rows, h)
        shares = [total / power for total, power in zip(pace.sums[:-1], pace.powers[:-1], strict=True)]
        seen = torch.addcmul(of_h, self._of_v, inputs.of_rows(shares))  # becomes S_j h_j / e^j, step by step
        self._y = torch.empty_like(seen)  # answers, x_j = y_j a^T / scale
        self._own = torch.empty_like(seen)  # what x_j gives for the inputs of step j
        self._seen = seen
        self._shares = shares

    def seen(self, j: int) -> Tensor:
        """See `Iterates`."""
        start, stop = self._inputs.starts[j], self._inputs.starts[j + 1]
        z = self._seen[start:stop]
        if start:
            z.addmm_(self._inputs.gram[start:stop, :start], self._y[:start], alpha=-self._pace.rate)
        return (z * self._pace.powers[j]).unflatten(1, (self._K, -1)).transpose(0, 1)

    def step(self, j: int, p: Tensor) -> None:
        """See `Iterates`."""
        start, stop = self._inputs.starts[j], self._inputs.starts[j + 1]
        y = self._y[start:stop]
        torch.div(p.transpose(0, 1), self._pace.powers[j + 1], out=y.unflatten(1, (self._K, -1)))
        torch.mm(self._inputs.gram[start:stop, start:stop], y, out=self._own[start:stop])

    def end(self) -> Squares:
        """See `Iterates`."""
        with_seen, with_v, with_itself = (self._of_steps(t) for t in (self._seen, self._of_v, self._own))
        shares = host.to_device(torch.tensor(self._shares, dtype=with_v.dtype), with_v.device).unsqueeze(1)
        rate = self._pace.rate
        self._form()
        return self._chain.squares((with_seen - with_v * shares) * rate, with_v * rate, with_itself * rate**2)

    def _of_steps(self, t: Tensor) -> Tensor:
        """`<y_j, t_j>` of each step and right-hand side, shape `(steps, K)`."""
        m = self._y.shape[1] // self._K
        of_rows = torch.bmm(self._y.reshape(-1, 1, m), t.reshape(-1, m, 1)).reshape(len(self._y), -1)
        sizes = self._inputs.sizes
        if len(set(sizes)) == 1:
            return of_rows.unflatten(0, (-1, sizes[0])).sum(1)
        return torch.stack([some.sum(0) for some in of_rows.split(sizes)])

    def _form(self) -> None:
        """`h_n` into `onward`."""
        power, total, rate = self._pace.powers[-1], self._pace.sums[-1], self._pace.rate
        for k, into in self._onward.items():
            base, more = (self._v[k], power + total) if self._fresh else (self._h[k], power)
            if k == self._layer.weight:
                rows = into.flatten(0, 1)
                options = {"beta": more, "alpha": -rate * power}
                torch.addmm(base.flatten(0, 1), self._y.mT, self._inputs.rows, **options, out=rows)
            else:
                torch.add(base * more, self._y.sum(0).reshape(base.shape), alpha=-rate * power, out=into)
            if not self._fresh:
                into.add_(self._v[k], alpha=total)


class Inputs:
    """The inputs of a stretch's batches to one layer, and their inner products.

    Args:
        layer: The layer.
        inputs: Of each batch, shape `(rows, d)`.
    """

    def __init__(self, layer: LastLayer, inputs: Sequence[Tensor]):
        self.sizes = [len(each) for each in inputs]
        self.starts = [0, *itertools.accumulate(self.sizes)]
        self.rows = torch.cat([*inputs])
        self.gram = layer.gram(self.rows)

    def of_rows(self, numbers: Sequence[float]) -> Tensor:
        """A number for each step as one for each row, shape `(rows, 1)`."""
        of_rows = [number for number, size in zip(numbers, self.sizes, strict=True) for _ in range(size)]
        return host.to_device(torch.tensor(of_rows, dtype=self.rows.dtype), self.rows.device).unsqueeze(1)


class _Chain:
    """`|h_(j+1) - h_j|^2` and `|h_(j+1)|^2`, from the inner products of x_j with u_j, v and itself."""

    def __init__(self, pace: Pace, h: Params, v: Params, *, fresh: bool):
        self._pace = pace
        self._v_v = norms(v).square()
        self._h_h, self._h_v = (self._v_v, self._v_v) if fresh else (norms(h).square(), vdots(h, v))

    def squares(self, x_u: Tensor, x_v: Tensor, x_x: Tensor) -> Squares:
        """Both are the squares of `alpha u_j + beta v - e^(j+1) x_j`; the inner products are of shape `(steps, K)`."""
        u_u, u_v = _before(x_x - 2 * x_u, self._h_h), _before(-x_v, self._h_v)
        numbers = self._pace.powers[1:], self._pace.powers[:-1], self._pace.sums[1:]
        power, last, total = host.to_device(torch.tensor(numbers, dtype=x_v.dtype), x_v.device).unsqueeze(2)

        def square(alpha: Tensor, beta: Tensor) -> Tensor:
            found = alpha.square() * u_u + 2 * alpha * beta * u_v + beta.square() * self._v_v
            found = found - 2 * power * (alpha * x_u + beta * x_v) + power.square() * x_x
            return found.clamp_min(0)

        return Squares(square(power - last, last), square(power, total))


def _before(changes: Tensor, first: Tensor) -> Tensor:
    """`first` plus the changes of the steps before, for each step, shape `(steps, K)`."""
    return torch.cat([first.unsqueeze(0), changes[:-1]]).cumsum(0)


def _square(t: Tensor) -> Tensor:
    """`|t_k|^2`, shape `(K,)`."""
    return norms({"": t}).square()


def _without(t: Tensor, dropped: Tensor | None) -> Tensor:
    return t if dropped is None else t.masked_fill(dropped, 0)
