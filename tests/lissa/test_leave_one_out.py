"""Scores without an example's own curvature: dense algebra, exact refits of least squares, and real refits."""

from functools import partial

import pytest
import torch

from lissa import Settings, choose_settings, hvp, influence_scores, leave_one_out_scores, solve_tuned, take, tree
from tests.oracles import dense_gradients, dense_hessian, flatten, relative_error, unflatten
from tests.problems import random_vector, random_vectors, softmax_regression

DAMPING = 0.05


def generator():
    return torch.Generator().manual_seed(0)


def scores(problem, v, chosen, **more):
    matvec = partial(hvp, problem.loss_fn, problem.params)
    more = {"damping": DAMPING, "generator": generator(), "rtol": 1e-9, **more}
    return leave_one_out_scores(matvec, problem.example_loss_fn, problem.params, v, problem.batch, chosen, **more)


def test_scores_are_those_of_the_dense_hessian_without_the_example():
    problem = softmax_regression(batch_size=12)
    vs = random_vectors(problem, 3)
    chosen = [11, 0, 4]
    H = dense_hessian(problem.loss_fn, problem.params, problem.batch)
    eye = torch.eye(len(H), dtype=H.dtype)
    G = dense_gradients(problem.example_loss_fn, problem.params, problem.batch)
    rows = torch.stack([flatten(tree.map(lambda t: t[k], vs)) for k in range(3)])  # noqa: B023
    columns = []
    for i in chosen:
        H_i = dense_hessian(problem.loss_fn, problem.params, take(problem.batch, slice(i, i + 1)))
        columns.append(rows @ torch.linalg.solve(H - H_i / 12 + DAMPING * eye, G[i]))
    expected = torch.stack(columns, 1)

    got = scores(problem, vs, chosen)
    one = scores(problem, tree.map(lambda t: t[1], vs), torch.tensor(chosen))

    # |x - x*| <= rtol |v| / damping, some 1e-8 of |x*| at this condition.
    assert relative_error(got, expected) <= 1e-7
    assert got.shape == (3, 3)
    assert one.shape == (3,)
    assert relative_error(one, expected[1]) <= 1e-7


def test_refits_of_least_squares_are_met_exactly():
    """There a Newton step is the refit, and the test loss is the first prediction itself, which is linear."""
    g = generator()
    x, y = torch.randn(8, 3, generator=g, dtype=torch.float64), torch.randn(8, generator=g, dtype=torch.float64)

    def minimum(x, y):
        A = x.T @ x / 8 + DAMPING * torch.eye(3, dtype=x.dtype)
        return torch.linalg.solve(A, x.T @ y / 8)

    params = {"w": minimum(x, y)}
    got = leave_one_out_scores(
        lambda batch, v: {"w": batch[0].T @ (batch[0] @ v["w"]) / len(batch[1])},
        lambda params, batch: (batch[0] @ params["w"] - batch[1]).square() / 2,
        params,
        {"w": x[0]},
        (x, y),
        range(8),
        damping=DAMPING,
        generator=g,
        rtol=1e-10,
    )
    keep = [[j for j in range(8) if j != i] for i in range(8)]
    changes = torch.stack([x[0] @ (minimum(x[rows], y[rows]) - params["w"]) for rows in keep])
    assert relative_error(got / 8, changes) <= 1e-8


def test_refits_are_met_better_than_by_first_order():
    """Softmax regression at its minimum, the leverage of the largest example some tenths."""
    problem = softmax_regression(batch_size=20)

    def minimum(batch, weight):
        """Of `weight` times the mean loss plus the penalty, by Newton's method from zero, which is globally convex."""
        flat = torch.zeros_like(flatten(problem.params))
        for _ in range(50):
            params = unflatten(flat, problem.params)
            gradient = flatten(torch.func.grad(problem.loss_fn)(params, batch)) * weight + DAMPING * flat
            H = dense_hessian(problem.loss_fn, params, batch) * weight
            flat = flat - torch.linalg.solve(H + DAMPING * torch.eye(len(H), dtype=H.dtype), gradient)
        assert gradient.norm() <= 1e-12
        return unflatten(flat, problem.params)

    params = minimum(problem.batch, 1.0)
    problem = problem._replace(params=params)
    test = take(softmax_regression(seed=1, batch_size=1).batch, slice(0, 1))
    v = torch.func.grad(problem.loss_fn)(params, test)
    changes = []
    for i in range(20):
        rows = torch.tensor([j for j in range(20) if j != i])
        refitted = minimum(take(problem.batch, rows), 19 / 20)
        # The linear part of the change of the test loss: what both orders predict.
        changes.append(tree.vdot(v, tree.sub(refitted, params)))
    changes = torch.stack(changes)
    matvec = partial(hvp, problem.loss_fn, params)
    ihvp = solve_tuned(matvec, v, problem.batch, damping=DAMPING, generator=generator(), rtol=1e-9).value
    first = influence_scores(problem.example_loss_fn, params, ihvp, problem.batch) / 20
    corrected = scores(problem, v, range(20)) / 20

    assert relative_error(corrected, changes) <= relative_error(first, changes) / 2


def test_settings_serve_all_solves():
    problem = softmax_regression(batch_size=12)
    v = random_vector(problem)
    matvec = partial(hvp, problem.loss_fn, problem.params)
    settings = choose_settings(matvec, v, problem.batch, damping=1.0, generator=generator(), method="cg")
    assert isinstance(settings, Settings)
    assert relative_error(scores(problem, v, [3], settings=settings), scores(problem, v, [3])) <= 1e-7


@pytest.mark.parametrize(
    ("chosen", "n", "message"),
    [
        ([12], 12, r"places in \[0, 12\), got \[12\]"),
        ([-1], 12, r"got \[-1\]"),
        ([], 12, "got none"),
        ([0], 1, "at least 2"),
    ],
)
def test_places_that_are_not_there_are_named(chosen, n, message):
    problem = softmax_regression(batch_size=n)
    with pytest.raises(ValueError, match=message):
        scores(problem, random_vector(problem), chosen)


def test_a_test_gradient_of_other_shape_is_refused():
    problem = softmax_regression(batch_size=12)
    with pytest.raises(ValueError, match=r"leave_one_out_scores\(test_gradient"):
        scores(problem, tree.map(lambda t: t[:1], problem.params), [0])
