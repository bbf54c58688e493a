"""What is known of a score beside its value: standard errors, intervals, bounds from residuals, and settled places.

Knows scores, residuals and repeats; knows nothing of losses or of how anything was solved.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lissa import checks

_NORMAL_95 = 1.959964

_STUDENT_95 = (12.7062, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.30600, 2.26216, 2.22814)
"""Two-sided 95% quantiles of Student's t with 1, 2, ..., 10 degrees of freedom."""


class ScoreInterval(NamedTuple):
    """Scores with the noise of the batches they were solved on, each of the shape of the scores.

    Attributes:
        score: The mean over repeats.
        standard_error: Of that mean.
        half_width: `[score - half_width, score + half_width]` is a 95% interval for the mean over infinitely many
            repeats. That mean is the exact score where the solves have converged.
    """

    score: Tensor
    standard_error: Tensor
    half_width: Tensor


def score_interval(samples: Tensor) -> ScoreInterval:
    """`mean_r s_r +- t_95(R - 1) sqrt(Var_r(s_r) / R)` over R independent repeats of the scores.

    Args:
        samples: Scores of R repeats, shape `(R, *scores)`, R >= 2: `influence_scores(..., solution.samples, batch)` of
            a solve with `repeats=R`.

    Returns:
        The `ScoreInterval`. It holds the noise of the batches, not the error of stopping early: see `score_bound`.

    Raises:
        ValueError: If there are fewer than two repeats.

    Example:
        >>> interval = score_interval(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
        >>> interval.score, interval.standard_error
        (tensor([2., 5.]), tensor([1., 0.]))

    Source: Student, The probable error of a mean, Biometrika 6 (1908).
    """
    R = samples.shape[0] if samples.ndim else 0
    if R < 2:
        raise ValueError(f"`score_interval(samples=...)` must hold at least 2 repeats in its first dimension, got {R}.")
    standard_error = samples.std(0) / R**0.5
    return ScoreInterval(samples.mean(0), standard_error, student_95(R - 1) * standard_error)


def student_95(degrees: int) -> float:
    """The two-sided 95% quantile of Student's t, to 1e-4: a table, then Fisher's expansion in `1 / degrees`."""
    checks.count("student_95", "degrees", degrees)
    if degrees <= len(_STUDENT_95):
        return _STUDENT_95[degrees - 1]
    z = _NORMAL_95
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3


def score_bound(gradient_norms: Tensor, residual_norm: Tensor, *, damping: float, smallest: float = 0.0) -> Tensor:
    """`|score_i - exact_i| = |g_i . A^-1 r| <= |g_i| |r| / (lambda_min + damping)`, with `A = H + damping I`.

    A bound, not an estimate: it holds for every example, whatever the solver did, if `residual_norm` is that on all
    the data and no eigenvalue of `H` is below `smallest`.

    Args:
        gradient_norms: `|g_i|`, shape `(*B)`.
        residual_norm: `Solution.residual_norm` on all the data, shape `()`, or `(K, 1)` for K solves.
        damping: That of the solve.
        smallest: A lower bound of the eigenvalues of `H`: 0 for a convex loss or a Gauss-Newton product, else
            `Spectrum.smallest_bound`.

    Returns:
        The bounds, in units of the scores.

    Raises:
        ValueError: If `smallest + damping` is not > 0: then no residual bounds a score.

    Example:
        >>> score_bound(torch.tensor([3.0, 1.0]), torch.tensor(0.02), damping=0.1)
        tensor([0.6000, 0.2000])
    """
    checks.finite("score_bound", "damping", damping)
    if not smallest + damping > 0:
        raise ValueError(
            "`score_bound(smallest=..., damping=...)` must have smallest + damping > 0, "
            f"got {smallest:g} + {damping:g}."
        )
    return gradient_norms * residual_norm / (smallest + damping)


def settled_places(scores: Tensor, errors: Tensor) -> Tensor:
    """Whether each place of the ranking is settled: the example's interval meets that of no other example.

    Args:
        scores: Scores, shape `(*K, n)`.
        errors: Half-widths or bounds of the same shape: the exact score lies in `scores +- errors`.

    Returns:
        Booleans of shape `(*K, n)` in order of rank, largest score first: `[..., j]` is True if all exact scores within
        their intervals put the same example at place j.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> settled_places(torch.tensor([1.0, 5.0, 1.2]), torch.tensor([0.2, 0.5, 0.1]))
        tensor([ True, False, False])
    """
    if scores.shape != errors.shape:
        raise ValueError(
            f"`settled_places(errors=...)` must have the shape of scores, {tuple(scores.shape)}, "
            f"got {tuple(errors.shape)}."
        )
    ranked, order = scores.sort(dim=-1, descending=True, stable=True)
    errors = errors.gather(-1, order)
    none = torch.full_like(ranked[..., :1], math.inf)
    # The lowest end of all intervals above, and the highest end of all below.
    above = torch.cat([none, (ranked - errors).cummin(-1).values[..., :-1]], -1)
    below = torch.cat([(ranked + errors).flip(-1).cummax(-1).values.flip(-1)[..., 1:], -none], -1)
    return (ranked + errors < above) & (ranked - errors > below)
