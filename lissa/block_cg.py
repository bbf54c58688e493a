"""Conjugate gradients for K right-hand sides that share one Krylov space: each gains from the products of all.

Knows stacked products; knows nothing of losses or of what the right-hand sides are.
"""

import torch
from torch import Tensor

from lissa import checks, host, outcome, tree
from lissa.outcome import RUNNING
from lissa.solvers import AIM
from lissa.types import Matvec, Params, Solution, Status


def solve_block_cg(
    matvec: Matvec,
    v: Params,
    *,
    damping: float = 0.0,
    rtol: float = 1e-4,
    steps: int = 1000,
    throw: bool = True,
) -> Solution:
    """`x_k = (H + damping I)^-1 v_k` for k = 1..K, each the best in the Krylov space of all K right-hand sides.

    A step takes one product of K vectors, as K runs of `solve_cg` do, and the space grows by K dimensions instead of
    one for each. The number of steps is about that of CG on a matrix without its K - 1 largest eigenvalues, at most
    about `sqrt((lambda_K + damping) / damping) / 2 * ln(2 / rtol)`, where `lambda_K <= trace / K`. Gradients of 100
    test losses of MNIST models take 5 steps where `solve_cg` takes 27. Besides the products a step costs about
    `8 K^2 P` multiplications, and five stacks of K vectors are held.

    The residuals are kept as `Q C` with orthonormal `Q`, so that right-hand sides that are equal, depend on each other
    or have converged do no harm. What one right-hand side gets depends, within `rtol`, on which others are there.

    Args:
        matvec: `matvec(vectors) -> H v_k` for each k, on all the data; tensors of shape `(K, *shape)`, there and back:
            for instance `torch.vmap(partial(hvp, loss_fn, params, batch))`, or `partial(stacked_hvp, ...)`. Symmetric,
            and the same at each call. If K > P it gets P vectors.
        v: K right-hand sides, stacked.
        damping: In the units of `H`.
        rtol: All are done once each has a residual of at most `rtol |v_k|`.
        steps: The most steps, each one product a right-hand side.
        throw: Whether a failure raises `SolverError`. If False, it is data: `status` names it, `value` is all NaN.

    Returns:
        The `Solution` of each right-hand side, stacked. `residual_norm` is that of `value`, from a product of its own;
        `residual_trace`, shape `(K, steps)`, is the recurrence's.

    Raises:
        ValueError: If an argument breaks its rule.
        SolverError: If `H + damping I` is not positive definite or a product holds NaN, and `throw` is True.

    Example:
        >>> def matvec(v):
        ...     return {"x": torch.tensor([1.0, 3.0]) * v["x"]}
        >>> v = {"x": torch.tensor([[2.0, 8.0], [4.0, 4.0]])}
        >>> solve_block_cg(matvec, v, damping=1.0).value["x"].round(decimals=4)
        tensor([[1., 2.],
                [2., 1.]])

    Source: D. O'Leary, The block conjugate gradient algorithm and related methods, Linear Algebra Appl. 29 (1980), for
    the method and its rate; A. Dubrulle, Retooling the method of block conjugate gradients, ETNA 12 (2001), algorithm
    BCGrQ, for the form.
    """
    call = "solve_block_cg"
    checks.stacked(call, v, "v")
    checks.finite(call, "damping", damping)
    checks.positive(call, "rtol", rtol)
    checks.count(call, "steps", steps)
    like = tree.map(lambda t: t[0], v)

    def unflatten(x: Tensor) -> Params:
        return tree.map(lambda t, like: t.to(like.dtype), tree.unflatten(x, like), like)

    def product(x: Tensor) -> Tensor:
        """`(H + damping I) x_k`, of rows."""
        products = torch.vmap(tree.flatten)(matvec(torch.vmap(unflatten)(x))).detach()
        return torch.add(products.to(x.dtype), x, alpha=damping)

    # Stacks of vectors are rows, (K, P), as products come and go: to add columns to rows takes as long as to multiply.
    b = torch.vmap(tree.flatten)(v).detach()
    b = b.to(torch.promote_types(b.dtype, torch.float32))
    length = b.norm(dim=1)
    finite = length.isfinite()
    status = torch.where(finite, RUNNING, int(Status.NOT_FINITE))
    status = torch.where(length == 0, int(Status.CONVERGED), status)
    q, C = _orthonormal(torch.where(finite.unsqueeze(1), b, 0.0))  # the residuals are C^T q
    x, s = torch.zeros_like(b), q
    trace: list[Tensor] = []
    while len(trace) < steps and host.any_true(status == RUNNING):
        A_s = product(s)
        curvature = s @ A_s.mT
        factor, not_definite = torch.linalg.cholesky_ex((curvature + curvature.mT) / 2)
        if not host.any_true(curvature.isfinite().all() & (not_definite == 0)):
            why = torch.where(curvature.isfinite().all(), int(Status.INDEFINITE), int(Status.NOT_FINITE))
            status = torch.where(status == RUNNING, why, status)
            break
        x.addmm_(torch.cholesky_solve(C, factor).mT, s)
        inverse = torch.cholesky_inverse(factor.double()).to(factor.dtype)
        q, R = _orthonormal(torch.addmm(q, inverse, A_s, alpha=-1))
        C, s = R @ C, torch.addmm(q, R, s)
        trace.append(torch.where(finite, C.norm(dim=0), torch.nan))
        status = torch.where((status == RUNNING) & (trace[-1] <= AIM * rtol * length), int(Status.CONVERGED), status)

    residual_norm = (b - product(x)).norm(dim=1)
    reached = torch.where(residual_norm <= rtol * length, int(Status.CONVERGED), int(Status.FINISHED))

    def end(x: Tensor, status: Tensor, residual_norm: Tensor, length: Tensor, trace: Tensor) -> Solution:
        return outcome.solution(
            unflatten(x), status=status, residual_norm=residual_norm, length=length,
            steps=torch.zeros_like(status) + len(trace), trace=list(trace),
        )  # fmt: skip

    traces = torch.stack(trace, 1) if trace else length[:, None][:, :0]
    solution = torch.vmap(end)(
        x, torch.where(status >= Status.DIVERGED, status, reached), residual_norm, length, traces
    )
    if throw:
        outcome.raise_on_failure(f"{call}(damping={damping:g})", solution)
    return solution


def _orthonormal(x: Tensor) -> tuple[Tensor, Tensor]:
    """`q, R` with orthonormal rows of q and `x = R^T q`."""
    Q, R = torch.linalg.qr(x.mT)
    return Q.mT, R
