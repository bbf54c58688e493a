"""How to set damping, scale, batch size, steps and method, from the spectrum alone; and the one call that does it all.

Settings are plain numbers: print them, freeze them, cite them. Knows spectra and costs; knows nothing of losses.
"""

import math
from typing import NamedTuple

from lissa import checks
from lissa.recursion import SETTLED_STEPS
from lissa.spectrum import Spectrum

BURN_IN = 8.0
"""Steps in units of `scale / damping`. The mean over the second half of them has lost all but
`(2 / c) e^(-c / 2) = 0.5 %` of the slowest mode's residual, at c = 8."""

EPOCH_GAIN = 0.15
"""What a variance-reduced epoch of `BURN_IN` leaves of the residual: 0.06 to 0.12 measured on MNIST softmax regression;
at most sqrt(1 / BURN_IN) = 0.35 where no example's curvature has more than the mean trace."""

FULL_BATCH_SCALE = 0.75
"""Of `lambda_max + damping`: full batches are stable above a half, and the largest eigenvalue is only estimated."""

MEAN_FRACTION = 0.1
"""The damping that is suggested, of the mean eigenvalue."""

METHODS = ("plain", "averaged", "variance-reduced", "cg", "block-cg")


class Settings(NamedTuple):
    """What a solve was set to, as plain numbers in the units of `H`, to be frozen and cited.

    Attributes:
        method: `"plain"`: full batches, last iterate; `"averaged"`: small batches, mean of the tail;
            `"variance-reduced"`: epochs of that on the residual, `solve_svrg`; `"cg"`: conjugate gradients;
            `"block-cg"`: those of several right-hand sides in one Krylov space, `solve_block_cg`.
        damping: The system is `(H + damping I) x = v`.
        rtol: The relative residual aimed at.
        scale: The step size is `1 / scale`.
        batch_size: Examples a step.
        steps: LiSSA steps; an epoch's, if variance-reduced; the most products, if CG.
        average_after: The mean is over the iterates after this step; `steps` if plain or CG.
        epochs: The most epochs, if variance-reduced; else 1.
        repeats: Independent runs for an error bar.
        passes: Predicted cost for each right-hand side: products with one example's curvature, divided by `n`.
    """

    method: str
    damping: float
    rtol: float
    scale: float
    batch_size: int
    steps: int
    average_after: int
    epochs: int
    repeats: int
    passes: float


def suggest_damping(spectrum: Spectrum, *, fraction: float = MEAN_FRACTION) -> float:
    """`damping = fraction * trace / P`, and never less than what makes `H + damping I` positive definite.

    A tenth of the mean eigenvalue is the literature's habit (Grosse et al. 2023, section 3.1, after Martens & Grosse
    2015): directions that the data say nothing of are then cut off, those that matter are kept. It is a choice of
    model, not of solver: another damping is another answer.

    Args:
        spectrum: From `estimate_spectrum`.
        fraction: Of the mean eigenvalue, taken in size.

    Returns:
        The damping, in the units of `H`.

    Raises:
        ValueError: If the mean eigenvalue is 0 and so is the least damping: there is no scale to take a fraction of.

    Example:
        >>> import torch
        >>> from lissa.spectrum import estimate_spectrum
        >>> def matvec(v):
        ...     return {"x": torch.tensor([1.0, 2.0, 6.0]) * v["x"]}
        >>> spectrum = estimate_spectrum(matvec, {"x": torch.zeros(3)}, generator=torch.Generator().manual_seed(0))
        >>> round(suggest_damping(spectrum), 4)
        0.3

    Source: R. Grosse et al., Studying large language model generalization with influence functions, arXiv 2308.03296.
    """
    checks.positive("suggest_damping", "fraction", fraction)
    mean = abs(float(spectrum.trace)) / spectrum.dimension
    damping = fraction * mean + least_damping(spectrum)
    if not 0 < damping < math.inf:
        raise ValueError(
            f"`suggest_damping(spectrum=...)` must have a trace to take a fraction of, got {spectrum}. "
            "Give the damping yourself, or estimate with more `steps`."
        )
    return damping


