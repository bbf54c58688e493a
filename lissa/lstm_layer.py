"""A layer of an LSTM whose second derivatives are a few large passes, for one vector or many.

The two sweeps over time that a Hessian-vector product adds to a gradient are written out, for K vectors at once: the
forward pass differentiated in a direction (Pearlmutter's R operator), and one backward pass for all that depends on it.
What can be computed for all time steps is computed outside their loops.

Knows recurrences and packed rows; knows nothing of modules, losses, or of what the vectors are.

In a time step, with `s` the logistic function and all products but those with W elementwise,

    i, f, g, o = s(a_i), s(a_f), tanh(a_g), s(a_o),   a = W z + b,   z = (x, h_before),
    c = f c_before + i g,   h = o tanh(c),

and so, in a direction, written `'`:

    c' = f c_before' + sum over i, f, g of q a',   h' = e c' + q_o a_o',
    q = (g s'(a_i), c_before s'(a_f), i tanh'(a_g), tanh(c) s'(a_o)),   e = o (1 - tanh(c)^2),

while a backward pass is the transpose of that: `dc = .. + e dh`, `da = (q_i dc, q_f dc, q_g dc, q_o dh)`, and on to the
step before, `dc_before = f dc`, `dh_before = W^T da`.

Source: B. A. Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6 (1994), sections 3 and 4.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lissa.leafwise import is_constant
from lissa.parts import row_parts


@dataclass(frozen=True, eq=False)
class Steps:
    """Which rows belong together; one thing to torch's transforms, which take tuples apart at each call.

    Attributes:
        sizes: Rows of each time step.
        before: For each row, where its state before is: of B initial ones, and then those of the rows.
        last: For each sequence, its last row.
        backwards: For each row, the one that takes its place when sequences run backwards.
    """

    sizes: list[int]
    before: Tensor
    last: Tensor
    backwards: Tensor

    def own(self, states: Tensor) -> Sequence[Tensor]:
        """Of B initial states and those of all rows: for each time step, its own."""
        return states.split([self.sizes[0], *self.sizes])[1:]

    def earlier(self, states: Tensor) -> list[Tensor]:
        """Those that the rows of each time step follow; of states may be several for each row."""
        count = len(states) // (self.sizes[0] + len(self.before))
        sizes = [size * count for size in self.sizes]
        parts = states.split([sizes[0], *sizes])
        return [part if len(part) == size else part[:size] for part, size in zip(parts, sizes, strict=False)]

    def sent_before(self, states: Tensor) -> Tensor:
        """For B initial states and those of all rows, what each row says of its state before; 0 if it is of none."""
        sent = states.new_zeros(self.sizes[0] + len(self.before), *states.shape[1:])
        return sent.index_copy_(0, self.before, states)


def steps_of(sizes: list[int], device: torch.device) -> Steps:
    """The steps of packed rows, `sizes` of them at each time; the rows of a time are in order of sequence.

    Example:
        >>> steps = steps_of([2, 1], torch.device("cpu"))
        >>> steps.before.tolist(), steps.last.tolist(), steps.backwards.tolist()
        ([0, 1, 2], [2, 1], [2, 1, 0])
    """
    size = torch.tensor(sizes)
    start = size.cumsum(0) - size
    time = torch.repeat_interleave(torch.arange(len(sizes)), size)
    sequence = torch.arange(len(time)) - start[time]
    length = torch.bincount(sequence)
    before = torch.where(time > 0, sizes[0] + start[time - 1], 0) + sequence
    last = start[length - 1] + torch.arange(sizes[0])
    backwards = start[length[sequence] - 1 - time] + sequence
    return Steps(sizes, *(t.to(device) for t in (before, last, backwards)))


class _Kept(NamedTuple):
    """What the derivatives of a layer need of its forward pass, for N rows.

    Attributes:
        z: `(x, h_before)`, shape `(N, I + H)`.
        gates: `i, f, g, o`, shape `(N, 4, H)`.
        tanh_c: `tanh(c)`, shape `(N, H)`.
        c_before: The cells before.
        q: `q_i, q_f, q_g, q_o`.
        e: `e`.
        W: `(W_ih, W_hh)`, shape `(4 H, I + H)`.
    """

    z: Tensor
    gates: Tensor
    tanh_c: Tensor
    c_before: Tensor
    q: Tensor
    e: Tensor
    W: Tensor

    @property
    def inputs(self) -> int:
        """`I`."""
        return self.W.shape[1] - self.e.shape[1]

    @classmethod
    def of(cls, z: Tensor, gates: Tensor, tanh_c: Tensor, c_before: Tensor, W: Tensor) -> "_Kept":
        """With `q` and `e`."""
        q = _slopes(gates).mul_(_factors(gates, tanh_c, c_before))
        e = gates[:, 3] - gates[:, 3] * tanh_c.square()
        return cls(z, gates, tanh_c, c_before, q, e, W)


def _slopes(gates: Tensor) -> Tensor:
    """`s'(a_i), s'(a_f), tanh'(a_g), s'(a_o)`."""
    slopes = gates - gates.square()
    slopes[:, 2] = 1 - gates[:, 2].square()
    return slopes


def _factors(gates: Tensor, tanh_c: Tensor, c_before: Tensor) -> Tensor:
    """`q` without the slopes: `g, c_before, i, tanh(c)`."""
    return torch.stack([gates[:, 2], c_before, gates[:, 0], tanh_c], 1)


class Layer(torch.autograd.Function):
    """Of one layer in one direction the last `h, c` of each sequence and all it went through, from `x, h, c, W, b`.

    That is the gates, shape `(N, 4, H)`, and all `h` and `c`, the B initial ones first. A gradient is a function of
    these too, so that what its derivatives say of them and what the loss says go back in one sweep. In autograd's graph
    a node keeps the latest gradient in the rows `W z + b`, and `z`, as `da` and `z`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h: Tensor, c: Tensor, W: Tensor, b: Tensor, steps: Steps, is_curved: Callable[[], bool]
    ) -> tuple[Tensor, ...]:
        """See the class; whether a gradient is curved, in the sense of `lissa.lstm`, is asked when it is taken."""
        (N, I), (B, H) = x.shape, h.shape  # noqa: E741
        gates, tanh_c = torch.addmm(b, x, W[:, :I].mT).unflatten(1, (4, H)), x.new_empty(N, H)
        states_h, states_c = (torch.cat([t, t.new_empty(N, H)]) for t in (h, c))
        to_gates = W[:, I:].mT
        per_step = zip(
            *(t.split(steps.sizes) for t in (gates.flatten(1), gates, tanh_c)),
            *(cut(t) for t in (states_h, states_c) for cut in (steps.earlier, steps.own)), strict=True,
        )  # fmt: skip
        for flat, gates_t, tanh_t, h_before, h_t, c_before, c_t in per_step:
            flat.addmm_(h_before, to_gates)
            i, f, g, o = gates_t.unbind(1)
            for gate, activate in ((gates_t[:, :2], torch.sigmoid_), (g, torch.tanh_), (o, torch.sigmoid_)):
                activate(gate)
            torch.mul(f, c_before, out=c_t).addcmul_(i, g)
            torch.mul(o, torch.tanh(c_t, out=tanh_t), out=h_t)
        if any(ctx.needs_input_grad):
            z = torch.cat([x, states_h[steps.before]], 1)
            kept = _Kept.of(z, gates, tanh_c, states_c[steps.before], W)
            ctx.save_for_backward(x, states_h, states_c, *kept)
        ctx.steps, ctx.is_curved = steps, is_curved
        ctx.set_materialize_grads(False)
        return states_h[B:][steps.last], states_c[B:][steps.last], gates, states_h, states_c

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        """The gradients, with their own graph."""
        if all(t is None for t in cotangents):
            return (None,) * 7
        x, h, c, *of_kept = ctx.saved_tensors
        kept, B = _Kept(*of_kept), ctx.steps.sizes[0]
        curved = ctx.is_curved()
        at = [t if curved else t.detach() for t in (kept.gates, h, c, x, kept.W)]
        dh_last, dc_last, dgates, dh, dc = cotangents
        given = [torch.zeros_like(t) if dt is None else dt for dt, t in ((dh_last, h[:B]), (dc_last, c[:B]))]
        given += [dgates, *(torch.zeros_like(t) if dt is None else dt for dt, t in ((dh, h), (dc, c)))]
        of_all = _Backward.apply(*given, *at, *(t.detach() for t in kept), ctx.steps)
        if is_constant():  # of many vectors, nobody asks
            ctx.z, ctx.da = kept.z, of_all[_FIVE]
        return *of_all[:_FIVE], None, None


