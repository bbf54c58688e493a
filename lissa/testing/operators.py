"""Small operators with known spectra for the laws of solvers, and data for those that sample.

Plain torch: an operator is rebuilt from the call that its `repr` prints. Knows nothing of Hypothesis or of laws.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lissa import tree
from lissa.types import BatchMatvec, Matvec, Params


class Operator(NamedTuple):
    """A symmetric matrix `A = Q diag(eigenvalues) Q^T` as a matvec on parameter dicts. `repr` is code.

    Attributes:
        matrix: A, shape `(P, P)`, symmetric to the bit.
        eigenvalues: In the order given.
        damping: What to solve with.
        u: A right-hand side.
        v: Another.
        rtol: The relative residual that the solver promises.
        damping_scale: The damping that a solver is held to is `damping_scale * damping`: 1, or AllenNLP's scale.
        recipe: The arguments of `make_operator`.
    """

    matrix: Tensor
    eigenvalues: tuple[float, ...]
    damping: float
    u: Params
    v: Params
    rtol: float
    damping_scale: float
    recipe: dict[str, Any]

    def __repr__(self) -> str:
        return f"make_operator({', '.join(f'{k}={v!r}' for k, v in self.recipe.items())})"

    @property
    def maker(self) -> "Callable[[], Operator]":
        """Builds it anew, tensors and all."""
        return partial(make_operator, **self.recipe)

    @property
    def matvec(self) -> Matvec:
        """`A v`, parameter dicts in and out."""
        return lambda v: tree.unflatten(self.matrix @ tree.flatten(v), v)

    @property
    def shift(self) -> float:
        """The damping in the units of A that the solution must have."""
        return self.damping * self.damping_scale

    @property
    def smallest(self) -> float:
        """The smallest `|eigenvalue + shift|`."""
        return min(abs(e + self.shift) for e in self.eigenvalues)

    @property
    def largest(self) -> float:
        """The largest `|eigenvalue + shift|`."""
        return max(abs(e + self.shift) for e in self.eigenvalues)

    def solution(self, v: Params) -> Params:
        """`(A + shift I)^-1 v` by a dense solve in float64."""
        return tree.unflatten(_solve(self.matrix, self.shift, tree.flatten(v)), tree.map(lambda t: t.double(), v))


def make_operator(
    *,
    eigenvalues: Sequence[float] = (1.0,),
    tensors: int = 1,
    damping: float = 0.0,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    rtol: float | None = None,
    damping_scale: float = 1.0,
) -> Operator:
    """The operator with these eigenvalues, in a basis drawn from `seed`.

    Args:
        eigenvalues: P of them.
        tensors: Into how many tensors a vector is cut, at most P. A tensor of one entry is a scalar.
        damping: In the units of the eigenvalues.
        dtype: Of the matrix and the vectors.
        seed: Where basis and vectors come from.
        rtol: The relative residual that the solver promises. Default: half the digits of `dtype`, `sqrt(eps)`.
        damping_scale: What the solver under test multiplies damping with.

    Returns:
        The operator.

    Example:
        >>> operator = make_operator(eigenvalues=[1.0, 3.0], damping=1.0, tensors=2)
        >>> x = operator.solution(operator.v)
        >>> residual = tree.sub(tree.add_scaled(operator.matvec(x), 1.0, x), operator.v)
        >>> bool(tree.norm(residual) < 1e-12)
        True
    """
    recipe = {k: v for k, v in locals().items() if k == "seed" or v != _OPERATOR_DEFAULTS.get(k)}
    g = torch.Generator().manual_seed(seed)
    P = len(eigenvalues)
    Q = torch.linalg.qr(torch.randn(P, P, generator=g, dtype=torch.float64)).Q
    matrix = (Q * torch.tensor(eigenvalues, dtype=torch.float64)) @ Q.mT
    matrix = ((matrix + matrix.mT) / 2).to(dtype)
    u, v = (_vector(g, P, min(tensors, P), dtype) for _ in range(2))
    promised = torch.finfo(dtype).eps ** 0.5 if rtol is None else rtol
    return Operator(matrix, tuple(eigenvalues), damping, u, v, promised, damping_scale, recipe)


_OPERATOR_DEFAULTS = make_operator.__kwdefaults__ or {}


class Samples(NamedTuple):
    """Data for a solver that draws batches: the curvature of a batch is `mean_i x_i x_i^T` over its rows.

    Attributes:
        data: The rows `x_i`, shape `(n, P)`, with `n = batches * batch_size`.
        batch_size: What the solver is asked for.
        repeats: What the solver is asked for.
        damping: In the units of the curvature.
        v: Right-hand side.
        rtol: Relative error allowed, sampling noise included.
        exact_rtol: Relative error allowed where all rows are equal, and there is no sampling noise.
        recipe: The arguments of `make_samples`.
    """

    data: Tensor
    batch_size: int
    repeats: int
    damping: float
    v: Params
    rtol: float
    exact_rtol: float
    recipe: dict[str, Any]

    def __repr__(self) -> str:
        return f"make_samples({', '.join(f'{k}={v!r}' for k, v in self.recipe.items())})"

    @property
    def maker(self) -> "Callable[[], Samples]":
        """Builds it anew, tensors and all."""
        return partial(make_samples, **self.recipe)

    @property
    def matvec(self) -> BatchMatvec:
        """`mean_i x_i x_i^T v` over the rows of a batch; v is one tensor."""

        def matvec(rows: Tensor, v: Params) -> Params:
            return tree.map(lambda v: (rows.mT @ (rows @ v.reshape(-1)) / len(rows)).reshape(v.shape), v)

        return matvec

    def curvature(self, rows: Tensor) -> Tensor:
        """The matrix of a batch."""
        return rows.mT @ rows / len(rows)

    def solution(self, rows: Tensor | None = None) -> Tensor:
        """`(C + damping I)^-1 v` for the curvature of the rows, all by default, flat."""
        return _solve(self.curvature(self.data if rows is None else rows), self.damping, tree.flatten(self.v))


def make_samples(
    *,
    dimension: int = 1,
    batches: int = 1,
    batch_size: int = 1,
    repeats: int = 1,
    equal: bool = False,
    damping: float = 0.25,
    seed: int = 0,
    rtol: float = 0.8,
    exact_rtol: float = 0.05,
) -> Samples:
    """Data drawn from `seed`: entries are -2, 0 or 2, so that batches differ much, float64.

    Args:
        dimension: P.
        batches: How many batches one pass holds.
        batch_size: Rows of a batch.
        repeats: How many runs the solver is asked to average.
        equal: Whether all rows are the same, so that every batch has the same curvature.
        damping: In the units of the curvature.
        seed: Where the rows come from.
        rtol: Relative error allowed, sampling noise included.
        exact_rtol: Relative error allowed where rows are equal.

    Returns:
        The data.

    Example:
        >>> samples = make_samples(dimension=2, batches=3, batch_size=2)
        >>> samples.data.shape, samples.solution().shape
        (torch.Size([6, 2]), torch.Size([2]))
    """
    recipe = {k: v for k, v in locals().items() if k == "seed" or v != _SAMPLES_DEFAULTS.get(k)}
    g = torch.Generator().manual_seed(seed)
    n = batches * batch_size
    data = torch.randint(-1, 2, (1 if equal else n, dimension), generator=g).double() * 2
    v = _vector(g, dimension, 1, torch.float64)
    return Samples(data.expand(n, -1).clone(), batch_size, repeats, damping, v, rtol, exact_rtol, recipe)


_SAMPLES_DEFAULTS = make_samples.__kwdefaults__ or {}


def _vector(g: torch.Generator, P: int, tensors: int, dtype: torch.dtype) -> Params:
    """Multiples of 1/16 up to 1 in size, the first entry 1 so that it is not zero, cut into tensors."""
    flat = torch.randint(-16, 17, (P,), generator=g).to(dtype) / 16
    flat[0] = 1.0
    parts = flat.tensor_split(tensors)
    return {f"p{i}": part.clone().reshape(()) if len(part) == 1 else part.clone() for i, part in enumerate(parts)}


def _solve(matrix: Tensor, shift: float, v: Tensor) -> Tensor:
    return torch.linalg.solve(matrix.double() + shift * torch.eye(len(v), dtype=torch.float64), v.double())