def least_damping(spectrum: Spectrum, *, rounding: float = 1e-4) -> float:
    """`max(0, -lambda_min)`: above this damping `H + damping I` is positive definite.

    It is 0 if the smallest eigenvalue found is zero to within `rounding` of the largest; else it is taken from the
    lower bound, `smallest_bound`, where that is finite. If it is more than a few percent of the largest eigenvalue, a
    damping above it changes the answer much: the Gauss-Newton product (`ggnvp`), which needs none, is the better way.

    Args:
        spectrum: From `estimate_spectrum`; enough `steps` make its bound sharp.
        rounding: Of the largest eigenvalue.

    Returns:
        The least damping, in the units of `H`.
    """
    smallest, bound = float(spectrum.smallest), float(spectrum.smallest_bound)
    if smallest >= -rounding * abs(float(spectrum.largest)):
        return 0.0
    return -bound if math.isfinite(bound) else -2 * smallest


def tune_lissa(
    spectrum: Spectrum,
    *,
    damping: float,
    n: int,
    rtol: float = 1e-2,
    batch_size: int | None = None,
    repeats: int = 1,
    method: str = "auto",
    noise: float | None = None,
    vectors: int = 1,
    overhead: float = 0.0,
) -> Settings:
    """`scale = lambda_max + damping + noise / B` and `steps = 8 scale / damping`, and the cheapest method.

    The reasoning, with `m = damping` (plus lambda_min, if it is > 0) the slowest mode:

    - Stability in mean square: `scale > (lambda_max + damping + noise / B) / 2`, where `noise` is the trace if all
      examples have about the same curvature, and more if a few hold most of it, see `batch_noise`. Twice that bound
      makes every mode shrink without changing sign, and keeps clear of the noise that grows without limit at it.
    - Batch size: a step costs B and the number of steps is in proportion to the scale, so the cost is in proportion to
      `B (lambda_max + damping) + noise`: flat up to `B = noise / lambda_max`, the critical batch size, which is taken.
    - Where a step costs as much as B + `overhead` examples (for the arithmetic on vectors, and what the machine does
      before it multiplies), the cheapest batch size is the geometric mean of the overhead and the critical one.
    - Steps: the slowest mode shrinks by `1 - m / scale` a step. Stopping after T steps acts like an extra damping of
      about `scale / T`. After `8 scale / m` steps, and averaging over the second half, 0.5% of it is left.
    - Noise: the mean of w iterates has a residual of at most about `sqrt(noise / (m B w))` of `|v|`, where the last one
      has that of w = scale / m. Repeats and longer tails lower it like a square root. If that is not enough for
      `rtol`, variance reduction: epochs of the same number of steps, each leaves about 0.15 of the residual, and one
      product on all the data.
    - Full batches have no noise: `scale = 3/4 (lambda_max + damping)` and `ln(1 / rtol) scale / m` steps.
    - CG takes about `sqrt(kappa) / 2 ln(2 / rtol)` passes, with `kappa = (lambda_max + damping) / m`.
    - K right-hand sides in one Krylov space are rid of the K - 1 largest eigenvalues: `lambda_max` in `kappa` becomes
      `lambda_K <= trace / K`. A Nystroem preconditioner of rank r does that with `trace / r`, for r products besides,
      r / K for each right-hand side. It is not among the methods, as the gradients themselves are the better sketch and
      cost nothing: on MNIST softmax regression at K = 10 and 100 block CG takes 12 and 5 products a right-hand side,
      CG with the best rank 15 and 8, alone 27.

    Args:
        spectrum: From `estimate_spectrum`, of all the data or a sample.
        damping: In the units of `H`.
        n: Number of examples.
        rtol: The relative residual to reach.
        batch_size: Examples a step; the default is the critical batch size.
        repeats: Independent runs, for an error bar; full batches and CG draw nothing and need but one.
        method: One of `METHODS`, or `"auto"`: the one of least predicted cost; `"lissa"`: the same without both CGs.
        noise: From `batch_noise`; the default, and the least that is taken, is the trace.
        vectors: Right-hand sides that are solved together, K.
        overhead: What a step costs besides its products, in examples' worth of those. It counts in `passes`.

    Returns:
        The `Settings`, with the predicted cost.

    Raises:
        ValueError: If an argument breaks its rule, or `H + damping I` is not positive definite: the message gives the
            least damping that makes it so.

    Example:
        >>> import torch
        >>> from lissa.spectrum import estimate_spectrum
        >>> def matvec(v):
        ...     return {"x": torch.tensor([0.0, 0.0, 1.0, 2.0, 7.0]) * v["x"]}
        >>> spectrum = estimate_spectrum(matvec, {"x": torch.zeros(5)}, generator=torch.Generator().manual_seed(0))
        >>> settings = tune_lissa(spectrum, damping=0.1, n=100_000)
        >>> settings.method, settings.batch_size, round(settings.scale, 3), settings.steps
        ('variance-reduced', 2, 12.1, 968)
    """
    call = "tune_lissa"
    checks.non_negative(call, "damping", damping)
    checks.count(call, "n", n)
    checks.positive(call, "rtol", rtol)
    checks.count(call, "repeats", repeats)
    checks.count(call, "vectors", vectors)
    checks.one_of(call, "method", method, ("auto", "lissa", *METHODS))
    if batch_size is not None:
        checks.count(call, "batch_size", batch_size)
    if noise is not None:
        checks.non_negative(call, "noise", noise)
    checks.non_negative(call, "overhead", overhead)
    largest, trace = float(spectrum.largest), max(float(spectrum.trace), float(spectrum.largest))
    noise = max(trace, noise or 0.0)
    slowest = damping + _curvature_floor(spectrum)
    _check_definite(spectrum, damping, slowest)

    def settings(method: str, scale: float, B: int, steps: float, tail: float, epochs: int, passes: float) -> Settings:
        T = math.ceil(steps)
        after = T - math.floor(T * tail)
        runs = repeats if method in ("averaged", "variance-reduced") else 1
        return Settings(method, damping, rtol, scale, B, T, after, epochs, runs, runs * passes)

    critical = noise / largest if largest > 0 else n
    B = min(n, batch_size or math.ceil(max(critical, math.sqrt(overhead * critical))))
    step = (B + overhead) / n
    scale = largest + damping + noise / B
    steps = BURN_IN * scale / slowest
    noise_at_one_step = math.sqrt(noise / (slowest * B))
    longer = max(1.0, 2 / steps * (2 * noise_at_one_step / rtol) ** 2)
    epochs = math.ceil(math.log(rtol) / math.log(EPOCH_GAIN)) if rtol < 1 else 1
    full_scale = FULL_BATCH_SCALE * (largest + damping)
    full_steps = max(1.0, math.log(1 / rtol)) * full_scale / slowest

    def cg(method: str, K: int) -> Settings:
        kappa = max(1.0, (min(largest, trace / K) + damping) / slowest)
        steps = math.sqrt(kappa) / 2 * math.log(2 / rtol) + 1
        return settings(method, full_scale, n, 10 * steps + 10, 0, 1, min(steps, math.ceil(spectrum.dimension / K)) + 1)

    options = (
        settings("plain", full_scale, n, 1.2 * full_steps + SETTLED_STEPS, 0, 1, full_steps + 1),
        settings("averaged", scale, B, longer * steps, 0.5, 1, longer * steps * step + 1),
        settings("variance-reduced", scale, B, steps, 0.5, 4 * epochs, epochs * (steps * step + 1)),
        cg("cg", 1),
        cg("block-cg", vectors),
    )
    lissa = METHODS[:3]
    wanted = {"auto": (*lissa, "cg" if vectors == 1 else "block-cg"), "lissa": lissa}.get(method, (method,))
    return min((option for option in options if option.method in wanted), key=lambda option: option.passes)


def _curvature_floor(spectrum: Spectrum) -> float:
    """The smallest eigenvalue as far as it is known: its lower bound, but 0 where only rounding makes it negative."""
    if least_damping(spectrum) == 0:
        return max(0.0, float(spectrum.smallest_bound))
    return float(spectrum.smallest)


def _check_definite(spectrum: Spectrum, damping: float, slowest: float) -> None:
    if slowest > 0:
        return
    least = least_damping(spectrum)
    raise ValueError(
        f"`tune_lissa(damping={damping:g})` must make H + damping I positive definite: the smallest eigenvalue found "
        f"is {float(spectrum.smallest):.3g}. Use damping > {least:.3g}, or the Gauss-Newton product (ggnvp), which has "
        "no negative eigenvalue, or solve_minres, which bears them."
    )