WEIGHTS, BIAS = 3, 4
"""Places of `W` and `b` among the arguments of `Layer`."""

_FIVE = 5
"""So many are the results of `Layer`, the tensors it is a function of, and those that its gradients are taken at."""


class _Backward(torch.autograd.Function):
    """The gradients of `Layer` in `x`, the initial `h` and `c`, `W` and `b`, for cotangents of what it returns.

    Besides `da` of all rows, and `dh` and `dc` of all states, which no derivative is taken of.
    """

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        *of_kept, steps = inputs[2 * _FIVE :]
        cotangents: list[Any] = [None if t is None else t.unsqueeze(1) for t in inputs[:_FIVE]]
        of_all = _gradients(_Kept(*of_kept), steps, *cotangents)
        return tuple(t.squeeze(dim) for t, dim in zip(of_all, _Backward.stacked, strict=True))

    stacked = (1, 1, 1, 0, 0, 1, 1, 1)
    """Which dimension of each result is that of the vectors."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *of_kept, ctx.steps = inputs[2 * _FIVE :]
        ctx.mark_non_differentiable(*output[_FIVE:])
        ctx.save_for_backward(*of_kept, *output[_FIVE:], inputs[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        """Of K cotangents in one sweep."""
        _refuse_stacked(in_dims[_FIVE:])
        *of_kept, steps = inputs[2 * _FIVE :]
        each = zip(inputs[:_FIVE], in_dims[:_FIVE], strict=True)
        cotangents: list[Any] = [None if t is None else _stacked(t, dim, info.batch_size, 1) for t, dim in each]
        return _gradients(_Kept(*of_kept), steps, *cotangents), _Backward.stacked

    @staticmethod
    def backward(ctx: Any, *vectors: Tensor | None) -> Any:
        *of_kept, da, dh, dc, dgates = ctx.saved_tensors
        kept, B = _Kept(*of_kept), ctx.steps.sizes[0]
        like = (kept.z[:, : kept.inputs], kept.e[:B], kept.e[:B], kept.W, kept.W[:, 0])
        given = [torch.zeros_like(t) if v is None else v for v, t in zip(vectors[:_FIVE], like, strict=True)]
        curved = any(ctx.needs_input_grad[_FIVE : 2 * _FIVE])
        last_h, last_c, h, c, *more = _Directional.apply(*given, *kept, da, dh, dc, dgates, ctx.steps, curved)
        gates = None if dgates is None else more.pop(0)
        return last_h, last_c, gates, h, c, *(more or (None,) * _FIVE), *(None,) * (len(of_kept) + 1)


class _Directional(torch.autograd.Function):
    """The gradient of `<v, gradients of Layer>` in the cotangents and, if curved, in what those are taken at."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        vectors = (v.unsqueeze(dim) for v, dim in zip(inputs[:_FIVE], _Directional.stacked, strict=True))
        return tuple(t.squeeze(dim) for t, dim in zip(*_along(*vectors, *inputs[_FIVE:]), strict=True))

    stacked = (1, 1, 1, 0, 0)
    """Which dimension of each vector is that of the vectors."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        """Of K vectors in one sweep."""
        _refuse_stacked(in_dims[_FIVE:])
        each = zip(inputs[:_FIVE], in_dims[:_FIVE], _Directional.stacked, strict=True)
        return _along(*(_stacked(v, dim, info.batch_size, to) for v, dim, to in each), *inputs[_FIVE:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise NotImplementedError("An LSTM inside `DirectionalLSTM` has no third derivative.")


class _Rows(torch.autograd.Function):
    """`y_j = x_i(j)` for some rows, each of them once; or the transpose, `y_i(j) = x_j`, and 0 elsewhere."""

    @staticmethod
    def forward(x: Tensor, i: Tensor, count: int, transposed: bool) -> Tensor:
        return x.new_zeros(count, *x.shape[1:]).index_copy_(0, i, x) if transposed else x.index_select(0, i)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.count, ctx.transposed = inputs[2:]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        _refuse_stacked(in_dims[1:])
        return _Rows.apply(inputs[0].movedim(in_dims[0], 1), *inputs[1:]), 1

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        return _Rows.apply(*cotangents, *ctx.saved_tensors, ctx.count, not ctx.transposed), None, None, None


def rows(x: Tensor, i: Tensor) -> Tensor:
    """`x[i]`, each row at most once."""
    return _Rows.apply(x, i, len(x), False)


def _gradients(
    kept: _Kept, steps: Steps, dh_last: Tensor, dc_last: Tensor, dgates: Tensor | None, dh: Tensor, dc: Tensor
) -> tuple[Tensor, ...]:
    """What `_Backward` computes, for K cotangents of each result of `Layer`, stacked in dimension 1."""
    B, K, H = dh_last.shape
    dh, dc = (t.clone(memory_format=torch.contiguous_format) for t in (dh, dc))
    dh[B:].index_add_(0, steps.last, dh_last)
    dc[B:].index_add_(0, steps.last, dc_last)
    da = dh.new_zeros(len(kept.e), K, 4, H) if dgates is None else dgates * _slopes(kept.gates).unsqueeze(1)
    da = da.contiguous()
    _sweep_back(da, dh, dc, kept, steps)
    return _of_inputs(da, kept), dh[:B], dc[:B], _of_weights(da, kept), da.sum(0).flatten(1), da.flatten(2), dh, dc


def _along(
    v_x: Tensor, v_h: Tensor, v_c: Tensor, v_W: Tensor, v_b: Tensor, *kept_and_cotangents: Any
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Derivatives in K directions: of what `Layer` returns, and of its gradients for cotangents that do not vary.

    Args:
        v_x: Directions of `x`, shape `(N, K, I)`.
        v_h: Of the initial `h`, shape `(B, K, H)`.
        v_c: Of the initial `c`.
        v_W: Of `W`, shape `(K, 4 H, I + H)`.
        v_b: Of `b`, shape `(K, 4 H)`.
        *kept_and_cotangents: What was kept, `da`, all `dh` and `dc`, the cotangent of the gates if there is one, the
            steps, and whether derivatives of the gradients are asked for.

    Returns:
        The derivatives, and which dimension of each is that of the directions.
    """
    *of_kept, _, _, _, dgates, steps, curved = kept_and_cotangents
    kept, (B, K, H), I = _Kept(*of_kept), v_h.shape, v_x.shape[2]  # noqa: E741
    W_z = torch.addmm(v_b.flatten(), kept.z, v_W.permute(2, 0, 1).flatten(1)).view(-1, 4 * H)  # W' z + b'
    a_ = W_z.addmm_(v_x.reshape(-1, I), kept.W[:, :I].mT).view(-1, K, 4, H)  # + W z', but for W h_before'
    h_, c_ = _swept_forward(a_, v_h, v_c, kept, steps)
    of_gates = () if dgates is None else (a_ * _slopes(kept.gates).unsqueeze(1),)
    of_results = h_[B:][steps.last], c_[B:][steps.last], h_, c_, *of_gates
    if not curved:
        return of_results, (1,) * len(of_results)
    of_point = _curvature(v_x, v_W, a_, h_, c_, *kept_and_cotangents[:-1])
    return (*of_results, *of_point), (*(1,) * len(of_results), 1, 1, 1, 1, 0)


