"""LiSSA for losses that see the parameters through one linear layer, in the space of that layer's outputs.

A step changes an iterate by `v` and by multiples of its batch's inputs. So what a stretch of steps sees, and how long
its iterates are, follows from the outputs that `v` and the first iterate give for these inputs, and from the inner
products of inputs; the iterate itself is formed once, at the end. Knows `lissa.last_layer`; knows nothing of modules or
data.
"""

import itertools
import math
import sys
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from lissa import checks, host, outcome, tree
from lissa.last_layer import Expansion, LastLayer
from lissa.outcome import RUNNING
from lissa.recursion import CHECK_EVERY, LissaRun
from lissa.stacked import judged, norms, start_stacked, vdots
from lissa.types import Params, Solution, Status


def solve_lissa_last_layer(
    layer: LastLayer,
    v: Params,
    batches: Iterable[Expansion],
    *,
    damping: float = 0.0,
    scale: float = 1.0,
    at_once: int | None = None,
    throw: bool = True,
) -> Solution:
    """`x_k ~ (H + damping I)^-1 v_k` by `h_k <- v_k + h_k - (H_t h_k + damping h_k) / scale`, `x_k = h_k / scale`.

    The same as `solve_lissa_stacked(layer, ...)`, up to rounding. Be `a_j` the inputs and `D_j` the Hessians of the B
    examples of step j, `e = 1 - damping / scale` and `s_j = 1 + e + ... + e^(j-1)`. Then a stretch of steps from `h` is

        h_n = e^n (h - x_0 - ... - x_(n-1)) + s_n v,    x_j = y_j a_j^T / scale
        y_j = D_j (u_j + (s_j / e^j) v a_j) / (B e)
        u_j = (h - x_0 - ... - x_(j-1)) a_j = h a_j - sum_(i < j) y_i (a_i . a_j) / scale

    and `|h_n|` and `|h_n - h_(n-1)|` follow from `|h|`, `|v|`, `<h, v>` and the inner products of each `x_j` with
    itself, `v` and the `h - x_0 - ...` before it. See also blocked triangular solves, which go about it in this way.

    Args:
        layer: What the losses are expanded in.
        v: K right-hand sides, stacked.
        batches: One batch a step; each has equal weight.
        damping: In the units of `H`.
        scale: In the units of `H`. The step size is `1 / scale`; it never changes the answer.
        at_once: Right-hand sides that take a stretch together, so that they stay in a cache; all, if not given.
        throw: Whether a failure raises `SolverError`. If False, it is data: `status` names it, `value` is all NaN.

    Returns:
        The `Solution` of each right-hand side, stacked. The residual is the latest batch's, as in `solve_lissa`; of
        less than about `sqrt(eps) |v|` only that is known. Divergence is looked for at the steps 1, 4, 16, 32, ...

    Raises:
        ValueError: If `scale` is not > 0 or `damping` is not >= 0.
        SolverError: If the recursion diverges or meets NaN, and `throw` is True.

    Example:
        >>> from lissa import expansion_of_graph
        >>> z = torch.tensor([[1.0, 2.0]], requires_grad=True)  # W a with W = [[1], [2]], a = [1]
        >>> batch = expansion_of_graph((z**3).sum(1), z, torch.ones(1, 1))  # H = diag(6, 12)
        >>> layer, v = LastLayer("W", None), {"W": torch.tensor([[[7.0], [26.0]]])}
        >>> solution = solve_lissa_last_layer(layer, v, [batch] * 100, damping=1.0, scale=13.0)
        >>> solution.value["W"].flatten().round(decimals=4).tolist()
        [1.0, 2.0]

    Source: as `solve_lissa`.
    """
    call = "solve_lissa_last_layer"
    checks.params(call, v, "v")
    checks.non_negative(call, "damping", damping)
    checks.positive(call, "scale", scale)
    if at_once is not None:
        checks.count(call, "at_once", at_once)
    v, c = tree.map(Tensor.detach, v), damping / scale
    K = len(next(iter(v.values())))
    size = at_once or max(1, K)
    parts = [slice(k, k + size) for k in range(0, K, size)]
    run, h, trace = start_stacked(v), v, list[Tensor]()
    for batches_of_stretch in _stretches(batches, c):
        stretch = _Stretch(layer, batches_of_stretch, c, 1 / scale)
        fresh = h is v
        onward = tree.map(lambda t: t.new_empty(t.shape), v) if fresh else h
        found = []
        for part in parts:
            some = ({k: t[part] for k, t in x.items()} for x in (h, v, onward))
            found.append(stretch.take(*some, fresh=fresh))
        residual_norms, sizes = (torch.cat(t, 1) for t in zip(*found, strict=True))
        taken = sum(map(len, trace))
        run, h = _judged(run, residual_norms, sizes, trace, taken), onward
        if (taken + len(sizes)) // CHECK_EVERY > taken // CHECK_EVERY and not host.any_true(run.status == RUNNING):
            break
    solution = outcome.solution(
        {},
        status=run.status,
        residual_norm=run.state.residual_norm,
        length=run.length,
        steps=run.state.step,
        trace=[*torch.cat(trace)] if trace else [],
        random=True,
    )
    factor = torch.where(solution.status < Status.DIVERGED, torch.full_like(run.length, 1 / scale), torch.nan)
    scaled = torch.mul if h is v else Tensor.mul_
    x = tree.map(lambda t: scaled(t, factor.reshape(-1, *[1] * (t.ndim - 1))), h)
    solution = solution._replace(value=x, residual_trace=solution.residual_trace.mT)
    if throw:
        outcome.raise_on_failure(f"{call}(damping={damping:g}, scale={scale:g})", solution)
    return solution


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


