"""K stacked vectors at once compute what `torch.vmap` of the one-vector functions does."""

from functools import partial

import pytest
import torch
from torch import nn

import lissa
from lissa import Status, hvp, solve_lissa, solve_lissa_stacked, stacked_hvp, tree
from lissa.recursion import CHECK_EVERY
from lissa.stacked import Chunks, StackedHvp, norms, vdots
from tests import problems
from tests.problems import random_vectors

ZOO = {
    "softmax regression": problems.softmax_regression,
    "mlp": problems.mlp,
    "cnn": problems.cnn,
    "transformer": problems.transformer,
    "sparse embedding": partial(problems.bag_of_words, kind=nn.Embedding),
    "packed lstm": partial(problems.recurrent, kind=nn.LSTM, packed=True),
}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("model", ZOO)
def test_products_are_those_of_one_vector_at_a_time(model, count):
    problem = ZOO[model](seed=0)
    vectors = random_vectors(problem, count)
    got = stacked_hvp(problem.loss_fn, problem.params, problem.batch, vectors)
    for i in range(count):
        one = tree.map(lambda t, i=i: t[i], vectors)
        expected = hvp(problem.loss_fn, problem.params, problem.batch, one)
        for key in expected:
            # The same sums in another order: rounding of float64 in a few hundred terms.
            torch.testing.assert_close(got[key][i], expected[key], rtol=1e-9, atol=1e-11)


def test_a_loss_that_branches_on_data():
    def loss_fn(params, x):
        return (params["w"] ** 3 * x).sum() if x.sum().item() > 0 else params["w"].sum()

    params, vectors = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.eye(2)}
    assert stacked_hvp(loss_fn, params, torch.ones(2), vectors)["w"].tolist() == [[6.0, 0.0], [0.0, 12.0]]
    assert stacked_hvp(loss_fn, params, -torch.ones(2), vectors)["w"].tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_an_unused_and_a_linear_parameter_have_no_curvature():
    params = {"w": torch.ones(2), "linear": torch.ones(()), "unused": torch.ones(3)}
    vectors = tree.map(lambda p: torch.ones(2, *p.shape), params)
    got = stacked_hvp(lambda p, b: (p["w"] ** 2).sum() + p["linear"], params, None, vectors)
    assert got["w"].tolist() == [[2.0, 2.0]] * 2
    assert not got["linear"].any()
    assert not got["unused"].any()


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [(lambda p, b: p["w"], "scalar"), (lambda p, b: (p["w"] * torch.rand(2)).sum(), "deterministic")],
)
def test_a_loss_that_is_none_is_refused(loss_fn, message):
    with pytest.raises(ValueError, match=rf"`stacked_hvp.*{message}"):
        stacked_hvp(loss_fn, {"w": torch.ones(2)}, None, {"w": torch.ones(1, 2)})


def diagonal(batch, v):
    return tree.map(lambda t: batch * t, v)


def solved_both_ways(v, batches, **settings):
    one = torch.vmap(lambda v: solve_lissa(diagonal, v, batches, throw=False, **settings))(v)
    return solve_lissa_stacked(diagonal, v, batches, throw=False, **settings), one


@pytest.mark.parametrize("steps", [0, 1, CHECK_EVERY, 3 * CHECK_EVERY + 1])
def test_the_recursion_is_that_of_one_right_hand_side(steps):
    generator = torch.Generator().manual_seed(0)
    v = {"x": torch.randn(3, 5, generator=generator, dtype=torch.float64)}
    batches = [torch.rand(5, generator=generator, dtype=torch.float64) for _ in range(steps)]
    got, expected = solved_both_ways(v, batches, damping=0.1, scale=2.0)
    torch.testing.assert_close(got.value, expected.value, rtol=1e-12, atol=0)
    torch.testing.assert_close(got.residual_norm, expected.residual_norm, rtol=1e-9, atol=0)
    looks = [t for t in range(1, steps + 1) if t in (1, 4, steps) or t % CHECK_EVERY == 0]
    assert (~got.residual_trace.isnan()).nonzero()[:, 1].unique().tolist() == [t - 1 for t in looks]
    seen = [t - 1 for t in looks]
    torch.testing.assert_close(got.residual_trace[:, seen], expected.residual_trace[:, seen], rtol=1e-9, atol=0)
    assert got.steps.tolist() == expected.steps.tolist() == [steps] * 3
    assert got.status.tolist() == expected.status.tolist()


