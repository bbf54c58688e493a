"""The laws of solvers of `(A + damping I) x = v`. Each is a plain function `law(solve, operator)`.

The solver under test is called as `solve(matvec, v, damping=...)` and returns x, or anything with x as `.value`. It
promises a relative residual, `operator.rtol`. Write `tol(b) = rtol |b| + rounding` for the residual it may leave, with
`rounding = (10 P + 100) u (largest |x| + |b|)`: a product and a sum of P terms each, a solver that is backward
stable up to a modest factor. An error in x is the residual through the inverse: at most `tol(b) / smallest`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from lissa import tree
from lissa.testing.answers import (
    cause_of_shift,
    cause_of_solution,
    error_tolerance,
    residual_of,
    residual_tolerance,
    shift_of,
    solution_of,
    unit_roundoff,
    value_of,
)
from lissa.testing.environment import first_change, nothing_global_changes, seeded
from lissa.testing.law import LawBroken, require_close, run
from lissa.testing.operators import Operator, make_operator
from lissa.types import Params

Solver = Callable[..., Any]


def form(solve: Solver, operator: Operator) -> None:
    """X has the keys, shapes and dtypes of v, and is finite: exact."""
    solution_of(form, solve, operator, operator.v)


def purity(solve: Solver, operator: Operator) -> None:
    """A call changes nothing: not v, no grad mode, no global random state. Exact."""
    v = tree.map(torch.clone, operator.v)

    def broken(what: str, cause: str) -> LawBroken:
        return LawBroken(purity, f"the call changed {what}", cause=cause, case=operator)

    with nothing_global_changes(broken):
        solution_of(purity, solve, operator, v)
    if (change := first_change(v, operator.v)) is not None:
        raise broken(f"v: {change}", "v is updated in place (an iterate that starts as v?): copy it first")


def determinism(solve: Solver, operator: Operator) -> None:
    """The same call gives the same bits, whatever the global random state: exact."""
    with seeded(1):
        one = solution_of(determinism, solve, operator, operator.v)
    with seeded(2):
        two = solution_of(determinism, solve, operator, operator.v)
    if first_change(one, two) is not None:
        cause = "a random start or random probes from the global state, or a start from the previous solution"
        raise LawBroken(determinism, "two equal calls differ", got=two, expected=one, cause=cause, case=operator)


def meaning_of_damping(solve: Solver, operator: Operator) -> None:
    """X solves the system with `damping` added to A, in the units of A: not ignored, not multiplied by a scale.

    Whatever shift s the solver uses, `(A + s I) x = v` gives `s = <x, v - A x> / <x, x>`, within `tol(v) / |x|`. If x
    solves the system with that s, and s is not `damping`, the law is broken and s says how. If no s makes it a
    solution, other laws judge. One eigenvalue alone cannot tell damping from an error in x; the law then says nothing.
    """
    if max(operator.eigenvalues) - min(operator.eigenvalues) < 0.5:
        return
    x, v = (
        tree.map(lambda t: t.double(), t)
        for t in (solution_of(meaning_of_damping, solve, operator, operator.v), operator.v)
    )
    shift = shift_of(operator, x, v)
    tolerance = residual_tolerance(operator, x, v)
    solved = float(tree.norm(residual_of(operator, x, v, shift))) <= tolerance
    if solved and not abs(shift - operator.shift) <= tolerance / float(tree.norm(x)):
        raise LawBroken(
            meaning_of_damping,
            f"x solves (A + s I) x = v with s = {shift:.6g}; damping={operator.damping:g} asks for {operator.shift:g}",
            got=shift,
            expected=operator.shift,
            cause=cause_of_shift(shift, operator.damping),
            case=operator,
        )


def residual(solve: Solver, operator: Operator) -> None:
    """`|v - (A + damping I) x| <= tol(v)`: the residual in float64, from the solver's x alone."""
    x = solution_of(residual, solve, operator, operator.v)
    left, allowed = residual_of(operator, x, operator.v, operator.shift), residual_tolerance(operator, x, operator.v)
    require_close(
        residual,
        left,
        tree.zeros_like(left),
        allowed,
        what=f"the residual is not {operator.rtol:.1g} of v",
        case=operator,
        cause=lambda: cause_of_solution(operator, x),
    )


