"""LiSSA against a naive loop over dense matrices, against the dense solve, and against what makes it fail."""

import math
from functools import partial, reduce

import pytest
import torch

from lissa import SolverError, Status, hvp, lissa_init, lissa_update, solve_lissa, tree
from lissa.sampling import take
from tests.oracles import dense_hessian, flatten, naive_lissa, relative_error
from tests.problems import random_vector, random_vectors, softmax_regression

PROBLEM = softmax_regression(batch_size=12)
MATVEC = partial(hvp, PROBLEM.loss_fn, PROBLEM.params)
V = random_vector(PROBLEM)
BATCHES = [take(PROBLEM.batch, torch.arange(i, 12, 4)) for i in range(4)]
HESSIANS = [dense_hessian(PROBLEM.loss_fn, PROBLEM.params, batch) for batch in BATCHES]
HESSIAN = dense_hessian(PROBLEM.loss_fn, PROBLEM.params, PROBLEM.batch)


def dense_solve(damping: float) -> torch.Tensor:
    return torch.linalg.solve(HESSIAN + damping * torch.eye(len(HESSIAN), dtype=HESSIAN.dtype), flatten(V))


@pytest.mark.parametrize("damping", [0.0, 0.1, 3.0])
@pytest.mark.parametrize("scale", [5.0, 40.0])
@pytest.mark.parametrize("depth", [0, 1, 7, 60])
def test_equals_a_naive_loop_over_dense_matrices(damping, scale, depth):
    order = [t % len(BATCHES) for t in range(depth)]
    solution = solve_lissa(MATVEC, V, [BATCHES[t] for t in order], damping=damping, scale=scale)
    expected = naive_lissa([HESSIANS[t] for t in order], flatten(V), damping, scale)
    # Both round each of at most 60 contracting steps to 1e-16.
    assert relative_error(flatten(solution.value), expected) <= 1e-12
    assert int(solution.steps) == depth
    assert Status(int(solution.status)) is Status.FINISHED


@pytest.mark.parametrize("damping", [0.3, 2.0])
@pytest.mark.parametrize("scale_over_largest", [0.6, 1.0])
def test_limit_with_the_full_batch_is_the_dense_solve(damping, scale_over_largest):
    largest = torch.linalg.eigvalsh(HESSIAN).max().item() + damping
    scale = scale_over_largest * largest
    # Modes shrink by |1 - (eigenvalue + damping) / scale| a step, the slowest at one end: e^-30 = 1e-13 is left.
    rate = max(1 - damping / scale, largest / scale - 1)
    steps = int(30 / -math.log(rate)) + 1
    solution = solve_lissa(MATVEC, V, [PROBLEM.batch] * steps, damping=damping, scale=scale)
    assert relative_error(flatten(solution.value), dense_solve(damping)) <= 1e-10
    assert solution.relative_residual <= 1e-10


def test_many_right_hand_sides_by_vmap_equal_single_solves():
    vs = random_vectors(PROBLEM, 5)
    solve = partial(solve_lissa, MATVEC, batches=BATCHES * 5, damping=0.1, scale=6.0)
    together = torch.vmap(lambda v: solve(v))(vs)
    for i in range(5):
        alone = solve(tree.map(lambda t, i=i: t[i], vs))
        assert relative_error(flatten(tree.map(lambda t, i=i: t[i], together.value)), flatten(alone.value)) <= 1e-14
        torch.testing.assert_close(together.residual_norm[i], alone.residual_norm, rtol=1e-12, atol=0)
        assert together.steps[i] == alone.steps


def test_right_hand_sides_stop_on_their_own():
    # The second vector is an eigenvector of the fastest mode, which one step solves: scale = lambda + damping.
    eigenvalues, eigenvectors = torch.linalg.eigh(HESSIAN)
    fast = tree.unflatten(eigenvectors[:, -1].clone(), V)
    vs = tree.map(lambda a, b: torch.stack([a, b]), V, fast)
    scale = eigenvalues[-1].item() + 0.2
    steps = 400
    solve = partial(solve_lissa, MATVEC, batches=[PROBLEM.batch] * steps, damping=0.2, scale=scale, rtol=1e-6)
    solution = torch.vmap(lambda v: solve(v))(vs)
    assert [Status(s) for s in solution.status.tolist()] == [Status.CONVERGED, Status.CONVERGED]
    assert solution.steps[1] < solution.steps[0] < steps
    for i, v in enumerate([V, fast]):
        alone = solve(v)
        assert alone.steps == solution.steps[i]
        assert relative_error(flatten(tree.map(lambda t, i=i: t[i], solution.value)), flatten(alone.value)) <= 1e-12


