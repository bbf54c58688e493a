"""Spectra of matrices whose eigenvalues are known: ends, bounds, trace and its error."""

import itertools
from functools import partial

import pytest
import torch

from lissa import batch_noise, estimate_spectrum, hvp, largest_eigenvalue, mean_matvec, tree
from lissa.sampling import take
from tests.oracles import dense_hessian
from tests.problems import mlp


def matrix_of(eigenvalues: torch.Tensor, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), dtype=torch.float64, generator=g))[0]
    return Q @ torch.diag(eigenvalues.double()) @ Q.T


def estimate(matrix: torch.Tensor, seed: int = 0, **options):
    like = {"w": torch.zeros(len(matrix) - 2, dtype=matrix.dtype), "b": torch.zeros(1, 2, dtype=matrix.dtype)}
    return estimate_spectrum(
        lambda v: tree.unflatten(matrix @ tree.flatten(v), v),
        like,
        generator=torch.Generator().manual_seed(seed),
        **options,
    )


SPECTRA = {
    "decaying": torch.logspace(0, -6, 200),
    "flat": torch.linspace(0, 1, 200),
    "indefinite": torch.cat([torch.linspace(-0.5, 0.5, 199), torch.tensor([3.0])]),
    "negative": -torch.logspace(0, -3, 200),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("steps", [8, 20, 60])
def test_bounds_hold_and_estimates_lie_inside_the_spectrum(name, steps):
    eigenvalues = SPECTRA[name].double()
    largest, smallest = eigenvalues.max(), eigenvalues.min()
    for seed in range(10):  # each bound may fail once in a hundred by its own statement; these do not
        found = estimate(matrix_of(eigenvalues), seed, steps=steps)
        rounding = 1e-12
        assert largest - found.largest >= -rounding
        assert found.smallest - smallest >= -rounding
        assert found.largest_bound >= largest - rounding
        assert found.smallest_bound <= smallest + rounding
        assert (eigenvalues - found.largest).abs().min() <= found.largest_residual + rounding
        assert (eigenvalues - found.smallest).abs().min() <= found.smallest_residual + rounding
        assert found.products == steps + 10


def test_more_steps_make_the_bound_sharp():
    gaps = [float(estimate(matrix_of(SPECTRA["flat"]), steps=s).largest_bound) - 1 for s in (20, 40, 80)]
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2] > 0


def test_all_steps_give_the_exact_spectrum():
    matrix = matrix_of(torch.linspace(-1, 2, 12, dtype=torch.float64))
    found = estimate(matrix, steps=50)
    for got, expected in [(found.largest, 2), (found.largest_bound, 2), (found.smallest_bound, -1), (found.trace, 6)]:
        assert abs(float(got) - expected) <= 1e-10
    assert found.trace_error == 0
    assert found.products == 12


@pytest.mark.parametrize("name", SPECTRA)
def test_the_largest_eigenvalue_alone_is_that_of_lanczos_with_orthogonal_vectors(name):
    matrix = matrix_of(SPECTRA[name])
    like = {"w": torch.zeros(len(matrix), dtype=matrix.dtype)}

    def largest(steps):
        generator = torch.Generator().manual_seed(0)
        return float(largest_eigenvalue(lambda v: {"w": matrix @ v["w"]}, like, generator=generator, steps=steps))

    # Eight steps lose no orthogonality but to rounding; the two starts are the same draw.
    assert largest(8) == pytest.approx(float(estimate(matrix, steps=8, probes=2).largest), rel=1e-6)
    assert largest(40) <= float(SPECTRA[name].max()) + 1e-6


