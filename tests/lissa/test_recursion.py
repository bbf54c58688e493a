"""LiSSA against a naive loop over dense matrices, against the dense solve, and against what makes it fail."""

import itertools
import math
import re
from functools import partial, reduce

import pytest
import torch

from lissa import SolverError, Status, hvp, index_stream, lissa_init, lissa_update, solve_lissa, tree
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


ARGUMENTS = {"damping": 0.1, "scale": 6.0}


def test_residual_on_all_the_data_is_that_of_the_value():
    full = partial(MATVEC, PROBLEM.batch)
    for options in ({}, {"average_after": 10}, {"repeats": 2, "steps": 20}):
        solution = solve_lissa(MATVEC, V, BATCHES * 10, full_matvec=full, **ARGUMENTS, **options)
        true = flatten(V) - HESSIAN @ flatten(solution.value) - 0.1 * flatten(solution.value)
        torch.testing.assert_close(solution.residual_norm, true.norm(), rtol=1e-12, atol=0)


def test_a_lucky_batch_does_not_pass_for_convergence_on_all_the_data():
    # One batch for ever: its own residual goes to 0, that on all the data does not.
    batches, full = [BATCHES[0]] * 2000, partial(MATVEC, PROBLEM.batch)
    fooled = solve_lissa(MATVEC, V, batches, rtol=1e-3, **ARGUMENTS)
    honest = solve_lissa(MATVEC, V, batches, rtol=1e-3, full_matvec=full, **ARGUMENTS)
    assert Status(int(fooled.status)) is Status.CONVERGED
    assert Status(int(honest.status)) is Status.FINISHED
    assert honest.relative_residual > 0.1


def test_convergence_on_all_the_data_is_found_at_a_power_of_two():
    full = partial(MATVEC, PROBLEM.batch)
    solution = solve_lissa(MATVEC, V, [PROBLEM.batch] * 5000, rtol=1e-3, full_matvec=full, **ARGUMENTS)
    assert Status(int(solution.status)) is Status.CONVERGED
    assert int(solution.steps) in (64, 128, 256, 512, 1024)
    assert solution.relative_residual <= 1e-3


def test_trace_holds_the_batch_residual_of_every_step():
    solution = solve_lissa(MATVEC, V, BATCHES, **ARGUMENTS)
    h, expected = flatten(V), []
    for H in HESSIANS:
        residual = flatten(V) - (H @ h + 0.1 * h) / 6.0
        h = h + residual
        expected.append(residual.norm())
    torch.testing.assert_close(solution.residual_trace, torch.stack(expected), rtol=1e-12, atol=0)
    torch.testing.assert_close(solution.residual_norm, expected[-1], rtol=1e-12, atol=0)


def test_average_is_the_mean_of_the_iterates_after_a_step():
    order = [t % 4 for t in range(11)]
    iterates = [naive_lissa([HESSIANS[t] for t in order[:k]], flatten(V), 0.1, 6.0) for k in range(12)]
    for after in (0, 4, 10):
        solution = solve_lissa(MATVEC, V, [BATCHES[t] for t in order], average_after=after, **ARGUMENTS)
        expected = torch.stack(iterates[after + 1 :]).mean(0)
        assert relative_error(flatten(solution.value), expected) <= 1e-13
    late = solve_lissa(MATVEC, V, [BATCHES[t] for t in order], average_after=11, **ARGUMENTS)
    assert relative_error(flatten(late.value), iterates[11]) <= 1e-13


def test_averaging_lowers_the_noise_floor():
    g = torch.Generator().manual_seed(0)
    batches = [take(PROBLEM.batch, torch.randint(12, (2,), generator=g)) for _ in range(3000)]
    last = solve_lissa(MATVEC, V, batches, **ARGUMENTS)
    mean = solve_lissa(MATVEC, V, batches, average_after=1000, **ARGUMENTS)
    expected = dense_solve(0.1)
    # 2000 iterates with a memory of scale / damping = 60 steps hold some 30 independent ones: about 1/4 of the noise.
    assert relative_error(flatten(mean.value), expected) < relative_error(flatten(last.value), expected) / 2


