"""With nothing set but the damping, the asked residual is reached; what cannot be solved is refused in words."""

from functools import partial

import pytest
import torch

from lissa import SolverError, Status, choose_settings, ggnvp, hvp, solve_tuned, solve_tuned_stacked, tree
from lissa.sampling import take
from tests.oracles import dense_hessian, flatten, relative_error
from tests.problems import mlp, random_vector, random_vectors, softmax_regression, tied_weights


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def residual(matvec, problem, x, v, damping):
    product = matvec(problem.batch, x)
    return float(tree.norm(tree.map(lambda v, p, x: v - p - damping * x, v, product, x)) / tree.norm(v))


@pytest.mark.parametrize("n", [8, 64])
@pytest.mark.parametrize("method", ["auto", "lissa", "variance-reduced"])
@pytest.mark.parametrize("build", [softmax_regression, mlp, tied_weights])
def test_reaches_the_asked_residual_with_nothing_set_but_the_damping(build, method, n):
    for seed in range(2):
        problem = build(seed=seed, batch_size=n)
        matvec = partial(ggnvp, problem.output_fn, problem.output_loss_fn, problem.params)
        v = random_vector(problem, seed)
        g = generator(seed)
        settings = choose_settings(matvec, v, problem.batch, damping=0.3, generator=g, method=method)
        solution = solve_tuned(matvec, v, problem.batch, damping=0.3, generator=g, settings=settings)
        assert Status(int(solution.status)) is Status.CONVERGED
        true = residual(matvec, problem, solution.value, v, 0.3)
        # Full batches report the residual one step before the last, which is larger.
        assert true <= 1e-2
        if settings.method != "plain":
            assert abs(true - float(solution.relative_residual)) <= 1e-9


def test_one_call_is_the_dense_solution():
    problem = softmax_regression(batch_size=64)
    v = random_vector(problem)
    matvec = partial(hvp, problem.loss_fn, problem.params)
    solution = solve_tuned(matvec, v, problem.batch, damping=0.1, generator=generator(), rtol=1e-6)
    H = dense_hessian(problem.loss_fn, problem.params, problem.batch)
    expected = torch.linalg.solve(H + 0.1 * torch.eye(len(H), dtype=H.dtype), flatten(v))
    # |x - x*| <= rtol |v| / damping, and |x*| >= |v| / (lambda_max + damping): the condition number is below 20.
    assert relative_error(flatten(solution.value), expected) <= 2e-5


def test_many_right_hand_sides_share_settings_and_batches():
    problem = softmax_regression(batch_size=64)
    matvec = partial(hvp, problem.loss_fn, problem.params)
    vs = random_vectors(problem, 3)
    settings = choose_settings(
        matvec, problem.params, problem.batch, damping=0.2, generator=generator(), method="variance-reduced"
    )

    def solve(v):
        return solve_tuned(matvec, v, problem.batch, damping=0.2, generator=generator(1), settings=settings)

    together = torch.vmap(solve)(vs)
    for i in range(3):
        alone = solve(tree.map(lambda t, i=i: t[i], vs))
        assert relative_error(flatten(tree.map(lambda t, i=i: t[i], together.value)), flatten(alone.value)) <= 1e-10
    # The one call works under vmap, too: the spectrum is estimated once.
    one_call = torch.vmap(lambda v: solve_tuned(matvec, v, problem.batch, damping=0.2, generator=generator(1)))(vs)
    assert (one_call.relative_residual <= 1e-2).all()


@pytest.mark.parametrize("method", ["auto", "block-cg", "cg", "variance-reduced"])
def test_stacked_right_hand_sides_reach_the_residual_by_every_method(method):
    problem = softmax_regression(batch_size=64)
    matvec = partial(hvp, problem.loss_fn, problem.params)
    vs, g = random_vectors(problem, 5), generator()
    settings = choose_settings(
        matvec, problem.params, problem.batch, damping=0.2, generator=g, method=method, vectors=5
    )
    found = solve_tuned_stacked(matvec, vs, problem.batch, damping=0.2, generator=g, settings=settings)
    for i in range(5):
        x, v = (tree.map(lambda t, i=i: t[i], stack) for stack in (found.value, vs))
        assert residual(matvec, problem, x, v, 0.2) <= 1e-2


