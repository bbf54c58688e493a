import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lissa import tree
from lissa.testing import (
    batch_streams,
    indefinite_operators,
    make_operator,
    make_problem,
    make_samples,
    params_dicts,
    problems,
    spd_operators,
    vectors_like,
)
from lissa.testing.oracles import dense_curvature, example_gradients
from lissa.testing.problems import LOSSES, MODELS
from tests.oracles import dense_gradients, dense_hessian

quick = settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))
CODE = {
    "torch": torch,
    "make_problem": make_problem,
    "make_operator": make_operator,
    "make_samples": make_samples,
}


def drawn(strategy, n=150):
    cases = []

    @given(strategy)
    @settings(max_examples=n, deadline=None, database=None, derandomize=True)
    def draw(case):
        cases.append(case)

    draw()
    return cases


@given(problems())
@quick
def test_a_problem_is_rebuilt_from_its_repr(problem):
    again = eval(repr(problem), CODE)
    for one, other in ((problem.params, again.params), (problem.batch, again.batch), (problem.v, again.v)):
        assert all(torch.equal(one[k], other[k]) for k in one)


@given(problems(dtypes=(torch.float64,), min_batch_size=1))
@quick
def test_the_losses_of_a_problem_agree_in_every_form(problem):
    """Mean of the example losses = loss of the outputs; two sums of at most 18 terms, each far below 100."""
    p, b = problem.params, problem.batch
    mean = problem.example_loss_fn(p, b).mean()
    torch.testing.assert_close(problem.loss_fn(p, b), mean, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(problem.output_loss_fn(problem.output_fn(p, b), b), mean, rtol=1e-13, atol=1e-13)


@given(problems(dtypes=(torch.float64,), min_batch_size=1))
@quick
def test_the_kits_dense_matrices_are_those_of_torch_func(problem):
    """Two independent roads to the same matrix; entries are sums of a few hundred products below 100."""
    hessian = dense_hessian(problem.loss_fn, problem.params, problem.batch)
    torch.testing.assert_close(dense_curvature(problem), hessian, rtol=1e-11, atol=1e-11)
    gradients = dense_gradients(problem.example_loss_fn, problem.params, problem.batch)
    torch.testing.assert_close(example_gradients(problem), gradients, rtol=1e-11, atol=1e-11)
    fisher = dense_curvature(problem._replace(curvature="fisher"))
    torch.testing.assert_close(fisher, gradients.mT @ gradients / len(gradients), rtol=1e-11, atol=1e-11)


def test_problems_reach_every_kind_and_edge():
    cases = drawn(problems())
    assert {c.recipe["model"] for c in cases if "model" in c.recipe} | {"linear"} == set(MODELS)
    assert {c.recipe.get("loss", "squared") for c in cases} == set(LOSSES)
    assert {c.dtype for c in cases} == {torch.float32, torch.float64}
    assert {0, 1} < {c.batch_size for c in cases}
    assert any("unused" in c.params for c in cases)
    assert any("slope" in c.params for c in cases)
    assert any("mask" in c.batch for c in cases)
    assert any(list(c.params) == ["w"] and c.params["w"].shape == () for c in cases)


def test_a_batch_of_none_has_a_loss_of_zero():
    problem = make_problem(model="mlp", loss="poisson", batch_size=0)
    assert problem.loss_fn(problem.params, problem.batch) == 0


@given(spd_operators())
@quick
def test_operators_have_the_eigenvalues_they_say(operator):
    """Rounding of a symmetric matrix moves eigenvalues by at most its own size: P u largest, and P <= 6 here."""
    again = eval(repr(operator), CODE)
    assert torch.equal(again.matrix, operator.matrix)
    got = torch.linalg.eigvalsh(operator.matrix.double())
    expected = torch.tensor(sorted(operator.eigenvalues), dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=0, atol=100 * torch.finfo(operator.matrix.dtype).eps)
    assert min(operator.eigenvalues) > 0


def test_indefinite_operators_stay_away_from_zero_and_have_both_signs():
    cases = drawn(indefinite_operators(), 60)
    assert all(case.smallest >= 0.25 for case in cases)
    assert any(min(case.eigenvalues) < 0 < max(case.eigenvalues) for case in cases)


@given(batch_streams())
@quick
def test_the_batches_of_a_stream_average_to_the_data(samples):
    assert torch.equal(eval(repr(samples), CODE).data, samples.data)
    parts = samples.data.split(samples.batch_size)
    mean = torch.stack([samples.curvature(rows) for rows in parts]).mean(0)
    torch.testing.assert_close(mean, samples.curvature(samples.data))


@given(st.data())
@quick
def test_vectors_are_like_their_params(data):
    params = data.draw(params_dicts())
    v = data.draw(vectors_like(params))
    assert v.keys() == params.keys()
    assert all(v[k].shape == p.shape and v[k].dtype == p.dtype for k, p in params.items())
    assert tree.norm(v).isfinite()