def dense_agreement(solve: Solver, operator: Operator) -> None:
    """`x = (A + damping I)^-1 v` by a dense solve in float64, within `tol(v) / smallest`."""
    x = solution_of(dense_agreement, solve, operator, operator.v)
    require_close(
        dense_agreement,
        x,
        operator.solution(operator.v),
        error_tolerance(operator, operator.v),
        what="x is not the dense solution",
        case=operator,
        cause=lambda: cause_of_solution(operator, x),
    )


def linearity(solve: Solver, operator: Operator) -> None:
    """`solve(2 u - v/2) = 2 solve(u) - solve(v)/2`, `solve(v/64) = solve(v)/64` and `solve(0) = 0`.

    Within the errors of the solves; the last is exact.
    """
    u, v = operator.u, operator.v
    w = tree.add_scaled(tree.scale(2.0, u), -0.5, v)
    x_u, x_v, x_w = (solution_of(linearity, solve, operator, b) for b in (u, v, w))
    require_close(
        linearity,
        x_w,
        tree.add_scaled(tree.scale(2.0, x_u), -0.5, x_v),
        error_tolerance(operator, w) + 2 * error_tolerance(operator, u) + error_tolerance(operator, v) / 2,
        what="solve(2 u - v/2) is not 2 solve(u) - solve(v)/2",
        case=operator,
        cause=lambda: "steps end at an absolute size, v is normalised and not restored, or a start is not 0",
    )
    short = tree.scale(1 / 64, v)
    require_close(
        linearity,
        solution_of(linearity, solve, operator, short),
        tree.scale(1 / 64, x_v),
        error_tolerance(operator, short) + error_tolerance(operator, v) / 64,
        what="solve(v/64) is not solve(v)/64",
        case=operator,
        cause=lambda: "steps end at an absolute size of the residual: compare it with rtol |v|",
    )
    zeros = tree.zeros_like(v)
    require_close(
        linearity,
        solution_of(linearity, solve, operator, zeros),
        zeros,
        0.0,
        what="solve(0) is not 0",
        case=operator,
        cause=lambda: "0/0 where the right-hand side is 0, or a start that is not 0",
    )


def key_order(solve: Solver, operator: Operator) -> None:
    """The order of the keys does not matter: within the errors of two solves (sums may be ordered otherwise)."""
    order = list(operator.v)

    def turned(v: Params) -> Params:
        return dict(reversed(v.items()))

    def matvec(v: Params) -> Params:
        return turned(operator.matvec({k: v[k] for k in order}))

    got = solution_of(key_order, solve, operator, turned(operator.v), matvec=matvec)
    require_close(
        key_order,
        {k: got[k] for k in order},
        solution_of(key_order, solve, operator, operator.v),
        2 * error_tolerance(operator, operator.v),
        what="turning the order of the keys changes x",
        case=operator,
        cause=lambda: "tensors are matched by position: match them by key",
    )


def rotation(solve: Solver, operator: Operator) -> None:
    """`solve(Q^T A Q, Q^T v) = Q^T solve(A, v)` for an orthogonal Q: an inverse does not know the basis.

    Q and the products with it round to `4 P u` relative, which moves the system by that much of `largest |x| + |v|`;
    the tolerance is that over `smallest`, and the errors of two solves. A solver that drops cross terms, or scales
    entries one by one, breaks this law.
    """
    P, v = len(operator.eigenvalues), operator.v
    g = torch.Generator().manual_seed(1)
    Q = torch.linalg.qr(torch.randn(P, P, generator=g, dtype=torch.float64)).Q
    turned_matrix = Q.mT @ operator.matrix.double() @ Q
    turned = operator._replace(matrix=((turned_matrix + turned_matrix.mT) / 2).to(operator.matrix.dtype))

    def rotate(v: Params) -> Params:
        return tree.unflatten((Q.mT @ tree.flatten(v).double()).to(operator.matrix.dtype), v)

    x = solution_of(rotation, solve, operator, v)
    moved = 4 * P * unit_roundoff(operator) * (operator.largest * float(tree.norm(x)) + float(tree.norm(v)))
    require_close(
        rotation,
        solution_of(rotation, solve, turned, rotate(v)),
        rotate(x),
        2 * error_tolerance(operator, v) + moved / operator.smallest,
        what="in another orthogonal basis the solution is another",
        case=operator,
        cause=lambda: "entries or tensors are treated one by one: a diagonal or block-diagonal inverse, a clip",
    )


