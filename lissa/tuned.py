"""One call: estimate the spectrum, choose the method, solve, check on all the data, and mend what did not suffice.

Knows stacked data, the streams and the solvers; knows nothing of losses: curvature comes in as `matvec(batch, v)`.
"""

import math
from typing import Any

import torch

from lissa import checks, host, operators, outcome, sampling, spectrum, tree
from lissa.block_cg import solve_block_cg
from lissa.recursion import solve_lissa
from lissa.solvers import solve_cg
from lissa.svrg import solve_svrg
from lissa.tuning import Settings, tune_lissa
from lissa.types import BatchMatvec, Matvec, Params, Solution, Status

SAMPLE = 512
"""Examples on which the spectrum is estimated: at 18 products, a sixth of a pass over 55,000 examples."""

LANCZOS_STEPS, PROBES = 10, 8
"""Enough for a step size: settings bear errors of some ten percent in the largest eigenvalue and the trace."""

NOISE_BATCHES = 32
"""Batches that the sample is cut into to see how much they differ."""

CHUNK = 1024
"""Examples a product on all the data takes at a time; the last chunk may be shorter and weighs less."""

STACKED_CHUNK = 512
"""The same for K right-hand sides at once: what 100 of them make of larger chunks is no longer kept by the allocator,
and fetching it anew takes as long as a quarter of the arithmetic."""

RESCUES = 4
"""How often a solve that fell short goes on with twice the scale: an example may have 16 times the mean curvature."""


def choose_settings(
    matvec: BatchMatvec,
    like: Params,
    data: Any,
    *,
    damping: float,
    generator: torch.Generator,
    rtol: float = 1e-2,
    batch_size: int | None = None,
    method: str = "auto",
    repeats: int = 1,
    sample: int = SAMPLE,
    vectors: int = 1,
) -> Settings:
    """`tune_lissa` of the spectrum and the noise on `sample` examples: the settings of `solve_tuned`, as data.

    Args:
        matvec: `matvec(batch, v) -> H_batch v`, for instance `partial(hvp, loss_fn, params)`.
        like: Parameters that give keys, shapes and dtype.
        data: As in `solve_tuned`.
        damping: In the units of `H`.
        generator: Where the sample and the probes come from.
        rtol: The relative residual to reach.
        batch_size: Examples a step; the default is the critical batch size.
        method: As in `tune_lissa`.
        repeats: Independent solves, for the standard error of scores.
        sample: Examples the spectrum is estimated on; all, if there are fewer. The cost is 20 products on them.
        vectors: Right-hand sides that are solved together, K.

    Returns:
        The `Settings`.

    Raises:
        ValueError: As `estimate_spectrum` and `tune_lissa` do.
    """
    checks.count("choose_settings", "sample", sample)
    n = sampling.batch_length("choose_settings", data, "data")
    chosen = host.randperm(n, generator)[:sample]
    rows = sampling.take(data, chosen)
    found = spectrum.estimate_spectrum(
        lambda v: matvec(rows, v), like, generator=generator, steps=LANCZOS_STEPS, probes=PROBES
    )
    size = math.ceil(len(chosen) / NOISE_BATCHES)
    noise = None
    if len(chosen) >= 2 * size and method not in ("cg", "block-cg"):
        batches = [sampling.take(data, index) for index in chosen.split(size) if len(index) == size]
        noise = host.number(spectrum.batch_noise(matvec, batches, like, batch_size=size, generator=generator))
    return tune_lissa(
        found, damping=damping, n=n, rtol=rtol, batch_size=batch_size, repeats=repeats, method=method, noise=noise,
        vectors=vectors,
    )  # fmt: skip