def _curvature(
    v_x: Tensor, v_W: Tensor, a_: Tensor, h_: Tensor, c_: Tensor, *kept_and_cotangents: Any
) -> tuple[Tensor, ...]:
    """Derivatives of `<v, gradients>` in the gates, all `h` and `c`, `x` and `W`, each as if it were free.

    That is `sum over rows of a' . da + c' e dh + c_before' f dc + da . (W' z + W z')` with
    `da = slopes (dgates + factors d)`, in which `a', h', c'` and `da, dh, dc` are constants.
    """
    *of_kept, da, dh, dc, dgates, steps = kept_and_cotangents
    kept, B, (K, I) = _Kept(*of_kept), steps.sizes[0], v_x.shape[1:]  # noqa: E741
    of_gates, of_c_before, of_c_here = torch.empty_like(a_), torch.empty_like(c_[B:]), torch.empty_like(c_[B:])
    of_rows = [kept.gates, kept.tanh_c, kept.c_before, dh[B:], dc[B:], a_, c_[steps.before], c_[B:], of_gates,
               of_c_before, of_c_here, *([] if dgates is None else [dgates])]  # fmt: skip
    for some in row_parts(a_[0].numel(), *of_rows):
        _bend(*some)
    of_c = steps.sent_before(of_c_before)
    of_c[B:].add_(of_c_here)
    W_da = (da @ v_W.transpose(0, 1).flatten(1)).unflatten(1, (K, -1))  # W'^T da
    of_h = steps.sent_before(W_da[:, :, I:])
    z_ = torch.cat([v_x, h_[steps.before]], 2)
    of_W = (da.mT @ z_.flatten(1)).unflatten(1, (K, -1)).transpose(0, 1)
    return of_gates, of_h, of_c, W_da[:, :, :I], of_W