def ridge_solution(solve: Solver, operator: Operator) -> None:
    """With `A = X^T X / n`, `b = X^T y / n`, x is the ridge regression `argmin |X x - y|^2 / n + damping |x|^2`.

    That is the least-squares solution of the rows of X and `sqrt(n damping) I` stacked, computed so in float64: no
    inverse of A is formed. X is drawn anew; its damping is one more, so that `smallest >= 1`; tolerance as in
    `dense_agreement`, and the rounding of A and b to the dtype, `(n + 1) u` relative.
    """
    P, dtype = len(operator.eigenvalues), operator.matrix.dtype
    g = torch.Generator().manual_seed(operator.recipe["seed"] + 1)
    n, shift = P + 3, operator.shift + 1.0
    X = torch.randint(-16, 17, (n, P), generator=g).double() / 16
    y = torch.randint(-16, 17, (n,), generator=g).double() / 16 + 1
    A, b = (X.mT @ X / n).to(dtype), (X.mT @ y / n).to(dtype)
    ridge = operator._replace(
        matrix=A,
        eigenvalues=tuple(torch.linalg.eigvalsh(A.double()).clamp(min=0).tolist()),
        damping=shift / operator.damping_scale,
        v=tree.unflatten(b, operator.v),
    )
    stacked = torch.cat([X, (n * shift) ** 0.5 * torch.eye(P, dtype=torch.float64)])
    expected = torch.linalg.lstsq(stacked, torch.cat([y, torch.zeros(P, dtype=torch.float64)]).unsqueeze(1)).solution
    x = solution_of(ridge_solution, solve, ridge, ridge.v)
    moved = (n + 1) * unit_roundoff(operator) * (ridge.largest * float(tree.norm(x)) + float(tree.norm(ridge.v)))
    require_close(
        ridge_solution,
        x,
        tree.unflatten(expected.squeeze(1), ridge.v),
        error_tolerance(ridge, ridge.v) + moved / ridge.smallest,
        what=f"x is not the ridge regression with damping {shift:g}",
        case=operator,
        cause=lambda: cause_of_solution(ridge, x),
    )


def early_stop(solve: Solver, operator: Operator) -> None:
    """A looser tolerance takes fewer products: exact counts, `solve(..., rtol=0.5)` against `rtol=operator.rtol`.

    On a matrix of 24 eigenvalues from 1/4 to 4, where no method of products is done in a few. For solvers that take
    `rtol`; opt in: `takes_rtol=True`. Both answers must also keep their own promise.
    """
    P = 24
    spread = make_operator(
        eigenvalues=[0.25 + 3.75 * i / (P - 1) for i in range(P)],
        dtype=operator.matrix.dtype,
        seed=operator.recipe["seed"],
        rtol=operator.rtol,
    )
    counts = []
    for rtol in (0.5, operator.rtol):
        asked, products = spread._replace(rtol=rtol), 0

        def matvec(v: Params) -> Params:
            nonlocal products
            products += 1
            return spread.matvec(v)

        def with_rtol(*args: Any, rtol: float = rtol, **kwargs: Any) -> Any:
            return solve(*args, rtol=rtol, **kwargs)

        x = solution_of(early_stop, with_rtol, asked, asked.v, matvec=matvec)
        left = float(tree.norm(residual_of(asked, x, asked.v, asked.shift)))
        counts.append(products)
        if not left <= residual_tolerance(asked, x, asked.v):
            reason = f"rtol={rtol:.1g} was asked for, the residual is {left / float(tree.norm(asked.v)):.3g} of v"
            raise LawBroken(early_stop, reason, cause="it stops on something else than the residual", case=operator)
    if not counts[0] < counts[1]:
        raise LawBroken(
            early_stop,
            f"rtol=0.5 takes {counts[0]} products, rtol={operator.rtol:.1g} takes {counts[1]}",
            cause="the stopping rule never fires: it compares with the wrong quantity, or is looked at too late",
            case=operator,
        )


