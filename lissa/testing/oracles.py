"""Slow, obvious answers in float64, and how far rounding may take an honest implementation from them.

Everything here is by `torch.autograd.grad` on one flat vector, so that it shares nothing with what is tested.
"""

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

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


@remembered(2**12)
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


@remembered(2**12)
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
    tolerance = m * u * _sensitivity(exact, v, _product)
    if problem.accuracy == "difference" and tree.norm(v) > 0:
        e = difference_step(problem, v)
        truncation = tree.norm(tree.sub(gradient_difference(exact, v, 2 * e), gradient_difference(exact, v, e)))
        tolerance += 16 * float(truncation) + 4 * m * u * _sensitivity(exact, v, _gradient_alone) / e
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
    weights = _equal_weights(exact)
    ahead, behind = (
        _gradient(exact, tree.add_scaled(exact.params, sign * e, v), exact.batch, weights) for sign in (1, -1)
    )
    return tree.scale(1 / (2 * e), tree.sub(ahead, behind))


def error(got: Params, expected: Params) -> float:
    """`|got - expected|` in float64; infinite where an entry is not finite."""
    length = torch.linalg.vector_norm(tree.flatten(got).double() - tree.flatten(expected).double())
    return float(length) if length.isfinite() else float("inf")


def _roundings(problem: Problem) -> int:
    """m, on the longest path: see `product_tolerance`."""
    return 4 * (problem.batch["y"].numel() + tree.numel(problem.params)) + 300


def _product(problem: Problem, params: Params, batch: Any, weights: Tensor, v: Params) -> Params:
    """`C v` in float64 with example i weighted by `weights[i]` in place of 1/B."""
    leaves = tree.map(lambda t: t.detach().requires_grad_(), params)
    if problem.curvature == "hessian":
        losses = problem.example_loss_fn(leaves, batch)
        return _double_backward((weights * losses).sum(), leaves, v)
    if problem.curvature == "fisher":
        losses = problem.example_loss_fn(leaves, batch)
        total = tree.zeros_like(params)
        for weight, loss in zip(weights, losses, strict=True):
            g = _backward(loss, leaves)
            total = tree.add_scaled(total, weight * tree.vdot(g, v), g)
        return total
    out = problem.output_fn(leaves, batch)
    z = out.detach().requires_grad_()
    share = weights.sum()  # the output loss is a mean: its examples are not weighed one by one
    cotangent = torch.zeros_like(out, requires_grad=True)
    J_transposed = torch.autograd.grad(out, list(leaves.values()), cotangent, create_graph=True, materialize_grads=True)
    J_v = _grad(sum((g * t).sum() for g, t in zip(J_transposed, v.values(), strict=True)), [cotangent])[0]
    H_J_v = _double_backward(problem.output_loss_fn(z, batch), {"z": z}, {"z": J_v})["z"]
    return tree.scale(share, _backward(out, leaves, H_J_v))


def _scores(problem: Problem, params: Params, batch: Any, weights: Tensor, v: Params) -> Params:
    """`g_i . v` as the derivative in s of `<d (sum_i s_i l_i) / dp, v>`: two backward passes."""
    leaves = tree.map(lambda t: t.detach().requires_grad_(), params)
    losses = problem.example_loss_fn(leaves, batch)
    s = torch.zeros_like(losses, requires_grad=True)
    gradient = _grad((s * losses).sum(), list(leaves.values()), create_graph=True)
    inner = sum((g * t).sum() for g, t in zip(gradient, v.values(), strict=True))
    return {"scores": _grad(inner, [s])[0]}


def _gradient_alone(problem: Problem, params: Params, batch: Any, weights: Tensor, v: Params) -> Params:
    return _gradient(problem, params, batch, weights)


def _gradient(problem: Problem, params: Params, batch: Any, weights: Tensor) -> Params:
    leaves = tree.map(lambda t: t.detach().requires_grad_(), params)
    return _backward((weights * problem.example_loss_fn(leaves, batch)).sum(), leaves)


def _sensitivity(problem: Problem, v: Params, fn: Callable[..., Params], probes: int = 4, e: float = 1e-6) -> float:
    """The root mean square of `|fn(data (1 + e s)) - fn(data)| / e` over random signs s, the same signs each time."""
    weights = _equal_weights(problem)
    base = fn(problem, problem.params, problem.batch, weights, v)
    generator = torch.Generator().manual_seed(tree.numel(problem.params))

    def shake(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        signs = torch.randint(2, t.shape, generator=generator).double() * 2 - 1
        return t * (1 + e * signs)

    squares = []
    for _ in range(probes):
        params, probe = tree.map(shake, problem.params), tree.map(shake, v)
        batch = {k: t if k == "mask" else shake(t) for k, t in problem.batch.items()}
        squares.append((error(fn(problem, params, batch, shake(weights), probe), base) / e) ** 2)
    return (sum(squares) / probes) ** 0.5


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
    """Row by row, shape `(outputs, inputs)`."""
    at = at.detach().requires_grad_()
    out = fn(at)
    rows = [_grad(entry, [at], retain_graph=True)[0] for entry in out]
    return torch.stack(rows) if rows else at.new_zeros(0, len(at)).detach()


def _hessian(fn: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    at = at.detach().requires_grad_()
    gradient = _grad(fn(at), [at], create_graph=True)[0]
    rows = [_grad(entry, [at], retain_graph=True)[0] for entry in gradient]
    return torch.stack(rows).detach() if rows else at.new_zeros(0, 0).detach()
