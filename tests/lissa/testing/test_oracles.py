import pytest
import torch

from lissa import tree
from lissa.testing import make_problem
from lissa.testing.oracles import _products, _scores, _Stack, dense_curvature, example_gradients
from lissa.testing.problems import CURVATURES, MODELS

SHAPE = {"features": 3, "outputs": 3, "width": 2, "batch_size": 4}


def stack_of(problem):
    """Two versions of a problem, at `params` with `v` and at `u` with `u` and other inputs, alone and as one stack."""
    other = {k: t if k == "mask" or not t.is_floating_point() else t / 2 + 0.25 for k, t in problem.batch.items()}
    versions = [problem, problem._replace(params=problem.u, batch=other, v=problem.u)]

    def stacked(*each):
        return {k: torch.stack([x[k] for x in each]) for k in each[0]}

    batch = {k: torch.stack([t, other[k]]) if other[k] is not t else t for k, t in problem.batch.items()}
    weights = torch.full((2, problem.batch_size), 1 / problem.batch_size, dtype=torch.float64)
    return versions, _Stack(stacked(problem.params, problem.u), batch, weights, stacked(problem.v, problem.u))


@pytest.mark.parametrize("positions", [0, 2])
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("model", MODELS)
def test_a_stack_of_products_is_each_by_itself(model, curvature, positions):
    """Against the dense matrix of each version, by another road; sums of a hundred products below 100."""
    problem = make_problem(
        model=model, loss="poisson", curvature=curvature, positions=positions, linear_term=True, unused=True, **SHAPE
    )
    versions, stack = stack_of(problem)
    products = _products(problem, stack)
    for i, version in enumerate(versions):
        expected = dense_curvature(version) @ tree.flatten(version.v)
        got = tree.flatten({k: t[i] for k, t in products.items()})
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("model", MODELS)
def test_a_stack_of_scores_is_each_by_itself(model):
    problem = make_problem(model=model, loss="cross-entropy", **SHAPE)
    versions, stack = stack_of(problem)
    scores = _scores(problem, stack)["scores"]
    for i, version in enumerate(versions):
        expected = example_gradients(version) @ tree.flatten(version.v)
        torch.testing.assert_close(scores[i], expected, rtol=1e-11, atol=1e-11)
