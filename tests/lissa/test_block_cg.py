"""K right-hand sides in one Krylov space: the dense answer, in as few steps as theory says, whatever they are."""

import math
from functools import partial

import pytest
import torch

from lissa import SolverError, Status, hvp, solve_block_cg, solve_cg, stacked_hvp
from tests.oracles import dense_hessian, flatten, relative_error
from tests.problems import random_vectors, softmax_regression


def diagonal(eigenvalues):
    return lambda v: {"x": eigenvalues * v["x"]}


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def spread(P=200, largest=100.0):
    """A few large eigenvalues above many that are about 1."""
    return torch.cat([torch.linspace(largest / 10, largest, 10), torch.linspace(0.5, 1.0, P - 10)]).double()


@pytest.mark.parametrize("count", [1, 4, 40])
@pytest.mark.parametrize("product", ["vmap", "stacked"])
def test_is_the_dense_solution(count, product):
    problem = softmax_regression(batch_size=64)
    v = random_vectors(problem, count)
    matvec = (
        torch.vmap(partial(hvp, problem.loss_fn, problem.params, problem.batch))
        if product == "vmap"
        else partial(stacked_hvp, problem.loss_fn, problem.params, problem.batch)
    )
    found = solve_block_cg(matvec, v, damping=0.1, rtol=1e-8)
    H = dense_hessian(problem.loss_fn, problem.params, problem.batch)
    V = torch.vmap(flatten)(v)
    expected = torch.linalg.solve(H + 0.1 * torch.eye(len(H), dtype=H.dtype), V.mT).mT
    # |x - x*| <= kappa rtol |x*|, and kappa is below 20.
    assert relative_error(torch.vmap(flatten)(found.value), expected) <= 2e-7
    assert (found.status == Status.CONVERGED).all()
    assert (found.relative_residual <= 1e-8).all()
    assert {k: t.shape for k, t in found.value.items()} == {k: t.shape for k, t in v.items()}


def test_one_right_hand_side_is_conjugate_gradients():
    eigenvalues, v = spread(), normal(1, 200)
    block = solve_block_cg(diagonal(eigenvalues), {"x": v}, damping=0.1, rtol=1e-8)
    plain = solve_cg(diagonal(eigenvalues), {"x": v[0]}, damping=0.1, rtol=1e-8)
    # The same residuals in exact arithmetic; rounding grows with each eigenvalue that is found, so the first ten steps.
    torch.testing.assert_close(block.residual_trace[0, :10], plain.residual_trace[:10], rtol=1e-6, atol=0)


def test_as_many_right_hand_sides_as_large_eigenvalues_take_those_out():
    """Then `kappa = 1.1 / 0.6`, where one alone has `100.1 / 0.6`."""
    eigenvalues, rtol = spread(), 1e-6
    found = solve_block_cg(diagonal(eigenvalues), {"x": normal(12, 200)}, damping=0.1, rtol=rtol)
    alone = solve_cg(diagonal(eigenvalues), {"x": normal(1, 200)[0]}, damping=0.1, rtol=rtol)
    # O'Leary's bound is for the norm of A; for the residual's it is larger by sqrt(kappa) of all of A at most, and for
    # the part of a random start in the other directions by sqrt(P).
    kappa = 1.1 / 0.6
    bound = math.sqrt(kappa) / 2 * math.log(2 * math.sqrt(100.1 / 0.6) * math.sqrt(200) / rtol) + 1
    assert (found.relative_residual <= rtol).all()
    assert int(found.steps.max()) <= bound < int(alone.steps)


def test_more_right_hand_sides_than_dimensions_take_one_step():
    found = solve_block_cg(diagonal(spread(20)), {"x": normal(50, 20)}, rtol=1e-10)
    assert (found.steps == 1).all()
    assert (found.relative_residual <= 1e-10).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_dependent_and_zero_right_hand_sides_do_no_harm(dtype):
    v = normal(4, 200, dtype=dtype)
    v = torch.stack([v[0], v[0], torch.zeros_like(v[0]), v[1], v[0] + 1e-3 * v[1], 1e6 * v[2], 1e-6 * v[3]])
    found = solve_block_cg(diagonal(spread().to(dtype)), {"x": v}, damping=0.1, rtol=1e-4)
    assert (found.status == Status.CONVERGED).all()
    assert (found.relative_residual <= 1e-4).all()
    # Each is right to kappa rtol of its own size, though their sizes differ by 1e12.
    expected = v / (spread().to(dtype) + 0.1)
    gap = (found.value["x"] - expected).norm(dim=1)
    assert (gap <= 170 * 1e-4 * expected.norm(dim=1)).all()
    assert not found.value["x"][2].any()


def test_going_on_past_the_last_digit_stays_at_rounding():
    eigenvalues, v = spread().float(), normal(8, 200, dtype=torch.float32)
    found = solve_block_cg(diagonal(eigenvalues), {"x": v}, damping=0.1, rtol=1e-12, steps=60)
    # Rounding of float32, 6e-8, times kappa of 170 and a factor for the sums; it may not creep up over the steps.
    assert (found.relative_residual <= 1e-5).all()
    assert (found.status == Status.FINISHED).all()


def test_steps_that_do_not_suffice_are_said():
    found = solve_block_cg(diagonal(spread()), {"x": normal(2, 200)}, damping=0.1, rtol=1e-10, steps=3)
    assert (found.status == Status.FINISHED).all()
    assert (found.steps == 3).all()
    assert found.residual_trace.shape == (2, 3)
    assert (found.relative_residual > 1e-10).all()
    # What the recurrence carried along is the true residual.
    torch.testing.assert_close(found.residual_trace[:, -1], found.residual_norm, rtol=1e-8, atol=0)


def test_negative_curvature_ends_in_indefinite():
    eigenvalues = spread() - 0.7
    with pytest.raises(SolverError, match=r"solve_block_cg\(damping=0.1\).*INDEFINITE"):
        solve_block_cg(diagonal(eigenvalues), {"x": normal(3, 200)}, damping=0.1)
    found = solve_block_cg(diagonal(eigenvalues), {"x": normal(3, 200)}, damping=0.1, throw=False)
    assert (found.status == Status.INDEFINITE).all()
    assert found.value["x"].isnan().all()


def test_a_right_hand_side_that_is_not_finite_fails_alone():
    v = normal(3, 200)
    v[1, 7] = torch.nan
    found = solve_block_cg(diagonal(spread()), {"x": v}, damping=0.1, throw=False)
    assert found.status.tolist() == [Status.CONVERGED, Status.NOT_FINITE, Status.CONVERGED]
    assert found.value["x"].isnan().all(1).tolist() == [False, True, False]


def test_a_product_that_is_not_finite_ends_in_not_finite():
    with pytest.raises(SolverError, match="NOT_FINITE"):
        solve_block_cg(diagonal(spread() * torch.nan), {"x": normal(2, 200)})


@pytest.mark.parametrize(
    ("v", "message"),
    [
        ({}, "at least one tensor"),
        ({"x": torch.ones(2, 3), "y": torch.ones(3, 3)}, "equally many"),
        ({"x": torch.ones(0, 3)}, "at least one vector"),
        ({"x": torch.ones(())}, "dimension in front"),
    ],
)
def test_right_hand_sides_that_are_not_stacked_are_refused(v, message):
    with pytest.raises(ValueError, match=rf"`solve_block_cg\(v=.*{message}"):
        solve_block_cg(lambda v: v, v)