def solve_tuned(
    matvec: BatchMatvec,
    v: Params,
    data: Any,
    *,
    damping: float,
    generator: torch.Generator,
    rtol: float = 1e-2,
    settings: Settings | None = None,
    full_matvec: Matvec | None = None,
    throw: bool = True,
) -> Solution:
    """`x ~ (H + damping I)^-1 v` to a relative residual of `rtol` on all the data, with nothing set but the damping.

    Chooses among LiSSA on full batches, LiSSA with averaging, variance-reduced LiSSA and CG by predicted cost. Where
    small batches were chosen and fall short or diverge, it goes on with twice the scale, up to `RESCUES` times. For
    several right-hand sides use `solve_tuned_stacked`; to freeze the numbers in a paper, call `choose_settings` once
    and pass `settings`.

    Args:
        matvec: `matvec(batch, v) -> H_batch v`, for instance `partial(hvp, loss_fn, params)`.
        v: The right-hand side.
        data: A tensor, or tuples, lists and dicts of tensors, that share their first dimension: one row an example.
            For data of another kind pass `torch.arange(n)`; the batches that `matvec` gets are then indices.
        damping: In the units of `H`.
        generator: Where samples, probes and batches come from.
        rtol: The relative residual to reach.
        settings: From `choose_settings` or `tune_lissa`; they hold their own damping and rtol, which must agree.
        full_matvec: `full_matvec(v) -> H v` on all the data; the default goes through `data` in chunks.
        throw: Whether a failure raises `SolverError`. If False, it is data: `status` names it, `value` is all NaN.

    Returns:
        The `Solution`, its residual on all the data. `steps` are those of the method chosen. With `settings.repeats`
        of two or more, `value` is the mean of so many independent solves, each to `rtol`, and `samples` holds them.

    Raises:
        ValueError: If `H + damping I` is not positive definite (the message gives the least damping), or an argument
            breaks its rule.
        SolverError: If the solve failed and `throw` is True.

    Example:
        >>> x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
        >>> def matvec(batch, v):
        ...     return {"w": batch.T @ (batch @ v["w"]) / len(batch)}
        >>> v = {"w": torch.ones(3)}
        >>> solution = solve_tuned(matvec, v, x, damping=0.1, generator=torch.Generator().manual_seed(0))
        >>> Status(int(solution.status)).name, bool(solution.relative_residual <= 1e-2)
        ('CONVERGED', True)
    """
    call = "solve_tuned"
    checks.params(call, v, "v")
    checks.non_negative(call, "damping", damping)
    checks.positive(call, "rtol", rtol)
    checks.generator(call, generator)
    n = sampling.batch_length(call, data, "data")
    if settings is None:
        settings = choose_settings(matvec, v, data, damping=damping, rtol=rtol, generator=generator)
    _check_agreement(call, settings, damping, rtol)
    full = full_matvec or _full_matvec(matvec, data, n)
    if settings.repeats > 1:
        runs = [
            solve_tuned(
                matvec, v, data, damping=damping, generator=generator, rtol=rtol,
                settings=settings._replace(repeats=1), full_matvec=full, throw=throw,
            )
            for _ in range(settings.repeats)
        ]  # fmt: skip
        return _mean(runs, v, full, damping)
    if settings.method in ("cg", "block-cg"):  # of one right-hand side they are the same
        return solve_cg(full, v, damping=damping, rtol=rtol, steps=settings.steps, throw=throw)
    if settings.method == "plain":
        return solve_lissa(
            lambda _, v: full(v), v, [None] * settings.steps, damping=damping, scale=settings.scale, rtol=rtol,
            throw=throw,
        )  # fmt: skip

    batches = sampling.batch_stream(data, settings.batch_size, generator=generator, drop_last=settings.batch_size <= n)
    epochs, scale, steps = settings.epochs, settings.scale, settings.steps
    solution = _epochs(matvec, v, batches, full, settings, epochs, scale, steps)
    for _ in range(RESCUES):
        if not host.any_true(_unfinished(solution)):
            break
        epochs, scale, steps = max(epochs, 4), 2 * scale, 2 * steps
        solution = _epochs(matvec, v, batches, full, settings, epochs, scale, steps, solution)
    if throw:
        outcome.raise_on_failure(f"{call}(damping={damping:g}, scale={scale:g})", solution)
    return solution