def _bend(
    gates: Tensor, tanh_c: Tensor, c_before: Tensor, dh: Tensor, dc: Tensor, a_: Tensor, c_before_: Tensor, c_: Tensor,
    of_gates: Tensor, of_c_before: Tensor, of_c_here: Tensor, dgates: Tensor | None = None,
) -> None:  # fmt: skip
    """What `_curvature` finds row by row, of some rows, into the three tensors `of_...`."""
    slopes, factors = _slopes(gates), _factors(gates, tanh_c, c_before)
    bends = 1 - 2 * gates  # s'' / s'
    bends[:, 2] -= 1  # tanh'' / tanh'
    d = torch.stack([dc, dc, dc, dh], 1)
    bends *= factors.mul_(d) if dgates is None else factors.mul_(d).add_(dgates)
    i_d, f_d, g_d, o_d = slopes.mul_(d).unsqueeze(1).unbind(2)
    falls = 1 - tanh_c.square()  # tanh'(c)
    a_i, a_f, a_g, a_o = a_.unbind(2)
    of_i, of_f, of_g, of_o = torch.mul(a_, bends.unsqueeze(1), out=of_gates).unbind(2)
    of_i.addcmul_(a_g, g_d)
    of_g.addcmul_(a_i, i_d)
    of_f.addcmul_(c_before_, dc.unsqueeze(1))
    of_o.addcmul_(c_, (falls * dh).unsqueeze(1))
    torch.mul(a_f, f_d, out=of_c_before)
    torch.mul(a_o, o_d * falls.unsqueeze(1), out=of_c_here)
    of_c_here.addcmul_(c_, (gates[:, 3] * tanh_c * falls * dh).unsqueeze(1), value=-2)