def test_stacked_right_hand_sides_share_products_with_nothing_set_but_the_damping():
    problem = softmax_regression(batch_size=64)
    vs, products = random_vectors(problem, 10), 0

    def matvec(batch, v):
        nonlocal products
        products += 1
        return hvp(problem.loss_fn, problem.params, batch, v)

    together = solve_tuned_stacked(matvec, vs, problem.batch, damping=0.01, generator=generator())
    assert (together.relative_residual <= 1e-2).all()
    # Only block CG can find all in the P / 10 steps after which the space of 10 right-hand sides is everything.
    assert int(together.steps.max()) <= -(-tree.numel(problem.params) // 10)
    # vmap calls the product of a step once for all.
    assert products <= 20 + 2 * 32 + 1 + int(together.steps.max())


def test_stacked_settings_for_another_problem_are_refused():
    problem = softmax_regression(batch_size=16)
    matvec = partial(hvp, problem.loss_fn, problem.params)
    vs = random_vectors(problem, 3)
    settings = choose_settings(matvec, problem.params, problem.batch, damping=0.2, generator=generator(), vectors=3)
    with pytest.raises(ValueError, match=r"solve_tuned_stacked.*are for damping=0.2.*got damping=0.3"):
        solve_tuned_stacked(matvec, vs, problem.batch, damping=0.3, generator=generator(), settings=settings)


def test_data_may_be_indices_of_anything():
    problem = softmax_regression(batch_size=64)
    v = random_vector(problem)

    def matvec(index, v):
        return hvp(problem.loss_fn, problem.params, take(problem.batch, index), v)

    by_index = solve_tuned(matvec, v, torch.arange(64), damping=0.2, generator=generator())
    by_rows = solve_tuned(
        partial(hvp, problem.loss_fn, problem.params), v, problem.batch, damping=0.2, generator=generator()
    )
    assert all(torch.equal(by_index.value[k], by_rows.value[k]) for k in v)


def test_a_scale_far_too_small_is_rescued():
    problem = softmax_regression(batch_size=64)
    matvec = partial(hvp, problem.loss_fn, problem.params)
    v = random_vector(problem)
    settings = choose_settings(matvec, v, problem.batch, damping=0.2, generator=generator(), method="variance-reduced")
    wrong = settings._replace(scale=settings.scale / 8)
    solution = solve_tuned(matvec, v, problem.batch, damping=0.2, generator=generator(), settings=wrong)
    assert Status(int(solution.status)) is Status.CONVERGED
    assert residual(matvec, problem, solution.value, v, 0.2) <= 1e-2


def test_a_few_examples_with_most_of_the_curvature_need_no_rescue():
    problem = softmax_regression(batch_size=512)
    x, y = problem.batch
    data = (torch.where(torch.arange(512)[:, None] % 64 == 0, 12 * x, x), y)
    matvec = partial(hvp, problem.loss_fn, problem.params)
    v = random_vector(problem)
    g = generator()
    settings = choose_settings(matvec, v, data, damping=0.2, generator=g, method="variance-reduced")
    solution = solve_tuned(matvec, v, data, damping=0.2, generator=g, settings=settings)
    assert Status(int(solution.status)) is Status.CONVERGED
    # The residual on all the data fell in every epoch, and no epoch was begun anew.
    assert (solution.residual_trace.diff() < 0).all()
    assert int(solution.steps) == len(solution.residual_trace) * settings.steps


def test_repeats_are_independent_solves_whose_mean_is_the_value():
    problem = softmax_regression(batch_size=64)
    matvec = partial(hvp, problem.loss_fn, problem.params)
    v, g = random_vector(problem), generator()
    settings = choose_settings(matvec, v, problem.batch, damping=0.2, generator=g, method="variance-reduced", repeats=3)
    solution = solve_tuned(matvec, v, problem.batch, damping=0.2, generator=g, settings=settings)
    assert settings.repeats == 3
    for k in v:
        assert solution.samples[k].shape == (3, *v[k].shape)
        assert torch.allclose(solution.samples[k].mean(0), solution.value[k], rtol=0, atol=1e-14)
        assert not torch.equal(solution.samples[k][0], solution.samples[k][1])
    for r in range(3):
        assert residual(matvec, problem, tree.map(lambda t, r=r: t[r], solution.samples), v, 0.2) <= 1e-2
    assert abs(residual(matvec, problem, solution.value, v, 0.2) - float(solution.relative_residual)) <= 1e-9
    assert float(solution.standard_error) > 0


def test_same_seed_same_numbers():
    problem = softmax_regression(batch_size=64)
    matvec = partial(hvp, problem.loss_fn, problem.params)
    before = torch.get_rng_state()
    first, second = (
        solve_tuned(matvec, random_vector(problem), problem.batch, damping=0.2, generator=generator(5))
        for _ in range(2)
    )
    assert all(torch.equal(first.value[k], second.value[k]) for k in first.value)
    assert torch.equal(before, torch.get_rng_state())


def test_negative_curvature_is_refused_with_the_remedy():
    problem = softmax_regression(batch_size=32)

    def matvec(batch, v):
        return tree.map(lambda p, v: p - v, hvp(problem.loss_fn, problem.params, batch, v), v)

    with pytest.raises(ValueError, match=r"smallest eigenvalue found is -1.*Use damping > 1.*ggnvp"):
        solve_tuned(matvec, random_vector(problem), problem.batch, damping=0.1, generator=generator())


def test_not_a_number_in_one_example_is_refused_or_ends_in_not_finite():
    problem = softmax_regression(batch_size=64)
    matvec = partial(hvp, problem.loss_fn, problem.params)
    v = random_vector(problem)
    settings = choose_settings(matvec, v, problem.batch, damping=0.2, generator=generator(), method="variance-reduced")
    x, y = problem.batch
    x = x.clone()
    x[17, 2] = torch.nan
    with pytest.raises(ValueError, match="finite products"):
        solve_tuned(matvec, v, (x, y), damping=0.2, generator=generator())
    with pytest.raises(SolverError, match=r"NOT_FINITE.*NaN in the data"):
        solve_tuned(matvec, v, (x, y), damping=0.2, generator=generator(), settings=settings)


def test_settings_for_another_problem_are_refused():
    problem = softmax_regression(batch_size=16)
    matvec = partial(hvp, problem.loss_fn, problem.params)
    v = random_vector(problem)
    settings = choose_settings(matvec, v, problem.batch, damping=0.2, generator=generator())
    with pytest.raises(ValueError, match=r"are for damping=0.2.*got damping=0.3"):
        solve_tuned(matvec, v, problem.batch, damping=0.3, generator=generator(), settings=settings)
