"""Hypothesis strategies: parameter dicts, vectors, problems, operators and data for sampling solvers.

They draw sizes, kinds and seeds, never floats, so that a failing case shrinks to the smallest sizes and the simplest
kinds, and its `repr` is code.
"""

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from lissa import tree
from lissa.testing.operators import Operator, Samples, make_operator, make_samples
from lissa.testing.problems import ACTIVATIONS, LOSSES, MODELS, Problem, make_problem
from lissa.types import Params

DTYPES = (torch.float64, torch.float32)
"""Strict first: the order in which a failing case shrinks."""

SEEDS = st.integers(0, 999)


def problems(
    *,
    curvature: str = "hessian",
    accuracy: str = "autodiff",
    models: tuple[str, ...] = MODELS,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    min_batch_size: int = 0,
    max_batch_size: int = 6,
) -> SearchStrategy[Problem]:
    """Random small problems of every model, loss and dtype. See `make_problem`.

    Among them: batches of none and of one, padded sequences, a single scalar, parameters that the loss does not use or
    is linear in.

    Example:
        >>> from hypothesis import given, settings
        >>> from lissa import hvp
        >>> from lissa.testing import products
        >>> @settings(max_examples=3)
        ... @given(problem=problems(dtypes=(torch.float64,), max_batch_size=3))
        ... def test_symmetry(problem):
        ...     products.symmetry(hvp, problem)
        >>> test_symmetry()
    """

    @st.composite
    def draw_problem(draw: st.DrawFn) -> Problem:
        sizes = st.integers(1, 3)
        model = draw(st.sampled_from(models))
        loss = draw(st.sampled_from(LOSSES))
        recipe = {
            "model": model,
            "loss": loss,
            "features": draw(sizes),
            "outputs": draw(sizes),
            "width": draw(sizes),
            "activation": draw(st.sampled_from(tuple(ACTIVATIONS))),
            "batch_size": draw(st.integers(min_batch_size, max_batch_size)),
            "positions": draw(st.sampled_from((0, 0, 0, 2, 3))),
            "linear_term": draw(st.sampled_from((False, False, False, True))),
            "unused": draw(st.sampled_from((False, False, False, True))),
            "dtype": draw(st.sampled_from(dtypes)),
            "seed": draw(SEEDS),
        }
        return make_problem(curvature=curvature, accuracy=accuracy, **recipe)

    return draw_problem()


def params_dicts(*, dtypes: tuple[torch.dtype, ...] = DTYPES, max_tensors: int = 3) -> SearchStrategy[Params]:
    """Dicts of one to `max_tensors` tensors of up to three dimensions, a scalar among them, all of one dtype."""
    shapes = st.lists(st.integers(1, 3), max_size=3).map(tuple)

    @st.composite
    def draw_params(draw: st.DrawFn) -> Params:
        dtype, seed = draw(st.sampled_from(dtypes)), draw(SEEDS)
        like = {
            f"p{i}": torch.empty(s, dtype=dtype)
            for i, s in enumerate(draw(st.lists(shapes, min_size=1, max_size=max_tensors)))
        }
        return tree.normal_like(like, generator=torch.Generator().manual_seed(seed))

    return draw_params()


def vectors_like(params: Params) -> SearchStrategy[Params]:
    """Vectors with the keys, shapes and dtypes of `params`: standard normal, or zero."""

    def vector(seed: int) -> Params:
        if seed == 0:
            return tree.zeros_like(params)
        return tree.normal_like(params, generator=torch.Generator().manual_seed(seed))

    return SEEDS.map(vector)


def spd_operators(
    *, dtypes: tuple[torch.dtype, ...] = DTYPES, rtol: float | None = None, damping_scale: float = 1.0
) -> SearchStrategy[Operator]:
    """Symmetric positive definite matrices of up to six dimensions, eigenvalues from 1/4 to 4. See `make_operator`."""
    return _operators(st.integers(1, 16), dtypes, rtol, damping_scale)


def indefinite_operators(
    *, dtypes: tuple[torch.dtype, ...] = DTYPES, rtol: float | None = None, damping_scale: float = 1.0
) -> SearchStrategy[Operator]:
    """Symmetric matrices with eigenvalues of both signs that damping does not bring near 0. See `make_operator`."""
    quarters = st.integers(1, 16) | st.integers(-40, -24)
    return _operators(quarters, dtypes, rtol, damping_scale)


def batch_streams(*, rtol: float = 0.8, exact_rtol: float = 0.05) -> SearchStrategy[Samples]:
    """Data whose rows make a mean curvature, a batch size and a number of repeats. See `make_samples`."""
    return st.builds(
        make_samples,
        dimension=st.integers(1, 2),
        batches=st.integers(1, 4),
        batch_size=st.integers(1, 4),
        repeats=st.integers(1, 2),
        equal=st.booleans(),
        seed=SEEDS,
        rtol=st.just(rtol),
        exact_rtol=st.just(exact_rtol),
    )


def _operators(
    quarters: SearchStrategy[int], dtypes: tuple[torch.dtype, ...], rtol: float | None, damping_scale: float
) -> SearchStrategy[Operator]:
    eigenvalues = st.lists(quarters.map(lambda q: q / 4), min_size=1, max_size=6)
    return st.builds(
        make_operator,
        eigenvalues=eigenvalues,
        tensors=st.integers(1, 3),
        damping=st.sampled_from((0.0, 0.25, 0.5, 1.0)).map(lambda shift: shift / damping_scale),
        dtype=st.sampled_from(dtypes),
        seed=SEEDS,
        rtol=st.just(rtol),
        damping_scale=st.just(damping_scale),
    )