@pytest.mark.parametrize("rtol", [0.5, 0.1, 1e-3])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_largest_eigenvalue_is_sought_until_its_residual_is_small(name, rtol):
    """Within the residual of a quotient there is an eigenvalue, of any symmetric matrix."""
    matrix, products = matrix_of(SPECTRA[name]), []
    like = {"w": torch.zeros(len(matrix), dtype=matrix.dtype)}

    def largest(**settings):
        del products[:]
        generator = torch.Generator().manual_seed(0)
        return float(
            largest_eigenvalue(
                lambda v: products.append(1) or {"w": matrix @ v["w"]}, like, generator=generator, **settings
            )
        )

    found, taken = largest(steps=60, rtol=rtol), len(products)
    assert 2 <= taken <= 60
    if taken < 60:
        assert min(abs(SPECTRA[name] - found)) <= rtol * abs(found) * (1 + 1e-9)
        assert largest(steps=taken) == pytest.approx(found, rel=1e-12)
        one_less = largest(steps=taken - 1, rtol=rtol)  # had not been enough
        assert len(products) == taken - 1
        assert one_less <= found


@pytest.mark.parametrize(("eigenvalues", "expected"), [([0.0, 0.0, 0.0], 0.0), ([2.0, 2.0, 2.0], 2.0), ([-3.0], -3.0)])
def test_the_largest_eigenvalue_where_the_krylov_space_ends_early(eigenvalues, expected):
    diagonal = torch.tensor(eigenvalues)
    got = largest_eigenvalue(
        lambda v: {"w": diagonal * v["w"]}, {"w": diagonal}, generator=torch.Generator().manual_seed(0)
    )
    assert float(got) == pytest.approx(expected, abs=1e-6)


def test_a_krylov_space_that_ends_early_is_exact_and_the_trace_is_still_right():
    eigenvalues = torch.cat([torch.full((40,), 2.0), torch.full((60,), 5.0)])
    found = estimate(matrix_of(eigenvalues), steps=20)
    assert abs(float(found.largest_bound) - 5) <= 1e-9
    assert abs(float(found.smallest_bound) - 2) <= 1e-9
    assert abs(float(found.trace) - 380) <= 6 * float(found.trace_error) + 1e-9


def test_zero_matrix():
    found = estimate(torch.zeros(5, 5, dtype=torch.float64))
    assert all(float(x) == 0 for x in (found.largest, found.smallest, found.largest_bound, found.trace))


@pytest.mark.parametrize("name", SPECTRA)
def test_the_standard_error_of_the_trace_is_right(name):
    eigenvalues = SPECTRA[name].double()
    matrix = matrix_of(eigenvalues)
    runs = [estimate(matrix, seed, steps=5, probes=30) for seed in range(60)]
    z = torch.stack([(run.trace - eigenvalues.sum()) / run.trace_error for run in runs])
    # 60 values of a Student variable with 29 degrees of freedom (variance 1.07): the mean of z has standard deviation
    # 0.134, that of z^2 about 0.21; five of each.
    assert z.mean().abs() <= 5 * 0.134
    assert abs(float(z.square().mean()) - 1.07) <= 5 * 0.21


def test_lanczos_vectors_take_the_noise_of_the_large_eigenvalues_from_the_trace():
    matrix = matrix_of(SPECTRA["decaying"])
    few, many = estimate(matrix, steps=2, probes=30), estimate(matrix, steps=30, probes=30)
    # The best subspace of 30 would leave e^-2 = 0.13 of the noise; a Krylov space is not the best.
    assert many.trace_error < few.trace_error / 2


def test_hessian_of_a_model_and_mean_over_ragged_batches():
    problem = mlp(batch_size=11)
    matvec = partial(hvp, problem.loss_fn, problem.params)
    batches = [take(problem.batch, torch.arange(i, min(i + 4, 11))) for i in range(0, 11, 4)]
    eigenvalues = torch.linalg.eigvalsh(dense_hessian(problem.loss_fn, problem.params, problem.batch))
    found = estimate_spectrum(
        mean_matvec(matvec, batches), problem.params, generator=torch.Generator().manual_seed(0), steps=200
    )
    torch.testing.assert_close(found.largest, eigenvalues[-1])
    torch.testing.assert_close(found.smallest, eigenvalues[0])
    torch.testing.assert_close(found.trace, eigenvalues.sum())


def test_same_seed_same_numbers_and_no_global_random_state():
    matrix = matrix_of(SPECTRA["flat"])
    before = torch.get_rng_state()
    first, second = estimate(matrix, 7), estimate(matrix, 7)
    assert first == second
    assert torch.equal(before, torch.get_rng_state())
    assert estimate(matrix, 8) != first


