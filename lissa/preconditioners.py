"""Plain callables `r -> M r` close to `(H + damping I)^-1`, for `solve_cg` and `solve_minres`.

Built from products and a `torch.Generator`. Knows nothing of the solvers that use them.
"""

import torch

from lissa import checks, host, tree
from lissa.spectrum import flat_matvec
from lissa.types import Matvec, Params


def diagonal_preconditioner(
    matvec: Matvec, like: Params, *, damping: float, generator: torch.Generator, probes: int = 16
) -> Matvec:
    """`M = diag(|D| + damping)^-1`, with `D = mean z * H z` over random signs `z`, an estimate of the diagonal of `H`.

    Each entry's standard error is the length of the rest of its row of `H` over `sqrt(probes)`: helpful where the
    diagonal dominates or its entries differ by orders of magnitude, and cheap.

    Args:
        matvec: `matvec(v) -> H v`.
        like: Parameters that give keys, shapes and dtype.
        damping: That of the solve, in the units of `H`; > 0.
        generator: Where the probes come from.
        probes: Number of products taken.

    Returns:
        `r -> M r`.

    Example:
        >>> def matvec(v):
        ...     return {"x": torch.tensor([1.0, 3.0]) * v["x"]}
        >>> v = {"x": torch.tensor([2.0, 8.0])}
        >>> diagonal_preconditioner(matvec, v, damping=1.0, generator=torch.Generator().manual_seed(0))(v)
        {'x': tensor([1., 2.])}

    Source: C. Bekas, E. Kokiopoulou and Y. Saad, An estimator for the diagonal of a matrix, Appl. Numer. Math. 57
    (2007), section 2.
    """
    call = "diagonal_preconditioner"
    _check(call, like, damping, generator)
    checks.count(call, "probes", probes)
    H, flat = flat_matvec(matvec, like), tree.flatten(like)
    total = torch.zeros_like(flat)
    for _ in range(probes):
        z = host.signs(len(flat), flat.dtype, flat.device, generator)
        total = total + z * H(z)
    M = tree.unflatten(1 / ((total / probes).abs() + damping), like)
    return lambda r: tree.map(torch.mul, M, r)


def nystroem_preconditioner(
    matvec: Matvec, like: Params, *, damping: float, generator: torch.Generator, rank: int = 32
) -> Matvec:
    """`M = (l + damping) U (L + damping)^-1 U^T + (I - U U^T)`, with `U L U^T` the randomised Nystroem part of `H`.

    `l` is the smallest kept eigenvalue. For positive semidefinite `H` whose eigenvalues fall off fast: solving then
    takes a number of steps that does not depend on those above `l`.

    Args:
        matvec: `matvec(v) -> H v`, positive semidefinite. It may be the product on a part of the data.
        like: Parameters that give keys, shapes and dtype.
        damping: That of the solve, in the units of `H`; > 0.
        generator: Where the sketch comes from.
        rank: Number of products taken and of vectors kept, at most P.

    Returns:
        `r -> M r`. It keeps `rank` vectors like `like`.

    Raises:
        ValueError: If the sketch shows that `H` is not positive semidefinite.

    Example:
        >>> def matvec(v):
        ...     return {"x": torch.tensor([1.0, 3.0]) * v["x"]}
        >>> v = {"x": torch.tensor([2.0, 8.0])}
        >>> M = nystroem_preconditioner(matvec, v, damping=1.0, generator=torch.Generator().manual_seed(0), rank=2)
        >>> (M(v)["x"] / (1.0 + 1.0)).round(decimals=4)  # a multiple of the solution, [1, 2]
        tensor([1., 2.])

    Source: Z. Frangella, J. Tropp and M. Udell, Randomized Nystroem preconditioning, SIAM J. Matrix Anal. Appl. 44
    (2023), algorithm 2.1 and eq. 1.3.
    """
    call = "nystroem_preconditioner"
    _check(call, like, damping, generator)
    checks.count(call, "rank", rank)
    H, flat = flat_matvec(matvec, like), tree.flatten(like)
    rank = min(rank, len(flat))
    draws = [host.normal(len(flat), flat.dtype, flat.device, generator) for _ in range(rank)]
    sketch = torch.linalg.qr(torch.stack(draws, 1))[0]
    Y = torch.stack([H(column) for column in sketch.mT], 1)
    shift = len(flat) ** 0.5 * torch.finfo(flat.dtype).eps * torch.linalg.matrix_norm(Y)
    Y = Y + shift * sketch  # keeps the Cholesky factor real where H is singular
    core = sketch.mT @ Y
    factor, info = torch.linalg.cholesky_ex((core + core.mT) / 2)
    if host.any_true(info != 0):
        raise ValueError(
            f"`{call}(matvec=...)` must be positive semidefinite, and a random sketch shows that it is not. "
            "Use the Gauss-Newton product (ggnvp) to build it, or diagonal_preconditioner."
        )
    B = torch.linalg.solve_triangular(factor, Y.mT, upper=False).mT
    U, singular = torch.linalg.svd(B, full_matrices=False)[:2]
    L = (singular.square() - shift).clamp(min=0)
    gain = (L[-1] + damping) / (L + damping) - 1

    def apply(r: Params) -> Params:
        flat = tree.flatten(r, like)
        return tree.unflatten(flat + U @ (gain * (U.mT @ flat)), like)

    return apply


def _check(call: str, like: Params, damping: float, generator: torch.Generator) -> None:
    checks.params(call, like, "like")
    checks.positive(call, "damping", damping)
    checks.generator(call, generator)
