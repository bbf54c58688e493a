from functools import partial

import pytest
import torch

from benchmarks.accuracy import zoo
from lissa import ggnvp, tree
from tests.problems import ZOO, random_vector


@pytest.mark.parametrize("name", ["MLP", "decoder, SDPA, tied embeddings", "frozen part, unused parameter, buffer"])
def test_factors_are_those_of_the_gauss_newton_product(name):
    problem = ZOO[name](batch_size=4)
    curvature = zoo.Curvature(zoo.factors(problem))
    v = random_vector(problem)
    matvec = partial(ggnvp, problem.output_fn, problem.output_loss_fn, problem.params, problem.batch)

    product = curvature(torch.arange(4), {"flat": tree.flatten(v)})["flat"]

    expected = tree.flatten(matvec(v))
    assert (product - expected).norm() <= 1e-10 * expected.norm()


def test_the_grid_finds_the_fewest_passes_and_counts_the_look():
    # One example's curvature for all: batches of one are full batches, and 128 steps of them are one pass.
    factor = torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64)).expand(zoo.N, 2, 2)
    found = zoo.grid(zoo.Curvature(factor), {"flat": torch.ones(2, dtype=torch.float64)}, 1.0, 4.0, 5.0, seed=0)

    assert found["batch_size"] == 1
    assert found["passes"] == found["steps"] / zoo.N + 1
    assert found["steps"] < 30
