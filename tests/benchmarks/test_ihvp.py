"""What the tools of the benchmark are given is what is claimed, and its runs are judged rightly."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from benchmarks.simple_influence import ihvp, ihvp_peers
from benchmarks.simple_influence.problem import AIM, Problem, with_answers
from lissa import ggnvp, tree
from tests.oracles import dense_hessian


@pytest.fixture(scope="module")
def problem() -> Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(80, 5, dtype=torch.float64), torch.randint(3, (80,))
    return with_answers("MLP, Gauss-Newton", model, (x[:60], y[:60]), (x[60:], y[60:]), 0.1)


def dense_gauss_newton(problem: Problem) -> torch.Tensor:
    def column(unit):
        return tree.flatten(problem.matvec(problem.train, problem.unflatten(unit)))

    return torch.vmap(column)(torch.eye(problem.rhs.shape[1], dtype=torch.float64))


def test_the_answers_are_the_dense_solutions(problem):
    matrix = dense_gauss_newton(problem)
    expected = torch.linalg.solve(matrix + 0.1 * torch.eye(len(matrix), dtype=matrix.dtype), problem.rhs.mT).mT
    # A residual of 1e-5 leaves an error of kappa times that, and kappa is below 30 here.
    assert torch.linalg.matrix_norm(problem.right - expected) <= 3e-4 * torch.linalg.matrix_norm(expected)
    assert problem.error(problem.right) == 0
    assert problem.error(1.5 * problem.right) == pytest.approx(0.5)
    assert problem.error(torch.full_like(problem.right, torch.nan)) == torch.inf


def test_the_hessian_of_the_linearised_model_is_the_gauss_newton_matrix(problem):
    model = ihvp_peers.Linearised(problem.model)
    params = {k: p.detach() for k, p in model.named_parameters()}
    assert torch.equal(model(problem.train[0]), problem.model(problem.train[0]))

    def loss(params, batch):
        return F.cross_entropy(functional_call(model, params, (batch[0],)), batch[1])

    gap = dense_hessian(loss, params, problem.train) - dense_gauss_newton(problem)
    assert gap.abs().max() <= 1e-12  # rounding of float64 in sums of 60 terms of size 1


def test_a_recursion_stops_at_the_aim_or_is_given_up(problem):
    def product(batch, h):
        v = dict(zip(problem.params, h, strict=True))
        return list(ggnvp(problem.output_fn, lambda z, b: F.cross_entropy(z, b[1]), problem.params, batch, v).values())

    _, error, steps = ihvp_peers.one_recursion(problem, product, 60, 1.0, 0, most=10.0)
    assert error <= AIM
    # After t steps the slowest mode has (1 - damping / scale)^(t + 1) = 0.9^(t + 1) of its error, AIM at t = 43; looks
    # are 3 % apart.
    assert steps <= 45
    _, error, steps = ihvp_peers.one_recursion(problem, product, 60, 1.0, 0, most=0.0)
    assert steps == 1
    assert error > AIM


def test_the_table_names_the_best_run_that_reached_the_aim():
    rows = [
        {"problem": "p", "tool": ihvp.OURS, "reached": True, "peak_bytes": 10**6,
         "best": {"setting": "by itself", "warm_up": 1.0, "seconds": 2.0, "error": 5e-3, "timed": 100}},
        {"problem": "p", "tool": "slow", "reached": False, "peak_bytes": 0,
         "best": {"setting": "s", "warm_up": 0.0, "seconds": 50.0, "error": 0.3, "timed": 3}},
        {"problem": "p", "tool": "missing", "failure": "ImportError: none"},
    ]  # fmt: skip
    ours, slow, missing = ihvp.table(rows).splitlines()[2:]
    assert "| 2.00 | 1.0 | 5.0e-03 | 1.00 s | 1 MB |" in ours
    assert "| 50.00 | 25.0 | 3.0e-01, not reached |" in slow
    assert "ImportError: none" in missing