def solve_tuned_stacked(
    matvec: BatchMatvec,
    v: Params,
    data: Any,
    *,
    damping: float,
    generator: torch.Generator,
    rtol: float = 1e-2,
    settings: Settings | None = None,
    full_matvec: Matvec | None = None,
    throw: bool = True,
) -> Solution:
    """`x_k ~ (H + damping I)^-1 v_k` for k = 1..K, as `solve_tuned`, by what is cheapest for all of them together.

    For many right-hand sides that is mostly `solve_block_cg`, for which they share all products; else `solve_tuned` of
    each, with shared batches.

    Args:
        matvec: `matvec(batch, v) -> H_batch v`, of one vector. Wrapped in `traced` it is faster.
        v: K right-hand sides, stacked: each tensor with one more dimension in front.
        data: As in `solve_tuned`.
        damping: In the units of `H`.
        generator: Where samples, probes and batches come from.
        rtol: The relative residual to reach.
        settings: From `choose_settings(..., vectors=K)`.
        full_matvec: `full_matvec(v) -> H v` on all the data, of one vector.
        throw: Whether a failure raises `SolverError`. If False, it is data: `status` names it, `value` is all NaN.

    Returns:
        The `Solution` of each right-hand side, stacked.

    Raises:
        ValueError: As `solve_tuned`.
        SolverError: If a solve failed and `throw` is True.

    Example:
        >>> x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
        >>> def matvec(batch, v):
        ...     return {"w": batch.T @ (batch @ v["w"]) / len(batch)}
        >>> v = {"w": torch.eye(3)}
        >>> solution = solve_tuned_stacked(matvec, v, x, damping=0.1, generator=torch.Generator().manual_seed(0))
        >>> bool((solution.relative_residual <= 1e-2).all())
        True
    """
    call = "solve_tuned_stacked"
    checks.stacked(call, v, "v")
    K, like = len(next(iter(v.values()))), tree.map(lambda t: t[0], v)
    n = sampling.batch_length(call, data, "data")
    if settings is None:
        settings = choose_settings(matvec, like, data, damping=damping, rtol=rtol, generator=generator, vectors=K)
    full = full_matvec or _full_matvec(matvec, data, n, STACKED_CHUNK)
    if settings.method == "block-cg":
        _check_agreement(call, settings, damping, rtol)
        return solve_block_cg(torch.vmap(full), v, damping=damping, rtol=rtol, steps=settings.steps, throw=throw)

    def solve(v: Params) -> Solution:
        return solve_tuned(
            matvec, v, data, damping=damping, generator=generator, rtol=rtol, settings=settings, full_matvec=full,
            throw=throw,
        )  # fmt: skip

    return torch.vmap(solve)(v)


def _check_agreement(call: str, settings: Settings, damping: float, rtol: float) -> None:
    if (settings.damping, settings.rtol) != (damping, rtol):
        raise ValueError(
            f"`{call}(settings=...)` are for damping={settings.damping:g}, rtol={settings.rtol:g}, "
            f"got damping={damping:g}, rtol={rtol:g}."
        )


def _mean(runs: list[Solution], v: Params, full: Matvec, damping: float) -> Solution:
    """The mean of independent solves of the same system, which must all have succeeded."""
    samples = tree.map(lambda *t: torch.stack(t), *(run.value for run in runs))
    value = tree.map(lambda t: t.mean(0), samples)
    return outcome.solution(
        value,
        status=outcome.worst(torch.stack([run.status for run in runs])),
        residual_norm=tree.norm(tree.sub(v, operators.damped(full, damping)(value))),
        length=tree.norm(v),
        steps=torch.stack([run.steps for run in runs]).sum(0),
        trace=list(torch.cat([run.residual_trace for run in runs])),
        samples=samples,
        random=True,
    )


def _epochs(
    matvec: BatchMatvec,
    v: Params,
    batches: Any,
    full: Matvec,
    settings: Settings,
    epochs: int,
    scale: float,
    steps: int,
    before: Solution | None = None,
) -> Solution:
    """Variance-reduced epochs from where `before` got to; one of them is averaged LiSSA. What is done is kept."""
    x = None
    if before is not None:
        usable = before.status < Status.DIVERGED
        x = tree.map(lambda t: torch.where(usable, t, torch.zeros_like(t)), before.value)
    solution = solve_svrg(
        matvec, v, batches, full_matvec=full, inner_steps=steps, damping=settings.damping, scale=scale,
        average_after=steps * settings.average_after // settings.steps, epochs=epochs, rtol=settings.rtol, x=x,
        throw=False,
    )  # fmt: skip
    if before is None:
        return solution
    return solution._replace(
        steps=before.steps + solution.steps,
        residual_trace=torch.cat([before.residual_trace, solution.residual_trace]),
    )


def _unfinished(solution: Solution) -> torch.Tensor:
    return (solution.status != Status.CONVERGED) & (solution.status != Status.NOT_FINITE)


def _full_matvec(matvec: BatchMatvec, data: Any, n: int, chunk: int = CHUNK) -> Matvec:
    chunks = [sampling.take(data, slice(start, start + chunk)) for start in range(0, n, chunk)]
    return operators.mean_matvec(matvec, chunks)