def _swept_forward(a_: Tensor, h: Tensor, c: Tensor, kept: _Kept, steps: Steps) -> tuple[Tensor, Tensor]:
    """`h', c'` of the initial states and all rows for K directions; what is missing is added to `a'`, in place."""
    N, K, _, H = a_.shape
    h, c = (torch.cat([t, t.new_empty(N, K, H)]) for t in (h, c))
    to_gates = kept.W[:, kept.inputs :].mT
    parts = a_.split(steps.sizes), kept.q.unsqueeze(1).split(steps.sizes), *_per_step(a_, h, c, kept, steps)
    for a_t, q, flat, before, h_t, c_before, c_t, e, f in zip(*parts, strict=True):
        flat.addmm_(before, to_gates)
        i, f_, g, o = (q * a_t).unbind(2)
        torch.addcmul(i, f, c_before, out=c_t).add_(f_).add_(g)
        torch.addcmul(o, e, c_t, out=h_t)
    return h, c


def _sweep_back(da: Tensor, dh: Tensor, dc: Tensor, kept: _Kept, steps: Steps) -> None:
    """The backward pass for K cotangents, in place: in are terms of its own for each row, out are the sums.

    Args:
        da: Shape `(N, K, 4, H)`.
        dh: Shape `(B + N, K, H)`, the initial ones first.
        dc: The same.
        kept: Of the forward pass.
        steps: Its steps.
    """
    from_gates, q, B = kept.W[:, kept.inputs :], kept.q.unsqueeze(1), steps.sizes[0]
    of_gates = da[:, :, :3], q[:, :, :3], dc[B:].unsqueeze(2), da[:, :, 3], q[:, :, 3]
    parts = *(t.split(steps.sizes) for t in of_gates), *_per_step(da, dh, dc, kept, steps)
    from_last_on = [*zip(*parts, strict=True)][::-1]
    for da_ifg, q_ifg, dc_each, da_o, q_o, flat, before, dh_t, dc_before, dc_t, e, f in from_last_on:
        dc_t.addcmul_(e, dh_t)
        da_ifg.addcmul_(q_ifg, dc_each)
        da_o.addcmul_(q_o, dh_t)
        dc_before.addcmul_(f, dc_t)
        before.addmm_(flat, from_gates)