def test_products_that_change_from_call_to_call_are_refused():
    matrices = itertools.cycle([matrix_of(SPECTRA["flat"], 0), matrix_of(SPECTRA["flat"], 1)])
    with pytest.raises(ValueError, match=r"symmetric and the same at each call.*mean_matvec.*dropout"):
        estimate_spectrum(
            lambda v: tree.unflatten(next(matrices) @ tree.flatten(v), v),
            {"w": torch.zeros(200, dtype=torch.float64)},
            generator=torch.Generator().manual_seed(0),
        )


def test_not_a_number_is_refused():
    with pytest.raises(ValueError, match="finite products"):
        estimate(torch.full((4, 4), torch.nan, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 1}, r"steps=...\)` must be >= 2"),
        ({"probes": 1}, r"probes=...\)` must be >= 2"),
        ({"risk": 0}, r"risk=...\)` must be > 0"),
    ],
)
def test_bad_arguments_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        estimate(torch.eye(4, dtype=torch.float64), **options)


def test_one_parameter_has_one_eigenvalue():
    spectrum = estimate_spectrum(
        lambda v: {"x": 3.0 * v["x"]}, {"x": torch.ones(())}, generator=torch.Generator().manual_seed(0)
    )
    assert float(spectrum.largest) == float(spectrum.smallest) == float(spectrum.trace) == 3.0
    assert float(spectrum.trace_error) == 0.0


def noise_of(matrices, batch_size, probes=400, replacement=200):
    """`batch_noise` of example matrices `(n, P, P)` in many random batches of that size."""
    g = torch.Generator().manual_seed(0)
    batches = torch.randint(len(matrices), (replacement, batch_size), generator=g)
    like = {"x": torch.zeros(matrices.shape[-1], dtype=matrices.dtype)}
    return float(
        batch_noise(
            lambda index, v: {"x": matrices[index].mean(0) @ v["x"]},
            batches,
            like,
            batch_size=batch_size,
            generator=g,
            probes=probes,
        )
    )


@pytest.mark.parametrize("batch_size", [1, 4])
def test_noise_is_the_mean_square_over_the_mean_of_the_examples_curvature(batch_size):
    g = torch.Generator().manual_seed(1)
    rows = torch.randn(32, 2, 5, generator=g, dtype=torch.float64) * torch.rand(32, 1, 1, generator=g).double() ** 2
    matrices = rows.mT @ rows
    exact = torch.einsum("nij,nij->", matrices, matrices) / torch.einsum("nii->", matrices)
    # 200 batches and 400 probes: a standard error of about sqrt(2 / 200) = 10% from the batches' variance.
    assert abs(noise_of(matrices, batch_size) / exact - 1) <= 0.3


def test_noise_of_rank_one_curvature_of_one_size_is_the_trace_and_of_a_rare_example_far_more():
    g = torch.Generator().manual_seed(1)
    rows = torch.randn(64, 6, generator=g, dtype=torch.float64)
    rows = 2 * rows / rows.norm(dim=1, keepdim=True)
    equal = rows[:, :, None] * rows[:, None]
    assert abs(noise_of(equal, 1) / 4 - 1) <= 0.2
    equal[0] *= 100
    trace = float(torch.einsum("nii->", equal)) / 64
    assert noise_of(equal, 1) >= 20 * trace


def test_noise_of_equal_batches_is_the_matrix_alone():
    matrix = torch.diag(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
    # No spread: tr H^2 / tr H.
    assert abs(noise_of(matrix.expand(4, 3, 3), 2, probes=2) / (30 / 8) - 1) <= 1e-12
    assert noise_of(0 * matrix.expand(4, 3, 3), 2, probes=1) == 0.0


def test_noise_needs_two_batches():
    with pytest.raises(ValueError, match="at least 2 batches, got 1"):
        batch_noise(
            lambda b, v: v, [0], {"x": torch.zeros(2)}, batch_size=1, generator=torch.Generator().manual_seed(0)
        )
