"""`(H + damping I) x = v` by other means than LiSSA: conjugate gradients, MINRES, and a dense solve.

Same call, same `Solution`: whoever doubts LiSSA changes one word. Written for one vector; under `torch.vmap` each
right-hand side stops on its own, with one look from the host a step. Knows products; knows nothing of losses.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from lissa import checks, host, outcome, tree
from lissa.operators import damped
from lissa.outcome import RUNNING
from lissa.types import Matvec, Params, Solution, Status

AIM = 0.9
"""Iterations stop at this fraction of `rtol`: the residual they carry along differs from the true one by rounding."""


class _CgState(NamedTuple):
    """`r = v - A x`, the direction `p`, and `r_z = <r, M r>` with the preconditioner `M`."""

    x: Params
    r: Params
    p: Params
    r_z: Tensor
    status: Tensor
    steps: Tensor


def solve_cg(
    matvec: Matvec,
    v: Params,
    *,
    damping: float = 0.0,
    preconditioner: Matvec | None = None,
    rtol: float = 1e-4,
    steps: int = 1000,
    throw: bool = True,
) -> Solution:
    """`x = (H + damping I)^-1 v` for positive definite `H + damping I`, by conjugate gradients.

    Takes about `sqrt(kappa) / 2 * ln(2 / rtol)` products, `kappa` the ratio of the largest to the smallest eigenvalue
    of `H + damping I`. A direction of negative curvature, once met, ends the solve with `Status.INDEFINITE`.

    Args:
        matvec: `matvec(v) -> H v` on all the data, for instance `partial(hvp, loss_fn, params, batch)` or
            `mean_matvec(...)`. Symmetric, and the same at each call.
        v: The right-hand side.
        damping: In the units of `H`.
        preconditioner: `r -> M r`, `M` positive definite and close to `(H + damping I)^-1`; see
            `lissa.preconditioners`.
        rtol: A right-hand side is done once its residual is at most `rtol |v|`.
        steps: The most products taken.
        throw: Whether a failure raises `SolverError`. If False, it is data: `status` names it, `value` is all NaN.

    Returns:
        The `Solution`. `residual_norm` is that of `value`, from a product of its own, on the data of `matvec`;
        `residual_trace` is the recurrence's. Below the rounding of the dtype `rtol` cannot be met: `FINISHED`.

    Raises:
        ValueError: If an argument breaks its rule.
        SolverError: If `H + damping I` is not positive definite or a product holds NaN, and `throw` is True.

    Example:
        >>> def matvec(v):
        ...     return {"x": torch.tensor([1.0, 3.0]) * v["x"]}
        >>> solve_cg(matvec, {"x": torch.tensor([2.0, 8.0])}, damping=1.0).value
        {'x': tensor([1., 2.])}

    Source: J. Nocedal and S. Wright, Numerical Optimization, 2nd ed., algorithms 5.2 and 5.3.
    """
    _check("solve_cg", v, damping, rtol, steps)
    A, M = damped(matvec, damping), preconditioner or _identity
    length = tree.norm(v)
    z = M(v)
    state = _CgState(tree.zeros_like(v), v, z, tree.vdot(v, z), _start(length, rtol), _none(length))

    def step(state: _CgState) -> tuple[_CgState, Tensor]:
        A_p = A(state.p)
        curvature = tree.vdot(state.p, A_p)
        a = state.r_z / curvature
        x, r = tree.add_scaled(state.x, a, state.p), tree.add_scaled(state.r, -a, A_p)
        z = M(r)
        r_z = tree.vdot(r, z)
        residual_norm = tree.norm(r)
        status = torch.where(residual_norm <= AIM * rtol * length, int(Status.CONVERGED), RUNNING)
        status = torch.where((curvature <= 0) | (r_z < 0), int(Status.INDEFINITE), status)
        status = torch.where(residual_norm.isfinite() | (curvature <= 0), status, int(Status.NOT_FINITE))
        return _CgState(x, r, tree.add_scaled(z, r_z / state.r_z, state.p), r_z, status, state.steps + 1), residual_norm

    state, trace = _iterate(step, state, steps)
    return _end(f"solve_cg(damping={damping:g})", A, v, state.x, state.status, state.steps, length, trace, rtol, throw)


class _MinresState(NamedTuple):
    """Lanczos vectors `r1`, `r2`, their image `y`, the last directions, the last rotation, and the size of `A`."""

    x: Params
    r1: Params
    r2: Params
    y: Params
    w1: Params
    w2: Params
    beta: Tensor
    old_beta: Tensor
    delta_bar: Tensor
    epsilon: Tensor
    phi_bar: Tensor
    cosine: Tensor
    sine: Tensor
    size: Tensor
    status: Tensor
    steps: Tensor


def solve_minres(
    matvec: Matvec,
    v: Params,
    *,
    damping: float = 0.0,
    preconditioner: Matvec | None = None,
    rtol: float = 1e-4,
    steps: int = 1000,
    throw: bool = True,
) -> Solution:
    """`x = argmin |v - (H + damping I) x|` over growing Krylov spaces: MINRES, for symmetric `H` of any sign.

    The method for Hessians with negative eigenvalues. On definite matrices about as fast as `solve_cg`.

    Args:
        matvec: `matvec(v) -> H v` on all the data. Symmetric, and the same at each call.
        v: The right-hand side.
        damping: In the units of `H`.
        preconditioner: `r -> M r`, `M` positive definite; the norm that is minimised is then `sqrt(<r, M r>)`.
        rtol: A right-hand side is done once its residual (in that norm) is at most `rtol` times that of `v`.
        steps: The most products taken.
        throw: Whether a failure raises `SolverError`. If False, it is data: `status` names it, `value` is all NaN.

    Returns:
        The `Solution`. `residual_norm` is that of `value`, from a product of its own, on the data of `matvec`;
        `residual_trace` is the recurrence's (in the preconditioner's norm). If `H + damping I` is singular and `v` has
        a part in its null space, `rtol` cannot be met: `FINISHED`.

    Raises:
        ValueError: If an argument breaks its rule.
        SolverError: If a product holds NaN or `preconditioner` is not positive definite, and `throw` is True.

    Example:
        >>> def matvec(v):
        ...     return {"x": torch.tensor([1.0, -3.0]) * v["x"]}
        >>> solve_minres(matvec, {"x": torch.tensor([2.0, 8.0])}, damping=1.0).value
        {'x': tensor([ 1., -4.])}

    Source: C. Paige and M. Saunders, Solution of sparse indefinite systems of linear equations, SIAM J. Numer. Anal. 12
    (1975), section 5 and its appendix.
    """
    _check("solve_minres", v, damping, rtol, steps)
    A, M = damped(matvec, damping), preconditioner or _identity
    length = tree.norm(v)
    y = M(v)
    v_y = tree.vdot(v, y)
    beta = v_y.clamp(min=0).sqrt()
    status = _start(length, rtol)
    status = torch.where((v_y < 0) & (status == RUNNING), int(Status.INDEFINITE), status)
    zero, nothing = torch.zeros_like(beta), tree.zeros_like(v)
    state = _MinresState(
        x=nothing, r1=v, r2=v, y=y, w1=nothing, w2=nothing, beta=beta, old_beta=zero, delta_bar=zero, epsilon=zero,
        phi_bar=beta, cosine=zero - 1, sine=zero, size=zero, status=status, steps=_none(length),
    )  # fmt: skip
    tiny, eps = torch.finfo(length.dtype).tiny, torch.finfo(length.dtype).eps

    def step(s: _MinresState) -> tuple[_MinresState, Tensor]:
        # Lanczos: the next column of the tridiagonal matrix, (old_beta, alpha, beta).
        q = tree.scale(1 / s.beta, s.y)
        y = A(q)
        back = torch.where(s.steps > 0, s.beta / s.old_beta, 0.0)
        y = tree.add_scaled(y, -back, s.r1)
        alpha = tree.vdot(q, y)
        y = tree.add_scaled(y, -alpha / s.beta, s.r2)
        r1, r2 = s.r2, y
        y = M(r2)
        r2_y = tree.vdot(r2, y)
        beta = r2_y.clamp(min=0).sqrt()
        # QR: the previous rotation on this column, then the next rotation.
        delta = s.cosine * s.delta_bar + s.sine * alpha
        gamma_bar = s.sine * s.delta_bar - s.cosine * alpha
        epsilon, delta_bar = s.sine * beta, -s.cosine * beta
        gamma = torch.sqrt(gamma_bar**2 + beta**2).clamp(min=tiny)
        cosine, sine = gamma_bar / gamma, beta / gamma
        phi, phi_bar = cosine * s.phi_bar, sine * s.phi_bar
        w = tree.map(lambda q, w1, w2: (q - s.epsilon * w1 - delta * w2) / gamma, q, s.w1, s.w2)
        x = tree.add_scaled(s.x, phi, w)
        status = torch.where(phi_bar <= AIM * rtol * beta_of_v, int(Status.CONVERGED), RUNNING)
        # |A r| = phi_bar |(gamma_bar, delta_bar)| = 0: no x does better, `A` is singular.
        size = torch.maximum(s.size, torch.hypot(alpha, beta))
        stuck = torch.hypot(gamma_bar, delta_bar) <= 10 * eps * size
        x, phi_bar = tree.where(stuck, s.x, x), torch.where(stuck, s.phi_bar, phi_bar)
        status = torch.where(stuck, int(Status.FINISHED), status)
        status = torch.where(r2_y < -tiny, int(Status.INDEFINITE), status)
        status = torch.where(phi_bar.isfinite(), status, int(Status.NOT_FINITE))
        return _MinresState(
            x=x, r1=r1, r2=r2, y=y, w1=s.w2, w2=w, beta=beta, old_beta=s.beta, delta_bar=delta_bar, epsilon=epsilon,
            phi_bar=phi_bar, cosine=cosine, sine=sine, size=size, status=status, steps=s.steps + 1,
        ), phi_bar  # fmt: skip

    beta_of_v = beta
    state, trace = _iterate(step, state, steps)
    return _end(
        f"solve_minres(damping={damping:g})", A, v, state.x, state.status, state.steps, length, trace, rtol, throw
    )


_State = TypeVar("_State", _CgState, _MinresState)


def solve_dense(
    matvec: Matvec,
    v: Params,
    *,
    damping: float = 0.0,
    rtol: float = 1e-4,
    chunk_size: int | None = 64,
    throw: bool = True,
) -> Solution:
    """`x = (H + damping I)^-1 v` from the dense `(P, P)` matrix: the reference for small `P`, for `H` of any sign.

    Args:
        matvec: `matvec(v) -> H v` on all the data; called for the P unit vectors.
        v: The right-hand side. Under `torch.vmap` the matrix is built once.
        damping: In the units of `H`.
        rtol: The status is `CONVERGED` if the residual is at most `rtol |v|`. It changes no number.
        chunk_size: Unit vectors that go through one vmapped product. None: one by one without vmap, for products that
            cannot be vmapped.
        throw: Whether a failure raises `SolverError`. If False, it is data: `status` names it, `value` is all NaN.

    Returns:
        The `Solution`, its residual by a product of its own; a singular matrix ends in `INDEFINITE`. `steps` is P.

    Raises:
        ValueError: If an argument breaks its rule.
        SolverError: If the matrix is singular or holds NaN, and `throw` is True.

    Example:
        >>> def matvec(v):
        ...     return {"x": torch.tensor([1.0, -3.0]) * v["x"]}
        >>> solve_dense(matvec, {"x": torch.tensor([2.0, 8.0])}, damping=1.0).value
        {'x': tensor([ 1., -4.])}
    """
    _check("solve_dense", v, damping, rtol, steps=1)
    if chunk_size is not None:
        checks.count("solve_dense", "chunk_size", chunk_size)
    P = tree.numel(v)
    matrix = dense_matrix(matvec, v, chunk_size=chunk_size)
    factored = matrix + damping * torch.eye(P, dtype=matrix.dtype, device=matrix.device)
    flat, info = torch.linalg.solve_ex(factored, tree.flatten(v))
    length = tree.norm(v)
    status = torch.where(info == 0, RUNNING, int(Status.INDEFINITE)) + _none(length)
    status = torch.where(factored.isfinite().all() & length.isfinite(), status, int(Status.NOT_FINITE))
    x = tree.unflatten(flat, v)
    call = f"solve_dense(damping={damping:g})"
    return _end(call, damped(matvec, damping), v, x, status, _none(length) + P, length, [], rtol, throw)


def dense_matrix(matvec: Matvec, like: Params, *, chunk_size: int | None = 64) -> Tensor:
    """`H`, shape `(P, P)`, from its products with the unit vectors; made symmetric.

    Args:
        matvec: `matvec(v) -> H v`.
        like: Parameters that give keys, shapes and dtype.
        chunk_size: As in `solve_dense`.
    """
    flat = tree.flatten(like)
    eye = torch.eye(len(flat), dtype=flat.dtype, device=flat.device)

    def column(unit: Tensor) -> Tensor:
        return tree.flatten(matvec(tree.unflatten(unit, like)), like)

    if chunk_size is None:
        columns = torch.stack([column(unit) for unit in eye])
    else:
        columns = torch.vmap(column, chunk_size=chunk_size)(eye)
    return (columns + columns.mT) / 2


def _iterate(step: Callable[[_State], tuple[_State, Tensor]], state: _State, steps: int) -> tuple[_State, list[Tensor]]:
    """Steps until all right-hand sides have ended, and keeps what one that has ended had found."""
    trace: list[Tensor] = []
    for _ in range(steps):
        if not host.any_true(state.status == RUNNING):
            break
        new, residual_norm = step(state)
        running = state.status == RUNNING
        trace.append(torch.where(running, residual_norm, torch.nan))
        usable = running & (new.status < Status.DIVERGED)
        state = new._replace(
            x=tree.where(usable, new.x, state.x),
            status=torch.where(running, new.status, state.status),
            steps=torch.where(running, new.steps, state.steps),
        )
    return state, trace


def _end(
    call: str,
    A: Matvec,
    v: Params,
    x: Params,
    status: Tensor,
    steps: Tensor,
    length: Tensor,
    trace: list[Tensor],
    rtol: float,
    throw: bool,
) -> Solution:
    """The `Solution`, judged by the true residual and by nothing that the iteration believed."""
    residual_norm = tree.norm(tree.sub(v, A(x)))
    reached = torch.where(residual_norm <= rtol * length, int(Status.CONVERGED), int(Status.FINISHED))
    status = torch.where(status >= Status.DIVERGED, status, reached)
    solution = outcome.solution(x, status=status, residual_norm=residual_norm, length=length, steps=steps, trace=trace)
    if throw:
        outcome.raise_on_failure(call, solution)
    return solution


def _start(length: Tensor, rtol: float) -> Tensor:
    status = torch.where(length == 0, int(Status.CONVERGED), RUNNING)
    return torch.where(length.isfinite(), status, int(Status.NOT_FINITE))


def _none(length: Tensor) -> Tensor:
    return torch.zeros_like(length, dtype=torch.int64)


def _identity(v: Params) -> Params:
    return v


def _check(call: str, v: Params, damping: float, rtol: float, steps: int) -> None:
    checks.params(call, v, "v")
    checks.finite(call, "damping", damping)
    checks.positive(call, "rtol", rtol)
    checks.count(call, "steps", steps)