def _stretches(batches: Iterable[Expansion], c: float) -> Iterator[list[Expansion]]:
    """Batches in lists of at most `most_rows` rows, or of one batch; of one step each where damping is strong."""
    most_steps = 1 if c > MOST_DAMPED else math.floor(math.log(SHRINKS) / math.log1p(-c)) if c else sys.maxsize
    waiting: list[Expansion] = []
    rows = 0
    for batch in batches:
        rows += len(batch.losses)
        if waiting and (rows > most_rows(batch.inputs.shape[1]) or len(waiting) == most_steps):
            yield waiting
            waiting, rows = [], len(batch.losses)
        waiting.append(batch)
    if waiting:
        yield waiting


class _Stretch:
    """Some steps, for any right-hand sides: the last iterate, and the norms of each step's residual and iterate."""

    def __init__(self, layer: LastLayer, batches: list[Expansion], c: float, rate: float):
        self.layer, self.batches, self.c, self.rate = layer, batches, c, rate
        self.apart = len(batches) == 1 or c > MOST_DAMPED
        if self.apart:
            return
        self.sizes = [len(batch.losses) for batch in batches]
        self.powers = [(1 - c) ** j for j in range(len(batches) + 1)]
        self.sums = [0.0, *itertools.accumulate(self.powers[:-1])]
        self.shares = [total / power for total, power in zip(self.sums[:-1], self.powers[:-1], strict=True)]
        self.inputs = torch.cat([batch.inputs for batch in batches])
        factors = self._of_rows([1 / (size * (1 - c)) for size in self.sizes])
        hessians = torch.cat([batch.hessians for batch in batches]) * factors.unsqueeze(2)
        self.hessians = hessians.split(self.sizes)
        self.gram = layer.gram(self.inputs)
        self.finite = torch.stack([*hessians.aminmax(), *self.gram.aminmax()]).isfinite().all()

    def take(self, h: Params, v: Params, onward: Params, *, fresh: bool) -> tuple[Tensor, Tensor]:
        """Writes the last iterate into `onward`, which may be `h` itself; `fresh` says that `h` is `v`.

        Returns:
            Norms of the residuals and of the iterates, each of shape `(steps, K)`.
        """
        if self.apart:
            return self._one_by_one(h, v, onward)
        y, residuals, iterates = self._in_outputs(h, v, fresh)
        self._form(y, h, v, onward, fresh)
        return residuals, iterates

    def _in_outputs(self, h: Params, v: Params, fresh: bool) -> tuple[Tensor, Tensor, Tensor]:
        """`y_j` of all steps, shape `(rows, K m)`, and the norms."""
        m, rate = self.hessians[0].shape[1], self.rate
        of_v = self.layer.outputs(self.inputs, v)
        of_h = of_v if fresh else self.layer.outputs(self.inputs, h)
        seen = torch.addcmul(of_h, of_v, self._of_rows(self.shares))  # becomes u_j + (s_j / e^j) v a_j, step by step
        y, own = torch.empty_like(seen), torch.empty_like(seen)  # own: what x_j gives for the inputs of step j
        start = 0
        for z, y_j, own_j, D in zip(*(t.split(self.sizes) for t in (seen, y, own)), self.hessians, strict=True):
            rows = self.gram[start : start + len(z)]
            z.addmm_(rows[:, :start], y[:start], alpha=-rate)
            torch.bmm(z.unflatten(1, (-1, m)), D, out=y_j.unflatten(1, (-1, m)))
            start += len(z)
            torch.mm(rows[:, start - len(z) : start], y_j, out=own_j)
        with_seen, with_v, with_itself = (self._of_steps(y, t, m) for t in (seen, of_v, own))
        with_before = with_seen - with_v * self._on_device(self.shares).unsqueeze(1)
        return y, *self._norms(h, v, fresh, with_before * rate, with_v * rate, with_itself * rate**2)

    def _of_rows(self, numbers: list[float]) -> Tensor:
        """A number for each step as one for each row, shape `(rows, 1)`."""
        rows = [number for number, size in zip(numbers, self.sizes, strict=True) for _ in range(size)]
        return self._on_device(rows).unsqueeze(1)

    def _on_device(self, numbers: list[float]) -> Tensor:
        return host.to_device(torch.tensor(numbers, dtype=self.inputs.dtype), self.inputs.device)

    def _of_steps(self, y: Tensor, t: Tensor, m: int) -> Tensor:
        """`<y_j, t_j>` of each step and right-hand side, shape `(steps, K)`."""
        of_rows = torch.bmm(y.reshape(-1, 1, m), t.reshape(-1, m, 1)).reshape(len(y), -1)
        if len(set(self.sizes)) == 1:
            return of_rows.unflatten(0, (-1, self.sizes[0])).sum(1)
        return torch.stack([some.sum(0) for some in of_rows.split(self.sizes)])

    def _norms(
        self, h: Params, v: Params, fresh: bool, x_before: Tensor, x_v: Tensor, x_x: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of `h_n - h_(n-1)` and `h_n`, from `<x_j, h - x_0 - ...>`, `<x_j, v>` and `<x_j, x_j>`.

        Both are `alpha (h - x_0 - ... - x_(n-2)) + beta v - e^n x_(n-1)`.
        """
        v_v = norms(v).square()
        h_h, h_v = (v_v, v_v) if fresh else (norms(h).square(), vdots(h, v))
        before, before_v = _before(x_x - 2 * x_before, h_h), _before(-x_v, h_v)
        of_steps = self.powers[1:], self.powers[:-1], self.sums[1:]
        power, last, total = (self._on_device(numbers).unsqueeze(1) for numbers in of_steps)

        def norm(alpha: Tensor, beta: Tensor) -> Tensor:
            square = alpha.square() * before + 2 * alpha * beta * before_v + beta.square() * v_v
            square = square - 2 * power * (alpha * x_before + beta * x_v) + power.square() * x_x
            return square.clamp_min(0).sqrt()

        residuals, iterates = norm(power - last, last), norm(power, total)
        overflown = ~iterates.isfinite() & self.finite & h_h.isfinite() & v_v.isfinite()
        return residuals, iterates.masked_fill(overflown, torch.inf)  # and not NaN, a difference of infinities

    def _form(self, y: Tensor, h: Params, v: Params, onward: Params, fresh: bool) -> None:
        """`h_n` into `onward`."""
        power, total = self.powers[-1], self.sums[-1]
        for k, into in onward.items():
            base, more = (v[k], power + total) if fresh else (h[k], power)
            if k == self.layer.weight:
                rows = into.flatten(0, 1)
                torch.addmm(base.flatten(0, 1), y.mT, self.inputs, beta=more, alpha=-self.rate * power, out=rows)
            else:
                torch.add(base * more, y.sum(0).reshape(base.shape), alpha=-self.rate * power, out=into)
            if not fresh:
                into.add_(v[k], alpha=total)

    def _one_by_one(self, h: Params, v: Params, onward: Params) -> tuple[Tensor, Tensor]:
        """`take`, with each iterate formed: for batches that are too long, and strong damping."""
        residuals, iterates = [], []
        for batch in self.batches:
            product = self.layer(batch, h)
            r = {k: (v[k] - t * self.c).sub_(product[k], alpha=self.rate) for k, t in h.items()}
            h = tree.add(h, r)
            residuals.append(norms(r))
            iterates.append(norms(h))
        for k, t in onward.items():
            t.copy_(h[k])
        return torch.stack(residuals), torch.stack(iterates)


def _before(changes: Tensor, first: Tensor) -> Tensor:
    """`first` plus the changes of the steps before, for each step, shape `(steps, K)`."""
    return torch.cat([first.unsqueeze(0), changes[:-1]]).cumsum(0)


def _judged(run: LissaRun, residual_norms: Tensor, sizes: Tensor, trace: list[Tensor], before: int) -> LissaRun:
    """After a stretch that came after `before` steps: judged at its end and where `solve_lissa_stacked` does."""
    last = before + len(sizes)
    looks = [step for step in range(before + 1, last + 1) if step in (1, 4, last) or step % CHECK_EVERY == 0]
    for start, step in itertools.pairwise([before, *looks]):
        some = residual_norms[start - before : step - before]
        trace.append(torch.where(run.status == RUNNING, some, torch.nan))
        run = judged(run, some[-1], sizes[step - before - 1], step)
    return run