def test_update_can_be_driven_by_hand():
    step = partial(lissa_update, MATVEC, V, damping=0.1, scale=6.0)
    state = reduce(step, BATCHES, lissa_init(V))
    expected = naive_lissa(HESSIANS, flatten(V), 0.1, 6.0)
    assert relative_error(flatten(state.h) / 6.0, expected) <= 1e-13
    assert int(state.step) == 4


def test_update_changes_neither_its_state_nor_the_right_hand_side():
    state = lissa_init(V)
    before = {k: t.clone() for k, t in V.items()}
    lissa_update(MATVEC, V, state, BATCHES[0], damping=0.1, scale=6.0)
    assert all(torch.equal(V[k], before[k]) and torch.equal(state.h[k], before[k]) for k in V)


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.3])
def test_too_small_a_scale_ends_in_diverged_within_a_few_steps_and_not_in_numbers(fraction):
    bound = (torch.linalg.eigvalsh(HESSIAN).max().item() + 0.1) / 2
    solution = solve_lissa(MATVEC, V, [PROBLEM.batch] * 1000, damping=0.1, scale=fraction * bound, throw=False)
    assert Status(int(solution.status)) is Status.DIVERGED
    assert solution.steps <= 40
    assert all(t.isnan().all() for t in solution.value.values())
    with pytest.raises(SolverError, match=r"scale.*too small.*lambda_max \+ damping \+ trace / batch_size"):
        solve_lissa(MATVEC, V, [PROBLEM.batch] * 1000, damping=0.1, scale=fraction * bound)


def test_a_negative_direction_ends_in_diverged():
    def matvec(batch, v):
        return tree.map(lambda product, v: product - 2.0 * v, MATVEC(batch, v), v)

    solution = solve_lissa(matvec, V, [PROBLEM.batch] * 1000, damping=0.1, scale=6.0, throw=False)
    assert Status(int(solution.status)) is Status.DIVERGED
    assert all(t.isnan().all() for t in solution.value.values())


@pytest.mark.parametrize("where", ["right-hand side", "data"])
def test_not_a_number_ends_in_not_finite(where):
    v, batch = V, PROBLEM.batch
    if where == "data":
        batch = (batch[0].clone(), batch[1])
        batch[0][3, 2] = torch.nan
    else:
        v = {k: torch.full_like(t, torch.nan) for k, t in V.items()}
    solution = solve_lissa(MATVEC, v, [batch] * 20, damping=0.1, scale=6.0, throw=False)
    assert Status(int(solution.status)) is Status.NOT_FINITE
    assert all(t.isnan().all() for t in solution.value.values())
    with pytest.raises(SolverError, match="NaN in the data"):
        solve_lissa(MATVEC, v, [batch] * 20, damping=0.1, scale=6.0)


def test_one_failing_right_hand_side_spoils_no_other():
    vs = tree.map(lambda t: torch.stack([t, torch.full_like(t, torch.nan)]), V)
    solve = partial(solve_lissa, MATVEC, batches=BATCHES * 3, damping=0.1, scale=6.0, throw=False)
    together, alone = torch.vmap(lambda v: solve(v))(vs), solve(V)
    assert [Status(s) for s in together.status.tolist()] == [Status.FINISHED, Status.NOT_FINITE]
    assert relative_error(flatten(tree.map(lambda t: t[0], together.value)), flatten(alone.value)) <= 1e-14


def test_zero_has_solution_zero():
    solution = solve_lissa(MATVEC, tree.zeros_like(V), BATCHES, damping=0.1, scale=6.0)
    assert not flatten(solution.value).any()
    assert solution.relative_residual == 0


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"scale": 0.0}, ValueError, r"solve_lissa\(scale=...\)` must be > 0, got 0.0"),
        ({"scale": -1.0}, ValueError, "must be > 0, got -1.0"),
        ({"scale": float("nan")}, ValueError, "must be finite"),
        ({"scale": "big"}, TypeError, "must be a number, got str"),
        ({"damping": -0.1}, ValueError, r"solve_lissa\(damping=...\)` must be >= 0"),
        ({"steps": -1}, ValueError, "must be >= 0"),
        ({"steps": 2.5}, TypeError, "must be an int"),
        ({"steps": 5}, ValueError, "ended after 4 of 5 steps"),
        ({"rtol": 0.0}, ValueError, "must be > 0"),
        ({"v": {}}, ValueError, "at least one tensor"),
        ({"v": 3.0}, TypeError, "must be a dict of tensors"),
    ],
)
def test_bad_arguments_are_named(change, error, words):
    arguments = {"matvec": MATVEC, "v": V, "batches": BATCHES, "damping": 0.1, "scale": 6.0} | change
    with pytest.raises(error, match=words):
        solve_lissa(**arguments)
