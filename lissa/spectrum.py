"""The ends of the spectrum and the trace of a symmetric matrix, from products alone, each with its error.

Also how much batches differ from their mean, which bounds LiSSA's step beside the spectrum.

Knows products and a `torch.Generator`; knows nothing of losses or of what the numbers are for (see `lissa.tuning`).
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from lissa import checks, host, tree
from lissa.types import Batch, BatchMatvec, Matvec, Params

ASYMMETRY_LIMIT = 0.01
"""A matrix that is further from symmetric than this, relative to its size, is not one that rounding made so."""


class Spectrum(NamedTuple):
    """Eigenvalues of `H` at both ends and its trace, in the units of `H`; each of shape `()` but for `dimension`.

    Attributes:
        largest: Lower estimate of the largest eigenvalue (a Rayleigh quotient).
        largest_bound: The largest eigenvalue is at most this with probability >= 1 - `risk` of `estimate_spectrum`.
        smallest: Upper estimate of the smallest eigenvalue.
        smallest_bound: The smallest eigenvalue is at least this with probability >= 1 - `risk`.
        largest_residual: `|H q - largest q|`: some eigenvalue lies within this distance of `largest`.
        smallest_residual: The same for `smallest`.
        trace: The sum of all eigenvalues.
        trace_error: Standard error of `trace`.
        dimension: Number of eigenvalues, `P`.
        products: Number of products taken.
    """

    largest: Tensor
    largest_bound: Tensor
    smallest: Tensor
    smallest_bound: Tensor
    largest_residual: Tensor
    smallest_residual: Tensor
    trace: Tensor
    trace_error: Tensor
    dimension: int
    products: int


def estimate_spectrum(
    matvec: Matvec,
    like: Params,
    *,
    generator: torch.Generator,
    steps: int = 20,
    probes: int = 10,
    risk: float = 0.01,
) -> Spectrum:
    """`lambda_max`, `lambda_min` by Lanczos and `tr H = tr Q^T H Q + E z.(I - QQ^T) H (I - QQ^T) z` by probes.

    Lanczos from a random start with full reorthogonalisation gives Ritz values inside the spectrum: `largest` is at
    most lambda_max. How much it may fall short is known with probability `1 - risk` over the start, whatever the
    matrix: by at most `e (lambda_max - lambda_min)` with `e = (ln(1.648 sqrt(P) / risk) / (2 steps - 1))^2`. The trace
    is exact on the Lanczos vectors `Q` and estimated by random signs on the rest (Hutch++ with `Q` as its sketch).

    Args:
        matvec: `matvec(v) -> H v`, symmetric and the same at each call. For stochastic products take the mean over
            some batches, `mean_matvec(matvec, batches)`: the estimates are then those of that sample.
        like: Parameters that give keys, shapes and dtype.
        generator: Where the start and the probes come from.
        steps: Lanczos steps, at least 2; no more than P are taken. As many vectors are kept.
        probes: Products for the rest of the trace; at least 2.
        risk: Chance that `largest_bound` (or `smallest_bound`) does not hold.

    Returns:
        The `Spectrum`, after `steps + probes` products.

    Raises:
        ValueError: If an argument breaks its rule, a product is not finite, or the matrix is not symmetric or changes
            from call to call (dropout, shuffling).

    Example:
        >>> def matvec(v):
        ...     return {"x": torch.tensor([1.0, 2.0, 6.0]) * v["x"]}
        >>> spectrum = estimate_spectrum(matvec, {"x": torch.zeros(3)}, generator=torch.Generator().manual_seed(0))
        >>> [round(float(x), 3) for x in (spectrum.smallest, spectrum.largest, spectrum.trace)]
        [1.0, 6.0, 9.0]

    Source: J. Kuczynski and H. Wozniakowski, Estimating the largest eigenvalue by the power and Lanczos algorithms with
    a random start, SIAM J. Matrix Anal. Appl. 13 (1992), theorem 4.2; R. Meyer, C. Musco, C. Musco and D. Woodruff,
    Hutch++: optimal stochastic trace estimation, SOSA 2021, algorithm 1.
    """
    call = "estimate_spectrum"
    checks.params(call, like, "like")
    checks.generator(call, generator)
    checks.count(call, "steps", steps, at_least=2)
    checks.count(call, "probes", probes, at_least=2)
    checks.positive(call, "risk", risk)
    H, flat = flat_matvec(matvec, like), tree.flatten(like)
    P = len(flat)

    Q, H_Q, beta = _lanczos(H, flat, min(steps, P), generator)
    T = Q @ H_Q.mT
    if not host.any_true(T.isfinite().all()):
        raise ValueError(f"`{call}(matvec=...)` must give finite products, got NaN or infinity.")
    if host.any_true((T - T.mT).norm() > ASYMMETRY_LIMIT * T.norm()):
        raise ValueError(
            f"`{call}(matvec=...)` must be symmetric and the same at each call, and it is not: "
            f"|Q^T H Q - its transpose| = {host.number((T - T.mT).norm() / T.norm()):.2g} of its size. "
            "Fix the batches (`mean_matvec`) and switch dropout off."
        )
    values, vectors = torch.linalg.eigh((T + T.mT) / 2)
    residuals = beta * vectors[-1].abs()
    slack = 0.0 if _is_small(beta, H_Q) else _slack(P, len(Q), risk) * (values[-1] - values[0])

    def probe() -> Tensor:
        z = host.signs(P, flat.dtype, flat.device, generator)
        z = z - Q.mT @ (Q @ z)
        return z @ H(z)

    rest = torch.stack([probe() for _ in range(probes)]) if len(Q) < P else flat.new_zeros(2)
    return Spectrum(
        largest=values[-1],
        largest_bound=values[-1] + slack,
        smallest=values[0],
        smallest_bound=values[0] - slack,
        largest_residual=residuals[-1],
        smallest_residual=residuals[0],
        trace=T.diagonal().sum() + rest.mean(),
        trace_error=rest.std() / len(rest) ** 0.5,
        dimension=P,
        products=len(Q) + (probes if len(Q) < P else 0),
    )


def largest_eigenvalue(
    matvec: Matvec, like: Params, *, generator: torch.Generator, steps: int = 8, rtol: float = 0.0
) -> Tensor:
    """The largest eigenvalue from below, `max eig(Q^T H Q)` after a few Lanczos steps: to a digit or two, and cheap.

    In a few steps the three-term recurrence loses no orthogonality worth mending, so that besides the products only
    three vectors are passed over and kept. `estimate_spectrum` says how far off it may be.

    Args:
        matvec: `matvec(v) -> H v`, symmetric and the same at each call.
        like: Parameters that give keys, shapes and dtype.
        generator: Where the start comes from.
        steps: Most products.
        rtol: Where to stop before: as soon as `|H x - theta x| <= rtol |theta|` for the quotient `theta` of the unit
            vector x it belongs to. An eigenvalue is then as near as that, and nearer by far if it lies apart.

    Returns:
        The Rayleigh quotient, shape `()`.

    Raises:
        ValueError: If an argument breaks its rule.

    Example:
        >>> def matvec(v):
        ...     return {"x": torch.tensor([1.0, 2.0, 6.0]) * v["x"]}
        >>> largest = largest_eigenvalue(matvec, {"x": torch.zeros(3)}, generator=torch.Generator().manual_seed(0))
        >>> round(float(largest), 3)
        6.0

    Source: C. Lanczos, J. Research NBS 45 (1950).
    """
    checks.params("largest_eigenvalue", like, "like")
    checks.generator("largest_eigenvalue", generator)
    checks.count("largest_eigenvalue", "steps", steps)
    checks.non_negative("largest_eigenvalue", "rtol", rtol)
    H, flat = flat_matvec(matvec, like), tree.flatten(like)
    q = host.normal(len(flat), flat.dtype, flat.device, generator)
    q, before, beta = q / q.norm(), torch.zeros_like(q), flat.new_zeros(())
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    theta = flat.new_zeros(())
    for _ in range(min(steps, len(flat))):
        r = H(q) - beta * before
        alphas.append(q @ r)
        r -= alphas[-1] * q
        beta = r.norm()
        T = torch.diag(torch.stack(alphas))
        if betas:
            off = torch.diag(torch.stack(betas), 1)
            T = T + off + off.mT
        thetas, vectors = torch.linalg.eigh(T)
        theta, residual = thetas[-1], beta * vectors[-1, -1].abs()
        if _is_small(beta, torch.stack(alphas).unsqueeze(0)) or host.any_true(residual <= rtol * theta.abs()):
            break
        betas.append(beta)
        q, before = r / beta, q
    return theta


def batch_noise(
    matvec: BatchMatvec,
    batches: Iterable[Batch],
    like: Params,
    *,
    batch_size: int,
    generator: torch.Generator,
    probes: int = 2,
) -> Tensor:
    """`tr E[H_i^2] / tr H`, how noisy one example's curvature is: what `trace` is to LiSSA's batches, measured.

    A batch of B independent examples has `E |H_b z|^2 = |H z|^2 + (E |H_i z|^2 - |H z|^2) / B`, which is solved for
    `E |H_i z|^2`, and `E z.H z = tr H` over random signs z. Where every example has curvature of rank one and of the
    same size, `H_i = g_i g_i^T`, it is the trace; where a few examples hold most of the curvature, it is many times
    that, and LiSSA on small batches needs a larger scale.

    Args:
        matvec: `matvec(batch, v) -> H_batch v`.
        batches: At least two batches of equal size, of different examples.
        like: Parameters that give keys, shapes and dtype.
        batch_size: Examples a batch, B.
        generator: Where the probes come from.
        probes: Random vectors; each costs one product a batch.

    Returns:
        The noise, in the units of `H`, shape `()`; 0 where the matrix is 0. An estimate from that many batches.

    Raises:
        ValueError: If there are fewer than two batches, or an argument breaks its rule.

    Example:
        >>> g = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
        >>> g = g / g.norm(dim=1, keepdim=True)  # every example has trace 1
        >>> def matvec(batch, v):
        ...     return {"x": batch.T @ (batch @ v["x"]) / len(batch)}
        >>> noise = batch_noise(
        ...     matvec, g.split(1), {"x": torch.zeros(3)}, batch_size=1, generator=torch.Generator().manual_seed(0)
        ... )
        >>> bool((noise - 1).abs() < 0.5)
        True
    """
    call = "batch_noise"
    checks.params(call, like, "like")
    checks.count(call, "batch_size", batch_size)
    checks.generator(call, generator)
    checks.count(call, "probes", probes)
    batches, flat = list(batches), tree.flatten(like)
    if len(batches) < 2:
        raise ValueError(f"`{call}(batches=...)` must hold at least 2 batches, got {len(batches)}.")

    def probe() -> tuple[Tensor, Tensor]:
        z = host.signs(len(flat), flat.dtype, flat.device, generator)
        mean, square = torch.zeros_like(flat), flat.new_zeros(())
        for batch in batches:
            product = flat_matvec(lambda v, batch=batch: matvec(batch, v), like)(z)
            mean, square = mean + product / len(batches), square + product @ product / len(batches)
        spread = (square - mean @ mean).clamp_min(0) * len(batches) / (len(batches) - 1)
        return batch_size * spread + mean @ mean, z @ mean

    squares, traces = (torch.stack(t).mean() for t in zip(*(probe() for _ in range(probes)), strict=True))
    return torch.where(squares > 0, squares / traces.abs(), squares)


def flat_matvec(matvec: Matvec, like: Params) -> Callable[[Tensor], Tensor]:
    """`matvec` between flat vectors of shape `(P,)`, without the graph that parameters that require grad would add."""

    def product(flat: Tensor) -> Tensor:
        v = tree.map(lambda t, like: t.to(like.dtype), tree.unflatten(flat, like), like)
        return tree.flatten(matvec(v), like).detach().to(flat.dtype)

    return product


def _lanczos(
    H: Callable[[Tensor], Tensor], like: Tensor, steps: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal rows `Q` of the Krylov space of a random start, the rows `H Q`, and the length of what is left.

    Each new vector is made orthogonal to all before it, twice: once is not enough in floating point (Parlett).
    """
    q = host.normal(len(like), like.dtype, like.device, generator)
    q = q / q.norm()
    Q, H_Q = q[None], H(q)[None]
    while True:
        r = H_Q[-1]
        for _ in range(2):
            r = r - Q.mT @ (Q @ r)
        beta = r.norm()
        if len(Q) == steps or _is_small(beta, H_Q):
            return Q, H_Q, beta
        q = r / beta
        Q, H_Q = torch.cat([Q, q[None]]), torch.cat([H_Q, H(q)[None]])


def _is_small(beta: Tensor, H_Q: Tensor) -> bool:
    """Whether only rounding is left: the Krylov space of a random start then holds every distinct eigenvalue."""
    size = H_Q.norm(dim=1).amax()
    return not host.any_true(beta > 10 * torch.finfo(H_Q.dtype).eps * size)


def _slack(P: int, steps: int, risk: float) -> float:
    """How far the Ritz values may lie inside the spectrum, as a fraction of their own spread.

    The theorem bounds the distance by `e` of the true spread; as both ends may fall short by that, the true spread is
    at most `1 / (1 - 2e)` of the Ritz values'.
    """
    if steps >= P:
        return 0.0
    e = (math.log(1.648 * P**0.5 / risk) / (2 * steps - 1)) ** 2
    return e / (1 - 2 * e) if e < 0.5 else math.inf