def vmap_is_loop(solve: Solver, operator: Operator) -> None:
    """`vmap(solve)([u, v]) = [solve(u), solve(v)]`, within the errors of both. Opt in: `vmap=True`."""
    stack = tree.map(lambda a, b: torch.stack([a, b]), operator.u, operator.v)

    def one(v: Params) -> Params:
        return value_of(solve(operator.matvec, v, damping=operator.damping))

    got = run(vmap_is_loop, operator, lambda: torch.vmap(one)(stack))
    for i, v in enumerate((operator.u, operator.v)):
        require_close(
            vmap_is_loop,
            {k: got[k][i] for k in v},
            solution_of(vmap_is_loop, solve, operator, v),
            2 * error_tolerance(operator, v),
            what=f"vmap over two right-hand sides and a loop differ at {i}",
            case=operator,
            cause=lambda: "right-hand sides are mixed: a norm over all of them, or a decision taken once for all",
        )


class Damping(NamedTuple):
    """What a solver means by `damping`.

    Attributes:
        meaning: `"H + damping I"` (ours), `"H + damping * scale I"` (AllenNLP's), `"ignored"` or `"unknown"`.
        factor: What damping is multiplied with, the scale in AllenNLP's meaning; NaN if unknown.
    """

    meaning: str
    factor: float


def damping_meaning(solve: Solver, *, rtol: float = 1e-6) -> Damping:
    """What `solve(matvec, v, damping=d)` means by d, from what it solves: `s = <x, v - A x> / <x, x>` is c d.

    Args:
        solve: The solver, returning x or anything with x as `.value`.
        rtol: The relative residual that it promises.

    Returns:
        The meaning, found from solves with d = 1/16 and 1/8 on a matrix with eigenvalues 1, 2, 3 in float64.

    Example:
        >>> def allennlp(matvec, v, *, damping, scale=10.0):
        ...     h = v
        ...     for _ in range(300):
        ...         h = tree.map(lambda v, h, Ah: v + (1 - damping) * h - Ah / scale, v, h, matvec(h))
        ...     return tree.scale(1 / scale, h)
        >>> damping_meaning(allennlp).meaning
        'H + damping * scale I'
    """
    factors = []
    for damping in (1 / 16, 1 / 8):
        operator = make_operator(eigenvalues=[1.0, 2.0, 3.0], damping=damping, rtol=rtol)
        x = value_of(solve(operator.matvec, operator.v, damping=damping))
        shift = shift_of(operator, x, operator.v)
        if not float(tree.norm(residual_of(operator, x, operator.v, shift))) <= residual_tolerance(
            operator, x, operator.v
        ):
            return Damping("unknown", float("nan"))
        factors.append(shift / damping)
    # A residual of rtol |v| moves s by at most rtol |v| / |x| <= 4 rtol (|v| <= (3 + s) |x|), so s / d by 64 rtol.
    near = 64 * rtol * (1 + abs(factors[0]))
    if abs(factors[0] - factors[1]) > 2 * near:
        return Damping("unknown", float("nan"))
    if abs(factors[0]) <= near:
        return Damping("ignored", 0.0)
    return Damping("H + damping I" if abs(factors[0] - 1) <= near else "H + damping * scale I", factors[0])