def test_repeats_are_independent_runs_and_their_spread_is_the_standard_error():
    g = torch.Generator().manual_seed(0)
    batches = [take(PROBLEM.batch, torch.randint(12, (3,), generator=g)) for _ in range(4 * 50)]
    solution = solve_lissa(MATVEC, V, iter(batches), steps=50, repeats=4, **ARGUMENTS)
    runs = [flatten(solve_lissa(MATVEC, V, batches[50 * r : 50 * r + 50], **ARGUMENTS).value) for r in range(4)]
    for r in range(4):
        assert torch.equal(flatten(tree.map(lambda t, r=r: t[r], solution.samples)), runs[r])
    assert relative_error(flatten(solution.value), torch.stack(runs).mean(0)) <= 1e-14
    expected = (torch.stack(runs).var(0).sum() / 4).sqrt()
    torch.testing.assert_close(solution.standard_error, expected)
    assert solution.steps == 200
    assert solution.residual_trace.shape == (200,)
    assert solve_lissa(MATVEC, V, BATCHES, **ARGUMENTS).standard_error.isnan()


@pytest.mark.parametrize("average_after", [None, 5, 40])
@pytest.mark.parametrize("cut", [1, 16, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saved_and_continued_it_is_bit_identical(tmp_path, average_after, cut, dtype):
    problem = softmax_regression(batch_size=12, dtype=dtype)
    matvec = partial(hvp, problem.loss_fn, problem.params)
    solve = partial(
        solve_lissa, matvec, random_vector(problem), average_after=average_after, rtol=1e-9, damping=0.1, scale=6.0
    )

    def batches(skip: int = 0):
        indices = index_stream(12, 5, generator=torch.Generator().manual_seed(3))
        return (take(problem.batch, index) for index in itertools.islice(indices, skip, None))

    whole = solve(batches(), steps=60)
    first = solve(batches(), steps=cut)
    torch.save(first.state, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=False)
    rest = solve(batches(skip=int(first.steps)), steps=60 - cut, state=state)
    assert all(torch.equal(rest.value[k], whole.value[k]) for k in whole.value)
    assert torch.equal(rest.residual_norm, whole.residual_norm)
    assert rest.steps == whole.steps == 60
    assert torch.equal(torch.cat([first.residual_trace, rest.residual_trace]), whole.residual_trace)


def test_many_right_hand_sides_are_continued_bit_identically():
    vs = random_vectors(PROBLEM, 3)

    def solve(v, batches, state=None):
        return solve_lissa(MATVEC, v, batches, state=state, average_after=3, **ARGUMENTS)

    whole = torch.vmap(lambda v: solve(v, BATCHES * 3))(vs)
    first = torch.vmap(lambda v: solve(v, (BATCHES * 3)[:5]))(vs)
    rest = torch.vmap(lambda v, state: solve(v, (BATCHES * 3)[5:], state))(vs, first.state)
    assert all(torch.equal(rest.value[k], whole.value[k]) for k in whole.value)


def test_the_scale_that_the_error_proposes_works():
    largest = torch.linalg.eigvalsh(HESSIAN).max().item()
    with pytest.raises(SolverError) as caught:
        solve_lissa(MATVEC, V, [PROBLEM.batch] * 500, damping=0.1, scale=(largest + 0.1) / 20)
    proposed = float(re.search(r"try scale=([\d.e+-]+)", str(caught.value)).group(1))
    solution = solve_lissa(MATVEC, V, [PROBLEM.batch] * 500, damping=0.1, scale=proposed)
    assert Status(int(solution.status)) is Status.FINISHED
    assert solution.relative_residual < 0.1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"repeats": 2}, "needs steps"),
        ({"repeats": 0}, "must be >= 1"),
        ({"average_after": -1}, "must be >= 0"),
        ({"repeats": 3, "steps": 2}, "ended after 0 of 2 steps"),
    ],
)
def test_bad_repeats_and_averages_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        solve_lissa(MATVEC, V, BATCHES, **ARGUMENTS, **change)
