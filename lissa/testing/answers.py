"""What the code under test answered: checked for its form, measured against what it may be, with a likely cause.

The laws of products and of solvers share these; they are no laws themselves.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lissa import tree
from lissa.testing.law import LawBroken, run
from lissa.testing.operators import Operator
from lissa.testing.oracles import dense_curvature
from lissa.testing.problems import Problem
from lissa.types import Matvec, Params


def product_of(
    law: Callable[..., None],
    product: Callable[..., Params],
    problem: Problem,
    v: Params,
    *,
    params: Params | None = None,
    batch: Any = None,
) -> Params:
    """The product under test, checked to be shaped like the parameters, with their key order."""
    params = problem.params if params is None else params
    batch = problem.batch if batch is None else batch
    like = dict(params)
    got = run(law, problem, lambda: product(*problem.functions, params, batch, v))
    require_form(law, got, like, problem, "the result", "zeros for parameters that the loss does not use")
    for k in like:
        if not got[k].isfinite().all():
            cause = (
                "0/0 for a batch of none, or an operation without a finite second derivative: the exact one is finite"
            )
            raise LawBroken(law, f"the result at {k!r} is not finite", got=got, cause=cause, case=problem)
    return {k: got[k].detach() for k in like}


def require_form(law: Callable[..., None], got: Any, like: Params, case: Any, what: str, hint: str) -> None:
    """`got` is a dict with the keys of `like`, of tensors of their shapes, dtypes and devices, or `LawBroken`."""
    if not isinstance(got, dict) or got.keys() != like.keys():
        shown = list(got) if isinstance(got, dict) else type(got).__name__
        cause = f"return a dict with the keys {list(like)}; {hint}"
        raise LawBroken(law, f"{what} has other keys", got=shown, expected=list(like), cause=cause, case=case)
    for k, t in like.items():
        if not isinstance(got[k], Tensor):
            kind = type(got[k]).__name__
            raise LawBroken(law, f"{what} at {k!r} is no tensor", got=kind, expected="Tensor", case=case)
        for attribute in ("shape", "dtype", "device"):
            now, then = (getattr(t, attribute) for t in (got[k], t))
            if now != then:
                cause = "keep the parameter's own shape and dtype: no flattening, no default dtype"
                reason = f"{what} at {k!r} has another {attribute}"
                raise LawBroken(law, reason, got=now, expected=then, cause=cause, case=case)


def dense_product(problem: Problem, v: Params) -> Params:
    """`C v` by the dense matrix, in float64."""
    return tree.unflatten(dense_curvature(problem) @ tree.flatten(v).double(), in_float64(v))


def in_float64(v: Params) -> Params:
    """`v`, entry for entry, in float64."""
    return tree.map(lambda t: t.double(), v)


def room_for_inner_product(tolerance: float, value: Tensor) -> float:
    """`tolerance` and the rounding of one inner product in float64 of at most a thousand terms."""
    return tolerance + 1e3 * torch.finfo(torch.float64).eps * abs(float(value))


def solution_of(
    law: Callable[..., None], solve: Callable[..., Any], operator: Operator, v: Params, *, matvec: Matvec | None = None
) -> Params:
    """The solver under test, its answer checked to be finite and shaped like v."""
    matvec = operator.matvec if matvec is None else matvec
    like = dict(v)
    x = run(law, operator, lambda: value_of(solve(matvec, v, damping=operator.damping)))
    require_form(law, x, like, operator, "x", "x itself, or a result whose .value is x")
    for k in like:
        if not x[k].isfinite().all():
            cause = "0/0 for a residual of 0, a step that is too long, or a method for definite matrices alone"
            raise LawBroken(law, f"x at {k!r} is not finite", got=x, cause=cause, case=operator)
    return {k: x[k].detach() for k in like}


def value_of(result: Any) -> Params:
    """x, whether the solver returns it or something that holds it."""
    return getattr(result, "value", result)


def residual_of(operator: Operator, x: Params, v: Params, shift: float) -> Params:
    """`v - (A + shift I) x` in float64."""
    x, v = (tree.map(lambda t: t.double(), t) for t in (x, v))
    A_x = tree.unflatten(operator.matrix.double() @ tree.flatten(x), x)
    return tree.sub(v, tree.add_scaled(A_x, shift, x))


def shift_of(operator: Operator, x: Params, v: Params) -> float:
    """`<x, v - A x> / <x, x>`."""
    x = tree.map(lambda t: t.double(), x)
    return float(tree.vdot(x, residual_of(operator, x, v, 0.0)) / tree.vdot(x, x))


def unit_roundoff(operator: Operator) -> float:
    """U of the operator's dtype."""
    return torch.finfo(operator.matrix.dtype).eps / 2


def residual_tolerance(operator: Operator, x: Params, v: Params) -> float:
    """`rtol |v| + (10 P + 100) u (largest |x| + |v|)`: see `solvers`."""
    m = 10 * len(operator.eigenvalues) + 100
    rounding = m * unit_roundoff(operator) * (operator.largest * float(tree.norm(x)) + float(tree.norm(v)))
    return operator.rtol * float(tree.norm(v)) + rounding


def error_tolerance(operator: Operator, v: Params) -> float:
    """How far x may be from the solution when its residual is within tolerance: that over `smallest`."""
    return residual_tolerance(operator, operator.solution(v), v) / operator.smallest


def cause_of_shift(shift: float, damping: float) -> str:
    """What a solver does that shifts A by `shift` when asked for `damping`."""
    if abs(shift) < 1e-3:
        return "damping is ignored"
    if damping and abs(shift / damping + 1) < 1e-3:
        return "damping is subtracted"
    if damping and shift > 0:
        return f"AllenNLP's meaning: it solves (H + damping * scale I) x = v, with scale = {shift / damping:.4g}"
    return "a shift that is not damping"


def cause_of_solution(operator: Operator, x: Params) -> str:
    """The usual mistake whose answer x is."""
    got, v = tree.flatten(x).double(), operator.v
    tolerance = 2 * error_tolerance(operator, v)

    def like(answer: Tensor) -> bool:
        return bool((got - answer).norm() <= tolerance)

    def shifted(shift: float) -> Tensor:
        matrix = operator.matrix.double() + shift * torch.eye(len(got), dtype=torch.float64)
        return torch.linalg.pinv(matrix, hermitian=True) @ tree.flatten(v).double()

    expected = shifted(operator.shift)
    if operator.shift and like(shifted(0.0)):
        return "damping is ignored"
    if operator.shift and like(shifted(-operator.shift)):
        return "damping is subtracted"
    if like(
        torch.diagonal(operator.matrix.double() + operator.shift * torch.eye(len(got))).reciprocal() * tree.flatten(v)
    ):
        return "it is the inverse of the diagonal alone"
    if like(tree.flatten(v).double()):
        return "it is v itself: no step was taken"
    ratio = float(got @ expected / (expected @ expected))
    if like(ratio * expected):
        return f"it is {ratio:.4g} times the solution: a sign, or a wrong final scale"
    return "it is not there yet: too few steps, or steps that do not converge"
