"""The laws of curvature products: Hessian, Gauss-Newton and Fisher. Each is a plain function `law(product, problem)`.

The product under test is called as `hvp(loss_fn, params, batch, v)`, as `ggnvp(output_fn, output_loss_fn, params,
batch, v)` or as `fishervp(example_loss_fn, params, batch, v)`: `problem.curvature` says which. Write C for its matrix,
and `tol(v)` for `oracles.product_tolerance(problem, v)`: how far rounding may take an honest product from `C v`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lissa import tree
from lissa.testing.answers import dense_product, in_float64, product_of, room_for_inner_product
from lissa.testing.causes import cause_of_precision, cause_of_product
from lissa.testing.environment import first_change, nothing_global_changes, seeded
from lissa.testing.law import LawBroken, require_close, run
from lissa.testing.oracles import (
    difference_step,
    error,
    gradient_difference,
    product_tolerance,
    result_tolerance,
)
from lissa.testing.problems import Problem
from lissa.types import Params

Product = Callable[..., Params]


def form(product: Product, problem: Problem) -> None:
    """`C v` has the keys, shapes, dtypes and devices of `params` and is finite, for every legal problem: exact."""
    product_of(form, product, problem, problem.v)


def purity(product: Product, problem: Problem) -> None:
    """A call changes nothing: not its arguments, no `.grad`, no grad mode, no global random state. Exact.

    The parameters are leaves that require grad, as a module's are.
    """
    params = tree.map(lambda t: t.clone().requires_grad_(), problem.params)
    v, batch = (tree.map(torch.clone, x) for x in (problem.v, problem.batch))

    def broken(what: str, cause: str) -> LawBroken:
        return LawBroken(purity, f"the call changed {what}", cause=cause, case=problem)

    with nothing_global_changes(broken):
        got = product_of(purity, product, problem, v, params=params, batch=batch)
    for name, now, then in (("params", params, problem.params), ("v", v, problem.v), ("batch", batch, problem.batch)):
        if (change := first_change(now, then)) is not None:
            raise broken(f"{name}: {change}", "an argument is updated in place: copy it first")
    if any(t.grad is not None for t in params.values()):
        raise broken("the .grad of a parameter", ".backward() accumulates: use torch.autograd.grad")
    if not all(t.requires_grad for t in params.values()) or any(t.requires_grad for t in v.values()):
        raise broken("requires_grad of an argument", "differentiate detached copies, not the caller's tensors")
    for k, t in got.items():
        if t.numel() and t.data_ptr() in (params[k].data_ptr(), v[k].data_ptr()):
            raise LawBroken(
                purity, f"the result at {k!r} is the caller's own tensor", cause="return a copy", case=problem
            )


def determinism(product: Product, problem: Problem) -> None:
    """The same call gives the same bits, whatever the global random state: exact, no tolerance."""
    with seeded(1):
        one = product_of(determinism, product, problem, problem.v)
    with seeded(2):
        two = product_of(determinism, product, problem, problem.v)
    if any(not torch.equal(one[k], two[k]) for k in one):
        cause = "global random numbers are used: dropout left on, a random sample, a random probe; or state is kept"
        raise LawBroken(determinism, "two equal calls differ", got=two, expected=one, cause=cause, case=problem)


def statelessness(product: Product, problem: Problem) -> None:
    """The result follows its arguments: with other parameters (u for p), or another batch, it is another one.

    Broken where the first call is right, within `tol(v)`, and not zero; the dense matrix says that the second result
    differs from it by more than four times that; and the second call gives the first result again, within twice that.
    """
    first, right = product_of(statelessness, product, problem, problem.v), dense_product(problem, problem.v)
    for what, moved in (
        ("params", problem._replace(params=problem.u)),
        ("batch", problem._replace(batch=problem.rows(slice(-1, None)))),
    ):
        tolerance = max(product_tolerance(problem, problem.v), product_tolerance(moved, problem.v))
        expected = dense_product(moved, problem.v)
        then = product_of(statelessness, product, moved, problem.v)
        was_right = error(first, right) <= tolerance < float(tree.norm(right))
        if was_right and error(expected, right) > 4 * tolerance and error(then, first) <= 2 * tolerance:
            raise LawBroken(
                statelessness,
                f"with other {what} the result is that of the call before",
                got=then,
                expected=expected,
                cause=f"stale {what}: a cached graph, gradient or matrix",
                case=problem,
            )


def linearity(product: Product, problem: Problem) -> None:
    """`C (2 u - v/2) = 2 C u - (C v)/2` and `C 0 = 0`.

    `2 u - v/2` is exact in binary, so the sides differ by `tol(2 u - v/2) + 2 tol(u) + tol(v)/2` at most; `C 0` is
    exact.
    """
    u, v = problem.u, problem.v
    w = tree.add_scaled(tree.scale(2.0, u), -0.5, v)
    C_u, C_v, C_w = (in_float64(product_of(linearity, product, problem, x)) for x in (u, v, w))
    expected = tree.add_scaled(tree.scale(2.0, C_u), -0.5, C_v)
    tolerance = product_tolerance(problem, w) + 2 * product_tolerance(problem, u) + product_tolerance(problem, v) / 2
    tolerance += result_tolerance(problem, C_w, C_u, C_u, C_v)
    require_close(
        linearity,
        C_w,
        expected,
        tolerance,
        what="C (2 u - v/2) is not 2 C u - (C v)/2",
        case=problem,
        cause=lambda: (
            cause_of_precision(problem.dtype, C_w, expected, size=float(tree.norm(C_u) + tree.norm(C_v)))
            or "something that is not linear in v: v is normalised, clipped, or added to the parameters as it is"
        ),
    )
    zeros = tree.zeros_like(v)
    require_close(
        linearity,
        product_of(linearity, product, problem, zeros),
        zeros,
        0.0,
        what="C 0 is not 0",
        case=problem,
        cause=lambda: "a term that does not depend on v is added (a gradient?), or 0/0 for v = 0",
    )


def symmetry(product: Product, problem: Problem) -> None:
    """`<u, C v> = <v, C u>`, within `|u| tol(v) + |v| tol(u)` (the inner products are taken in float64)."""
    u, v = problem.u, problem.v
    C_u, C_v = (in_float64(product_of(symmetry, product, problem, x)) for x in (u, v))
    u_C_v, v_C_u = tree.vdot(in_float64(u), C_v), tree.vdot(in_float64(v), C_u)
    tolerance = float(tree.norm(u)) * (product_tolerance(problem, v) + result_tolerance(problem, C_v))
    tolerance += float(tree.norm(v)) * (product_tolerance(problem, u) + result_tolerance(problem, C_u))
    require_close(
        symmetry,
        {"<u, C v>": u_C_v},
        {"<u, C v>": v_C_u},
        tolerance,
        what="<u, C v> is not <v, C u>",
        case=problem,
        cause=lambda: (
            "the matrix is not symmetric: a Jacobian in place of its transpose, entries flattened in one order and "
            "restored in another, or derivatives that stop at a detach()"
        ),
    )


def semidefiniteness(product: Product, problem: Problem) -> None:
    """`<v, C v> >= 0` for a Gauss-Newton or Fisher matrix (the losses here are convex), within `|v| tol(v)`."""
    v = problem.v
    v_C_v = tree.vdot(in_float64(v), in_float64(product_of(semidefiniteness, product, problem, v)))
    if not v_C_v >= -room_for_inner_product(float(tree.norm(v)) * product_tolerance(problem, v), v_C_v):
        expected = dense_product(problem, v)
        got = product_of(semidefiniteness, product, problem, v)
        raise LawBroken(
            semidefiniteness,
            f"<v, C v> = {float(v_C_v):.3g} < 0",
            got=got,
            expected=expected,
            cause=cause_of_product(problem, v, got, expected, product_tolerance(problem, v)),
            case=problem,
        )


def additivity(product: Product, problem: Problem) -> None:
    """`B C_B = k C_first + (B - k) C_rest`: means over batches add up with their sizes as weights (k is about B/3).

    Within `B tol + k tol_first + (B - k) tol_rest`, each on its own batch. Holds trivially for B < 2.
    """
    B, k, v = problem.batch_size, (problem.batch_size + 2) // 3, problem.v
    if B < 2:
        return
    parts = [problem, problem._replace(batch=problem.rows(slice(k))), problem._replace(batch=problem.rows(slice(k, B)))]
    whole, first, rest = (in_float64(product_of(additivity, product, part, v)) for part in parts)
    expected = tree.scale(1 / B, tree.add_scaled(tree.scale(float(k), first), float(B - k), rest))
    tolerances = [product_tolerance(part, v) for part in parts]
    tolerance = tolerances[0] + (k * tolerances[1] + (B - k) * tolerances[2]) / B
    tolerance += result_tolerance(problem, whole, first, rest)
    require_close(
        additivity,
        whole,
        expected,
        tolerance,
        what=f"the product on {B} examples is not the weighted mean of those on {k} and {B - k}",
        case=problem,
        cause=lambda: (
            cause_of_product(problem, v, whole, dense_product(problem, v), tolerances[0])
            or "a sum where a mean is asked for, unequal batches given equal weight, or examples left out"
        ),
    )


def key_order(product: Product, problem: Problem) -> None:
    """`C v` does not depend on the order of the keys of `params` or of `v`: within `2 tol(v)`.

    Only sums may be ordered otherwise, and `tol(v)` bounds each side's rounding.
    """
    expected = product_of(key_order, product, problem, problem.v)
    turned = dict(reversed(problem.params.items()))
    for params, v, what in (
        (turned, dict(reversed(problem.v.items())), "params and v"),
        (problem.params, dict(reversed(problem.v.items())), "v"),
    ):
        got = product_of(key_order, product, problem, v, params=params)
        require_close(
            key_order,
            {k: got[k] for k in expected},
            expected,
            2 * product_tolerance(problem, problem.v) + 2 * result_tolerance(problem, expected),
            what=f"turning the order of the keys of {what} changes C v",
            case=problem,
            cause=lambda: "tensors are matched by position: match them by key",
        )


def reparametrisation(product: Product, problem: Problem) -> None:
    """`C` transforms by the Jacobian: for `p = A q`, `C_q v = A^T C_p A v`.

    A is lower bidiagonal in each tensor, `p_i = (q_i + q_(i-1)) / 2`, so it is exact in binary, keeps entries bounded
    and is not symmetric; with `|A| <= 1` the sides differ by `tol_q(v) + tol_p(A v)` at most. (A has no second
    derivative, so the law holds for Hessians too.)
    """

    def average(x: Tensor) -> Tensor:
        flat = x.reshape(-1)
        return (torch.cat([flat[:1], flat[1:] + flat[:-1]]) / 2).reshape(x.shape)

    def average_transposed(x: Tensor) -> Tensor:
        flat = x.reshape(-1)
        return (torch.cat([flat[:-1] + flat[1:], flat[-1:]]) / 2).reshape(x.shape)

    def through_average(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda q, batch: fn(tree.map(average, q), batch)

    in_q = problem._replace(
        loss_fn=through_average(problem.loss_fn),
        example_loss_fn=through_average(problem.example_loss_fn),
        output_fn=through_average(problem.output_fn),
        recipe=problem.recipe | {"_averaged": True},  # another problem than that of the recipe
    )
    in_p = problem._replace(params=tree.map(average, problem.params))
    v, A_v = problem.v, tree.map(average, problem.v)
    got = product_of(reparametrisation, product, in_q, v)
    expected = tree.map(average_transposed, in_float64(product_of(reparametrisation, product, in_p, A_v)))
    require_close(
        reparametrisation,
        got,
        expected,
        product_tolerance(in_q, v) + product_tolerance(in_p, A_v) + result_tolerance(problem, got, expected),
        what="in coordinates p = A q the product is not A^T C A v",
        case=problem,
        cause=lambda: (
            "derivatives do not pass through the whole loss: a detach(), a Jacobian left out or not transposed"
        ),
    )


def difference_of_gradients(product: Product, problem: Problem) -> None:
    """`H v = (grad L(p + e v) - grad L(p - e v)) / 2e`, from first derivatives alone. For Hessians.

    Taken in float64, where `e = u^(1/3) (1 + |p|) / |v|` balances truncation and rounding; their size is the change
    from step e to 2e (truncation changes by three times itself), and rounding of each gradient over e: the tolerance is
    that change plus `tol` of a difference product in float64, plus `tol(v)` of the product under test.
    """
    v = problem.v
    if tree.norm(v) == 0:
        return
    exact = problem.in_float64()
    e = difference_step(exact, exact.v)
    expected = gradient_difference(exact, exact.v, e)
    tolerance = product_tolerance(exact._replace(accuracy="difference"), exact.v) + product_tolerance(problem, v)
    got = product_of(difference_of_gradients, product, problem, v)
    require_close(
        difference_of_gradients,
        got,
        expected,
        tolerance,
        what="C v is not the derivative of the gradient along v",
        case=problem,
        cause=lambda: cause_of_product(problem, v, got, dense_product(problem, v), tolerance),
    )


def dense_agreement(product: Product, problem: Problem) -> None:
    """`C v` is the dense matrix times v, within `tol(v)`; the matrix is built entry by entry in float64.

    Taken at a third of the parameters and of v: numbers that use every bit of their dtype, so that an input rounded to
    a shorter one shows.
    """
    third = problem._replace(params=tree.scale(1 / 3, problem.params), v=tree.scale(1 / 3, problem.v))
    got = product_of(dense_agreement, product, third, third.v)
    expected = dense_product(third, third.v)
    tolerance = product_tolerance(third, third.v)
    require_close(
        dense_agreement,
        got,
        expected,
        tolerance,
        what="C v is not the dense matrix times v, at a third of the case's parameters and of its v",
        case=problem,
        cause=lambda: cause_of_product(third, third.v, got, expected, tolerance),
    )


def linear_model(product: Product, problem: Problem) -> None:
    """`G v = H v` where the outputs are linear in the parameters: there the Gauss-Newton matrix is the Hessian.

    Within `tol(v)`, against the dense Hessian in float64. Says nothing for other models.
    """
    if problem.recipe.get("model", "linear") != "linear":
        return
    got = product_of(linear_model, product, problem, problem.v)
    expected = dense_product(problem._replace(curvature="hessian"), problem.v)
    tolerance = product_tolerance(problem, problem.v)
    require_close(
        linear_model,
        got,
        expected,
        tolerance,
        what="for a linear model the Gauss-Newton product is not the Hessian's",
        case=problem,
        cause=lambda: cause_of_product(problem, problem.v, got, expected, tolerance),
    )


def vmap_is_loop(product: Product, problem: Problem) -> None:
    """`vmap(C)([u, v]) = [C u, C v]`, within `2 tol` of each, as both sides round. Opt in: `vmap=True`."""
    stack = tree.map(lambda a, b: torch.stack([a, b]), problem.u, problem.v)

    def one(v: Params) -> Params:
        return product(*problem.functions, problem.params, problem.batch, v)

    got = run(vmap_is_loop, problem, lambda: torch.vmap(one)(stack))
    for i, v in enumerate((problem.u, problem.v)):
        alone = product_of(vmap_is_loop, product, problem, v)
        require_close(
            vmap_is_loop,
            {k: got[k][i] for k in v},
            alone,
            2 * product_tolerance(problem, v) + 2 * result_tolerance(problem, alone),
            what=f"vmap over two vectors and a loop differ at vector {i}",
            case=problem,
            cause=lambda: "vectors are mixed: a norm or a sum over all of them, or a decision taken once for all",
        )