def test_each_right_hand_side_fails_for_itself():
    v = {"x": torch.tensor([[1.0, 0.0], [0.0, 1.0], [torch.nan, 1.0]])}
    got, expected = solved_both_ways(v, [torch.tensor([1.0, 100.0])] * 40, damping=0.0, scale=2.0)
    statuses = [Status.FINISHED, Status.DIVERGED, Status.NOT_FINITE]
    assert got.status.tolist() == expected.status.tolist() == statuses
    assert got.value["x"][0].tolist() == pytest.approx([1.0, 0.0], rel=1e-6)
    assert got.value["x"][1:].isnan().all()
    with pytest.raises(lissa.SolverError, match="solve_lissa_stacked"):
        solve_lissa_stacked(diagonal, v, [torch.ones(2)], scale=2.0)


@pytest.mark.parametrize("matvec", [lambda _, v: v, lambda _, v: tree.map(lambda t: t.flip(0).flip(0), v)])
@pytest.mark.parametrize(("damping", "scale"), [(0.0, 1.5), (0.1, 2.0), (3.0, 4.0), (4.0, 4.0)])
def test_the_iterate_is_apart_from_what_goes_in_and_comes_out(matvec, damping, scale):
    v = {"x": torch.ones(2, 3, dtype=torch.float64)}
    got = solve_lissa_stacked(matvec, v, [None] * 3, damping=damping, scale=scale)
    factor = 1 - (1 + damping) / scale  # h <- 1 + factor h from h = 1, as H = I
    assert got.value["x"].flatten().tolist() == pytest.approx([(1 + factor + factor**2 + factor**3) / scale] * 6)
    # The residual of the last step is 1 - (1 - factor) h_2.
    assert got.residual_norm.tolist() == pytest.approx([3**0.5 * abs(factor**3)] * 2, rel=1e-12, abs=1e-14)
    assert v["x"].eq(1).all()


@pytest.mark.parametrize(("name", "value"), [("scale", 0.0), ("damping", -1.0)])
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"`solve_lissa_stacked\({name}="):
        solve_lissa_stacked(diagonal, {"x": torch.ones(1, 2)}, [], **{name: value})


def test_norms_are_over_all_but_the_first_dimension():
    x = {"w": torch.tensor([[[3.0, 0.0]], [[0.0, 0.0]]]), "b": torch.tensor([4.0, 2.0])}
    assert norms(x).tolist() == [5.0, 2.0]


@pytest.mark.parametrize("together", [1, 5, 16])
@pytest.mark.parametrize("steps", [0, 1, 7, 16, 33])
def test_products_a_few_vectors_at_a_time_build_one_graph_a_step(steps, together):
    problem = problems.mlp(seed=0)
    vectors, built = random_vectors(problem, 5), []

    def loss_fn(params, batch):
        built.append(1)
        return problem.loss_fn(params, batch)

    settings = {"damping": 1.0, "scale": 100.0}
    batches = [problem.batch] * steps
    whole = solve_lissa_stacked(partial(stacked_hvp, problem.loss_fn, problem.params), vectors, batches, **settings)
    matvec = StackedHvp(loss_fn, problem.params)
    parts = solve_lissa_stacked(matvec, vectors, batches, **settings, chunks=Chunks(2, together))
    assert len(built) == steps
    # The same sums in another order: rounding of float64, which stable steps do not amplify.
    torch.testing.assert_close(parts.value, whole.value, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(parts.residual_trace, whole.residual_trace, rtol=1e-9, atol=1e-11, equal_nan=True)
    assert parts.steps.tolist() == whole.steps.tolist()


def test_a_chunk_of_no_vectors_is_refused():
    with pytest.raises(ValueError, match=r"solve_lissa_stacked\(chunks.size="):
        solve_lissa_stacked(lambda b, v: v, {"x": torch.ones(1, 2)}, [None], chunks=Chunks(0))


def test_inner_products_and_norms_of_stacked_vectors():
    x = {"w": torch.randn(3, 2, 4, dtype=torch.float64), "b": torch.randn(3, dtype=torch.float64)}
    y = tree.map(torch.randn_like, x)
    torch.testing.assert_close(vdots(x, y), torch.vmap(tree.vdot)(x, y))
    torch.testing.assert_close(norms(x), torch.vmap(tree.norm)(x))
