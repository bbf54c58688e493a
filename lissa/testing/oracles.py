"""Slow, obvious answers in float64, and how far rounding may take an honest implementation from them.

Everything here is by `torch.autograd.grad` on plain leaves, so that it shares nothing with what is tested; `vmap` only
stacks what is differentiated.
"""

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lissa import tree
from lissa.testing.problems import Problem
from lissa.types import Params


def remembered(size: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Keeps the last `size` answers of `fn(problem, *vectors)` by content, as laws with one seed see equal problems."""

    def decorate(fn: Callable[..., Any]) -> Callable[..., Any]:
        answers: OrderedDict[int, Any] = OrderedDict()

        @functools.wraps(fn)
        def remembering(problem: Problem, *vectors: Params) -> Any:
            tensors = [
                tuple(t.detach().reshape(-1).tolist())
                for d in (problem.params, problem.batch, *vectors)
                for t in d.values()
            ]
            key = hash((repr(problem.recipe), problem.dtype, problem.curvature, problem.accuracy, *tensors))
            if key not in answers:
                answers[key] = fn(problem, *vectors)
            answers.move_to_end(key)
            if len(answers) > size:
                answers.popitem(last=False)
            return answers[key]

        return remembering

    return decorate


@remembered(2**14)
def dense_curvature(problem: Problem) -> Tensor:
    """The matrix that `problem.curvature` names, entry by entry in float64, shape `(P, P)`.

    Hessian: `d^2 L / dp^2`. Gauss-Newton: `J^T H_out J`, with J the Jacobian of the outputs and H_out the Hessian of
    the loss in the outputs. Fisher (empirical): `mean_i g_i g_i^T` over the example gradients.
    """
    exact = problem.in_float64()
    like = exact.params

    def at(fn: Callable[[Params, Any], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda flat: fn(tree.unflatten(flat, like), exact.batch)

    flat = tree.flatten(like)
    if exact.curvature == "hessian":
        return _hessian(at(exact.loss_fn), flat)
    if exact.curvature == "gauss-newton":
        out = at(exact.output_fn)(flat)
        jacobian = _jacobian(lambda flat: at(exact.output_fn)(flat).reshape(-1), flat)
        h_out = _hessian(lambda z: exact.output_loss_fn(z.reshape(out.shape), exact.batch), out.reshape(-1))
        return jacobian.mT @ h_out @ jacobian
    gradients = _jacobian(at(exact.example_loss_fn), flat)
    return gradients.mT @ gradients / max(len(gradients), 1)


@remembered(2**14)
def example_gradients(problem: Problem) -> Tensor:
    """`g_i`, the gradients of the example losses in float64, shape `(B, P)`."""
    exact = problem.in_float64()
    return _jacobian(
        lambda flat: exact.example_loss_fn(tree.unflatten(flat, exact.params), exact.batch), tree.flatten(exact.params)
    )


@remembered(2**16)
def product_tolerance(problem: Problem, v: Params) -> float:
    """How far `C v` may lie from the exact product through rounding alone, as a length.

    A product computed stably is the exact product of slightly wrong data: each rounding changes a parameter, an input,
    a label, an example's weight or an entry of `v` by a relative u. With

        kappa = |d(C v) / d(data) diag(data)|_F      (the sensitivity to relative changes; it sees cancellation)

    and m roundings on the longest path, the error is at most `m u kappa`. The path runs through the value, two
    derivatives and the product with `v`, each of which sums over at most `rows + P` terms: `m = 4 (rows + P)`; and
    through at most three elementwise functions, whose derivatives, computed from their values as `1 - t^2` is, lose
    a factor of at most 100 on these problems, whose entries are bounded by 1: `m += 300`. `kappa` is measured: the
    root mean square, over four random sign patterns s, of the change that `data (1 + e s)` makes, over e.

    A central difference (`problem.accuracy == "difference"`) with step `e = u^(1/3) (1 + |p|) / |v|`, up to a
    factor of four, adds its truncation `e^2 |v|^3 |L''''| / 6`, measured as the change from step e to 2e
    (three times as large) at 16 e^2, and the rounding of the gradient, `m u kappa_gradient`, over e.
    """
    exact = problem.in_float64()
    v = tree.map(lambda t: t.double(), v)
    u = torch.finfo(problem.dtype).eps / 2
    m = _roundings(problem)
    tolerance = m * u * _sensitivity(exact, v, _products)
    if problem.accuracy == "difference" and tree.norm(v) > 0:
        e = difference_step(problem, v)
        truncation = tree.norm(tree.sub(gradient_difference(exact, v, 2 * e), gradient_difference(exact, v, e)))
        tolerance += 16 * float(truncation) + 4 * m * u * _sensitivity(exact, v, _gradients) / e
    return tolerance


def result_tolerance(problem: Problem, *results: Params) -> float:
    """`m u` times the lengths of results: what rounding makes of results that are compared with each other.

    The tolerance of a product is in the size of the right answer. Laws that compare two answers of the code under test
    allow for their own size too, so that a wrong size alone is left to the laws that judge it.
    """
    u = torch.finfo(problem.dtype).eps / 2
    return _roundings(problem) * u * sum(float(tree.norm(result)) for result in results)


@remembered(2**16)
def score_tolerance(problem: Problem, ihvp: Params) -> float:
    """How far scores `g_i . ihvp` may lie from the exact ones through rounding alone, as a length over the batch.

    As in `product_tolerance`, `m u kappa`, with one derivative less on the path: `m = 3 (rows + P) + 200`.
    """
    exact = problem.in_float64()
    ihvp = tree.map(lambda t: t.double(), ihvp)
    m = 3 * (problem.batch["y"].numel() + tree.numel(problem.params)) + 200
    return m * torch.finfo(problem.dtype).eps / 2 * _sensitivity(exact, ihvp, _scores)


def difference_step(problem: Problem, v: Params) -> float:
    """`e = u^(1/3) (1 + |p|) / |v|`, where truncation and rounding of a central difference balance."""
    u = torch.finfo(problem.dtype).eps / 2
    return float(u ** (1 / 3) * (1 + tree.norm(problem.params).double()) / tree.norm(v).double())


def gradient_difference(problem: Problem, v: Params, e: float) -> Params:
    """`(grad L(p + e v) - grad L(p - e v)) / 2e` in float64."""
    exact = problem.in_float64()
    ahead, behind = (_gradient(exact, tree.add_scaled(exact.params, sign * e, v)) for sign in (1, -1))
    return tree.scale(1 / (2 * e), tree.sub(ahead, behind))


def error(got: Params, expected: Params) -> float:
    """`|got - expected|` in float64; infinite where an entry is not finite."""
    length = torch.linalg.vector_norm(tree.flatten(got).double() - tree.flatten(expected).double())
    return float(length) if length.isfinite() else float("inf")


def _roundings(problem: Problem) -> int:
    """m, on the longest path: see `product_tolerance`."""
    return 4 * (problem.batch["y"].numel() + tree.numel(problem.params)) + 300


class _Stack(NamedTuple):
    """K versions of a problem's data, stacked in front: one pass differentiates all of them."""

    params: Params
    batch: dict[str, Tensor]
    weights: Tensor
    v: Params

    def through(self, fn: Callable[..., Tensor], argument: Any) -> Tensor:
        """`fn(argument_k, batch_k)` for each k."""
        in_dims = (0, {k: 0 if t.is_floating_point() and k != "mask" else None for k, t in self.batch.items()})
        return torch.vmap(fn, in_dims=in_dims)(argument, self.batch)


def _products(problem: Problem, stack: _Stack) -> Params:
    """`C v` in float64 with example i weighted by `weights[i]` in place of 1/B, for each of the stack."""
    leaves = tree.leaves(stack.params)
    if problem.curvature == "hessian":
        losses = stack.through(problem.example_loss_fn, leaves)
        return _double_backward((stack.weights * losses).sum(), leaves, stack.v)
    if problem.curvature == "fisher":
        losses = stack.through(problem.example_loss_fn, leaves)
        total = tree.zeros_like(stack.params)
        for weight, loss in zip(stack.weights.T, losses.T, strict=True):
            g = _backward(loss.sum(), leaves)
            along = sum((g[k] * stack.v[k]).reshape(len(weight), -1).sum(1) for k in g)
            total = tree.add(total, _each(weight * along, g))
        return total
    out = stack.through(problem.output_fn, leaves)
    z = out.detach().requires_grad_()
    share = stack.weights.sum(1)  # the output loss is a mean: its examples are not weighed one by one
    cotangent = torch.zeros_like(out, requires_grad=True)
    J_transposed = _grad(out, list(leaves.values()), cotangent, create_graph=True)
    J_v = _grad(sum((g * t).sum() for g, t in zip(J_transposed, stack.v.values(), strict=True)), [cotangent])[0]
    H_J_v = _double_backward(stack.through(problem.output_loss_fn, z).sum(), {"z": z}, {"z": J_v})["z"]
    return _each(share, _backward(out, leaves, H_J_v))


def _scores(problem: Problem, stack: _Stack) -> Params:
    """`g_i . v` as the derivative in s of `<d (sum_i s_i l_i) / dp, v>`: two backward passes."""
    leaves = tree.leaves(stack.params)
    losses = stack.through(problem.example_loss_fn, leaves)
    s = torch.zeros_like(losses, requires_grad=True)
    gradient = _grad((s * losses).sum(), list(leaves.values()), create_graph=True)
    inner = sum((g * t).sum() for g, t in zip(gradient, stack.v.values(), strict=True))
    return {"scores": _grad(inner, [s])[0]}


def _gradients(problem: Problem, stack: _Stack) -> Params:
    leaves = tree.leaves(stack.params)
    return _backward((stack.weights * stack.through(problem.example_loss_fn, leaves)).sum(), leaves)


def _each(factors: Tensor, x: Params) -> Params:
    """`factors[k] x_k` for a stack of vectors."""
    return tree.map(lambda t: factors.reshape(-1, *[1] * (t.ndim - 1)) * t, x)


def _sensitivity(
    problem: Problem, v: Params, fn: Callable[[Problem, _Stack], Params], probes: int = 4, e: float = 1e-6
) -> float:
    """The root mean square of `|fn(data (1 + e s)) - fn(data)| / e` over random signs s, the same signs each time."""
    generator = torch.Generator().manual_seed(tree.numel(problem.params))

    def shaken(t: Tensor) -> Tensor:
        """The tensor as it is, and `probes` times with signs of its own."""
        signs = torch.randint(2, (probes, *t.shape), generator=generator).double() * 2 - 1
        return torch.cat([t.unsqueeze(0), t * (1 + e * signs)])

    stack = _Stack(
        tree.map(shaken, problem.params),
        {k: shaken(t) if t.is_floating_point() and k != "mask" else t for k, t in problem.batch.items()},
        shaken(_equal_weights(problem)),
        tree.map(shaken, v),
    )
    answers = torch.cat([t.reshape(probes + 1, -1) for t in fn(problem, stack).values()], 1)
    lengths = torch.linalg.vector_norm(answers[1:] - answers[0], dim=1) / e
    return float(lengths.square().mean().sqrt())


def _gradient(problem: Problem, params: Params) -> Params:
    leaves = tree.leaves(params)
    return _backward((_equal_weights(problem) * problem.example_loss_fn(leaves, problem.batch)).sum(), leaves)


def _equal_weights(problem: Problem) -> Tensor:
    return torch.full((problem.batch_size,), 1 / max(problem.batch_size, 1), dtype=torch.float64)


def _double_backward(loss: Tensor, leaves: Params, v: Params) -> Params:
    if not loss.requires_grad:
        return tree.zeros_like(v)
    gradient = _grad(loss, list(leaves.values()), create_graph=True)
    inner = sum((g * t).sum() for g, t in zip(gradient, v.values(), strict=True))
    return dict(zip(leaves, _grad(inner, list(leaves.values())), strict=True))


def _backward(output: Tensor, leaves: Params, cotangent: Tensor | None = None) -> Params:
    return dict(zip(leaves, _grad(output, list(leaves.values()), cotangent, retain_graph=True), strict=True))


def _grad(output: Any, inputs: Sequence[Tensor], cotangent: Tensor | None = None, **flags: bool) -> tuple[Tensor, ...]:
    """`torch.autograd.grad`, with zeros for what the output does not depend on."""
    if not (isinstance(output, Tensor) and output.requires_grad):
        return tuple(torch.zeros_like(t) for t in inputs)
    return torch.autograd.grad(output, inputs, cotangent, materialize_grads=True, **flags)


def _jacobian(fn: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """All rows by one batched backward pass, shape `(outputs, inputs)`."""
    at = at.detach().requires_grad_()
    return _rows(fn(at), at)


def _hessian(fn: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    at = at.detach().requires_grad_()
    return _rows(_grad(fn(at), [at], create_graph=True)[0], at)


def _rows(out: Tensor, at: Tensor) -> Tensor:
    """`d out / d at`, shape `(len(out), len(at))`."""
    if not len(out):
        return at.new_zeros(0, len(at)).detach()
    unit_vectors = torch.eye(len(out), dtype=out.dtype)
    if not out.requires_grad:
        return at.new_zeros(len(out), len(at)).detach()
    return torch.autograd.grad(out, at, unit_vectors, is_grads_batched=True, materialize_grads=True)[0].detach()
