"""Variance-reduced LiSSA against a naive loop over dense matrices and against the dense solve."""

from functools import partial

import pytest
import torch

from lissa import SolverError, Status, hvp, index_stream, mean_matvec, solve_lissa, solve_svrg, tree
from lissa.sampling import take
from tests.oracles import dense_hessian, flatten, relative_error
from tests.problems import random_vector, random_vectors, softmax_regression

PROBLEM = softmax_regression(batch_size=40)
MATVEC = partial(hvp, PROBLEM.loss_fn, PROBLEM.params)
V = random_vector(PROBLEM)
BATCHES = [take(PROBLEM.batch, torch.arange(i, 40, 10)) for i in range(10)]
HESSIANS = [dense_hessian(PROBLEM.loss_fn, PROBLEM.params, batch) for batch in BATCHES]
DAMPING = 0.1
A = sum(HESSIANS) / 10 + DAMPING * torch.eye(len(HESSIANS[0]), dtype=torch.float64)
FULL = mean_matvec(MATVEC, BATCHES)
SCALE = 2.0 * torch.linalg.eigvalsh(torch.stack(HESSIANS)).max().item()  # stable on every batch


def stream(seed: int = 0):
    indices = index_stream(10, 1, generator=torch.Generator().manual_seed(seed), replacement=True)
    return (BATCHES[int(index)] for index in indices)


solve = partial(solve_svrg, MATVEC, full_matvec=FULL, damping=DAMPING, scale=SCALE)


def test_equals_a_naive_loop_over_dense_matrices():
    order = [(7 * t + 3) % 10 for t in range(3 * 12)]
    solution = solve(V, [BATCHES[t] for t in order], inner_steps=12, average_after=5, epochs=3, rtol=1e-300)
    x, r = torch.zeros_like(flatten(V)), flatten(V)
    for epoch in range(3):
        d, tail = r / SCALE, []
        for t, i in enumerate(order[12 * epoch : 12 * epoch + 12], start=1):
            d = d + (r - HESSIANS[i] @ d - DAMPING * d) / SCALE
            tail += [d] if t > 5 else []
        d = torch.stack(tail).mean(0)
        a = (r @ A @ d) / (A @ d).square().sum()
        x, r = x + a * d, r - a * A @ d
        torch.testing.assert_close(solution.residual_trace[epoch], r.norm())
    assert relative_error(flatten(solution.value), x) <= 1e-12
    assert solution.steps == 36
    assert solution.status == Status.FINISHED


def test_converges_to_the_dense_solve_where_lissa_hovers():
    expected = torch.linalg.solve(A, flatten(V))
    steps = int(8 * SCALE / DAMPING)
    plain = solve_lissa(MATVEC, V, stream(), damping=DAMPING, scale=SCALE, steps=10 * steps)
    reduced = solve(V, stream(), inner_steps=steps, epochs=40, rtol=1e-12)
    assert Status(int(reduced.status)) is Status.CONVERGED
    # |x - x*| <= |r| / damping.
    assert (flatten(reduced.value) - expected).norm() <= 1e-12 * flatten(V).norm() / DAMPING + 1e-13
    assert relative_error(flatten(plain.value), expected) > 1e-3
    assert (reduced.residual_trace[1:] <= reduced.residual_trace[:-1]).all()


def test_residual_is_that_of_the_value_on_all_data():
    solution = solve(V, stream(), inner_steps=200, epochs=5, rtol=1e-6)
    true = (flatten(V) - A @ flatten(solution.value)).norm()
    torch.testing.assert_close(solution.residual_norm, true, rtol=1e-8, atol=1e-12)


def test_many_right_hand_sides_stop_on_their_own_and_equal_single_solves():
    vs = random_vectors(PROBLEM, 3)
    vs = tree.map(lambda t: torch.cat([t, torch.zeros_like(t[:1])]), vs)
    # The batches are fixed: a run that stops early must not change which batches the others see.
    together = torch.vmap(lambda v: solve(v, stream(), inner_steps=100, epochs=30, rtol=1e-4))(vs)
    assert [Status(s) for s in together.status.tolist()] == [Status.CONVERGED] * 4
    assert together.steps[3] == 0
    for i in range(3):
        alone = solve(tree.map(lambda t, i=i: t[i], vs), stream(), inner_steps=100, epochs=30, rtol=1e-4)
        assert alone.steps == together.steps[i]
        assert relative_error(flatten(tree.map(lambda t, i=i: t[i], together.value)), flatten(alone.value)) <= 1e-10


def test_goes_on_from_a_start():
    half = solve(V, stream(), inner_steps=100, epochs=2, rtol=1e-9)
    rest = solve(V, stream(1), inner_steps=100, epochs=50, rtol=1e-9, x=half.value)
    assert rest.status == Status.CONVERGED
    assert rest.residual_trace[0] <= half.residual_norm
    assert relative_error(flatten(rest.value), torch.linalg.solve(A, flatten(V))) <= 1e-7


def test_too_small_a_scale_ends_in_diverged():
    arguments = {"inner_steps": 400, "scale": SCALE / 50}
    solution = solve(V, stream(), throw=False, **arguments)
    assert Status(int(solution.status)) is Status.DIVERGED
    assert all(t.isnan().all() for t in solution.value.values())
    with pytest.raises(SolverError, match=r"solve_svrg.*DIVERGED.*`scale` is too small"):
        solve(V, stream(), **arguments)


def test_not_a_number_ends_in_not_finite():
    solution = solve(V, [(b[0] * torch.nan, b[1]) for b in BATCHES], inner_steps=10, throw=False)
    assert Status(int(solution.status)) is Status.NOT_FINITE


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"inner_steps": 0}, ValueError, r"solve_svrg\(inner_steps=...\)` must be >= 1"),
        ({"epochs": 0}, ValueError, "must be >= 1"),
        ({"scale": 0.0}, ValueError, "must be > 0"),
        ({"damping": -1.0}, ValueError, "must be >= 0"),
        ({"rtol": 0.0}, ValueError, "must be > 0"),
        ({"batches": BATCHES}, ValueError, "ended after 10 of 12 steps"),
    ],
)
def test_bad_arguments_are_named(change, error, words):
    arguments = {"v": V, "batches": stream(), "inner_steps": 12} | change
    with pytest.raises(error, match=words):
        solve(**arguments)