def _per_step(a: Tensor, h: Tensor, c: Tensor, kept: _Kept, steps: Steps) -> tuple[Sequence[Tensor], ...]:
    """For each time step `a` as a matrix, `h_before` as one, `h`, `c_before`, `c`, and `e`, `f`."""
    matrix = a.flatten(0, 1).flatten(1).split([size * a.shape[1] for size in steps.sizes])
    e, f = (t.unsqueeze(1).split(steps.sizes) for t in (kept.e, kept.gates[:, 1]))
    return matrix, steps.earlier(h.flatten(0, 1)), steps.own(h), steps.earlier(c), steps.own(c), e, f


def _of_weights(da: Tensor, kept: _Kept) -> Tensor:
    """`sum over rows of da z^T` for K cotangents, shape `(K, 4 H, I + H)`."""
    return (da.flatten(1).mT @ kept.z).unflatten(0, (da.shape[1], -1))


def _of_inputs(da: Tensor, kept: _Kept) -> Tensor:
    """`dx = W_ih^T da` for K cotangents, shape `(N, K, I)`."""
    return da.flatten(2) @ kept.W[:, : kept.inputs]


def _stacked(t: Tensor, dim: int | None, count: int, to: int) -> Tensor:
    """`t` with its vectors in the dimension `to`."""
    return t.movedim(dim, to) if dim is not None else t.unsqueeze(to).expand(*t.shape[:to], count, *t.shape[to:])


def _refuse_stacked(in_dims: Any) -> None:
    """Cotangents and vectors are what there are many of, and nothing else."""
    if any(dim is not None for dim in pytree.tree_leaves(in_dims)):
        raise NotImplementedError("`DirectionalLSTM` stacks vectors, not LSTMs or their inputs.")
