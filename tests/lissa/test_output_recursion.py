"""LiSSA in the outputs of layers against the same steps taken one by one on all entries."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import lissa
from lissa import (
    LastLayer,
    Status,
    expansion_of_graph,
    solve_lissa_in_outputs,
    solve_lissa_last_layer,
    solve_lissa_stacked,
)
from lissa.output_recursion import numbers_in_outputs
from lissa.stacked import StackedHvp
from lissa.stretches import most_rows
from tests import problems
from tests.problems import random_vectors

ROWS, K, D, M = 7, 4, 5, 3

STABLE = {"damping": 300.0, "scale": 1000.0}
"""Definite and stable, whatever the losses."""


def losses_after(z):
    """Rows differ, and the Hessian is indefinite."""
    rates = torch.arange(1.0, len(z) + 1, dtype=z.dtype)
    return (z.sin() * z.roll(1, 1)).sum(1) * rates + z.square().prod(1)


@pytest.fixture(params=[("W", "b"), ("W", None), (None, "b")], ids=["both", "weight", "bias"])
def case(request):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    whole = {"W": normal(M, D), "b": normal(M)}
    inputs = normal(ROWS, D)
    z = F.linear(inputs, whole["W"], whole["b"]).requires_grad_()
    batch = expansion_of_graph(losses_after(z), z, inputs)
    vectors = {name: normal(K, *whole[name].shape) for name in request.param if name is not None}
    return LastLayer(*request.param), batch, vectors


def some_batches(batch, steps, *, ragged):
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(1, 5, (steps,), generator=generator).tolist() if ragged else [4] * steps
    return [lissa.take(batch, torch.randint(ROWS, (size,), generator=generator)) for size in sizes]


@pytest.mark.parametrize("at_once", [None, 3])
@pytest.mark.parametrize("damping", [0.0, 0.3, 24.0, 30.0])
@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("steps", [0, 1, 2, 16, 31, 150])
def test_the_solution_is_that_of_steps_taken_one_by_one(case, steps, ragged, damping, at_once):
    layer, batch, vectors = case
    batches = some_batches(batch, steps, ragged=ragged)
    settings = {"damping": damping, "scale": 50.0, "throw": False}
    got = solve_lissa_last_layer(layer, vectors, batches, **settings, at_once=at_once)
    expected = solve_lissa_stacked(lambda b, v: layer(b, v), vectors, batches, **settings)
    assert got.status.tolist() == expected.status.tolist()
    assert got.steps.tolist() == expected.steps.tolist()
    torch.testing.assert_close(got.value, expected.value, rtol=1e-9, atol=1e-10, equal_nan=True)
    # Norms are differences of inner products, so they lose half the digits where they are small.
    close = {"rtol": 1e-6, "atol": 1e-7 * float(vectors[next(iter(vectors))].norm()), "equal_nan": True}
    torch.testing.assert_close(got.residual_norm, expected.residual_norm, **close)
    common = min(got.residual_trace.shape[1], expected.residual_trace.shape[1])
    seen = ~expected.residual_trace[:, :common].isnan()
    torch.testing.assert_close(got.residual_trace[:, :common][seen], expected.residual_trace[:, :common][seen], **close)


def test_the_residual_of_every_step_is_told(case):
    layer, batch, vectors = case
    solution = solve_lissa_last_layer(layer, vectors, some_batches(batch, 31, ragged=True), **STABLE)
    assert solution.residual_trace.shape == (K, 31)
    assert solution.residual_trace.isfinite().all()
    assert torch.equal(solution.residual_trace[:, -1], solution.residual_norm)


def test_what_is_passed_in_stays_as_it_is(case):
    layer, batch, vectors = case
    given = lissa.tree.map(torch.clone, vectors)
    batches = some_batches(batch, 150, ragged=False)
    copies = [lissa.Expansion(*(t.clone() for t in each)) for each in batches]
    solve_lissa_last_layer(layer, vectors, batches, **STABLE)
    solve_lissa_last_layer(layer, vectors, [], **STABLE)
    torch.testing.assert_close(vectors, given, rtol=0, atol=0)
    torch.testing.assert_close(batches, copies, rtol=0, atol=0)


def test_vectors_laid_out_otherwise_and_with_a_graph_are_taken(case):
    layer, batch, vectors = case
    strange = {k: t.transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for k, t in vectors.items()}
    batches = some_batches(batch, 10, ragged=False)
    got = solve_lissa_last_layer(layer, strange, batches, **STABLE).value
    expected = solve_lissa_last_layer(layer, vectors, batches, **STABLE).value
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("smaller", [3.0, 1e4, 1e12])
def test_a_scale_that_is_too_small_diverges_and_does_not_end_as_not_finite(case, smaller, dtype):
    layer, batch, vectors = case
    batch = lissa.Expansion(*(t.to(dtype) for t in batch))
    vectors = {k: t.to(dtype) for k, t in vectors.items()}
    H = torch.linalg.eigvalsh(batch.hessians).abs().max() / smaller  # a step then multiplies by up to `smaller`
    settings = {"scale": float(H), "throw": False}
    got = solve_lissa_last_layer(layer, vectors, [batch] * 64, **settings)
    expected = solve_lissa_stacked(lambda b, v: layer(b, v), vectors, [batch] * 64, **settings)
    assert got.status.tolist() == expected.status.tolist()
    if smaller < 1e12:
        assert (got.status == Status.DIVERGED).all()
    assert all(t.isnan().all() for t in got.value.values())
    with pytest.raises(lissa.SolverError, match="solve_lissa_last_layer"):
        solve_lissa_last_layer(layer, vectors, [batch] * 64, scale=float(H))


def test_one_right_hand_side_that_is_not_finite_does_not_spoil_the_others(case):
    layer, batch, vectors = case
    broken = {k: t.clone() for k, t in vectors.items()}
    for t in broken.values():
        t[1] = torch.nan
    batches = some_batches(batch, 31, ragged=False)
    got = solve_lissa_last_layer(layer, broken, batches, **STABLE, throw=False)
    assert got.status.tolist() == [Status.FINISHED, Status.NOT_FINITE, Status.FINISHED, Status.FINISHED]
    right = solve_lissa_last_layer(layer, vectors, batches, **STABLE)
    for k, t in got.value.items():
        torch.testing.assert_close(t[[0, 2, 3]], right.value[k][[0, 2, 3]], rtol=1e-9, atol=1e-10)


def test_a_batch_of_more_rows_than_a_stretch_makes_no_square_of_them(case, monkeypatch):
    layer, batch, vectors = case
    large = lissa.take(batch, torch.arange(most_rows(D) + 1) % ROWS)
    grams = []
    monkeypatch.setattr(LastLayer, "gram", lambda *_: grams.append(1))
    solution = solve_lissa_last_layer(layer, vectors, [large] * 3, **STABLE)
    assert not grams
    monkeypatch.undo()
    expected = solve_lissa_stacked(lambda b, v: layer(b, v), vectors, [large] * 3, **STABLE)
    torch.testing.assert_close(solution.value, expected.value, rtol=1e-9, atol=1e-10)


def test_arguments_are_checked(case):
    layer, batch, vectors = case
    for wrong in ({"scale": 0.0}, {"damping": -1.0}, {"at_once": 0}):
        with pytest.raises(ValueError, match="solve_lissa_last_layer"):
            solve_lissa_last_layer(layer, vectors, [batch], **wrong)


# ---------------------------------------------------------------------- through any graph

ZOO = {
    "mlp": problems.mlp,
    "embedding": partial(problems.bag_of_words, kind=nn.Embedding),
    "packed lstm": partial(problems.recurrent, kind=nn.LSTM, packed=True),
    "tied weights": problems.tied_weights,
    "transformer": problems.transformer,
}


def rows_of(problem, steps, *, most=3):
    """Batches of some of the problem's examples, each with a size of its own."""
    generator = torch.Generator().manual_seed(1)
    n = len(pytree.tree_leaves(problem.batch)[0])
    counts = torch.randint(1, most + 1, (steps,), generator=generator).tolist()
    return [lissa.take(problem.batch, torch.randperm(n, generator=generator)[:count]) for count in counts]


@pytest.mark.parametrize(
    "settings",
    [{}, {"at_once": 2}, {"steps_at_once": 5}, {"damping": 0.0}, {"damping": 700.0}],
    ids=["plain", "in parts", "short stretches", "no damping", "strong damping"],
)
@pytest.mark.parametrize("steps", [1, 37])
@pytest.mark.parametrize("model", ZOO)
def test_in_outputs_the_solution_is_that_of_all_entries(model, steps, settings):
    problem = ZOO[model](seed=0)
    vectors, batches = random_vectors(problem, 3), rows_of(problem, steps)
    common = {"damping": 10.0, "scale": 1000.0} | {k: v for k, v in settings.items() if k == "damping"}
    own = {k: v for k, v in settings.items() if k != "damping"}
    got = solve_lissa_in_outputs(problem.loss_fn, problem.params, vectors, batches, **common, **own)
    expected = solve_lissa_stacked(StackedHvp(problem.loss_fn, problem.params), vectors, batches, **common)
    assert got.status.tolist() == expected.status.tolist() == [Status.FINISHED] * 3
    assert got.steps.tolist() == expected.steps.tolist()
    torch.testing.assert_close(got.value, expected.value, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(got.residual_norm, expected.residual_norm, rtol=1e-6, atol=1e-6)
    assert got.residual_trace.shape == (3, steps)


def wide(seed=0):
    """A layer of data whose losses differ in curvature, in float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12, D, generator=generator, dtype=torch.float64)
    params = {"W": torch.randn(M, D, generator=generator, dtype=torch.float64)}
    vectors = {"W": torch.randn(K, M, D, generator=generator, dtype=torch.float64)}
    return params, vectors, [x[i : i + 4] for i in (0, 4, 8)]


def soft(params, x):
    return F.linear(x, params["W"]).logsumexp(1).mean()


def steep(params, x):
    return F.linear(x, params["W"]).square().sum(1).mean()


def test_it_solves_the_system():
    params, vectors, (x, *_) = wide()
    got = solve_lissa_in_outputs(soft, params, vectors, [x] * 2000, damping=0.5, scale=4.0)
    H = torch.func.hessian(lambda w: soft({"W": w}, x))(params["W"]).reshape(M * D, M * D)
    A = H + 0.5 * torch.eye(M * D, dtype=torch.float64)
    expected = torch.linalg.solve(A, vectors["W"].flatten(1).mT).mT
    torch.testing.assert_close(got.value["W"].flatten(1), expected, rtol=1e-9, atol=1e-10)
    assert float(got.relative_residual.max()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("smaller", [3.0, 1e4])
def test_in_outputs_a_scale_that_is_too_small_diverges(smaller, dtype):
    params, vectors, batches = (pytree.tree_map(lambda t: t.to(dtype), each) for each in wide())
    settings = {"scale": 1 / smaller, "throw": False}

    got = solve_lissa_in_outputs(steep, params, vectors, batches * 20, **settings)
    expected = solve_lissa_stacked(StackedHvp(steep, params), vectors, batches * 20, **settings)
    assert got.status.tolist() == expected.status.tolist() == [Status.DIVERGED] * K
    assert got.value["W"].isnan().all()
    with pytest.raises(lissa.SolverError, match=r"solve_lissa_in_outputs.*DIVERGED"):
        solve_lissa_in_outputs(steep, params, vectors, batches * 20, scale=1 / smaller)


@pytest.mark.parametrize("factor", [1e3, 1e10])
def test_in_outputs_steps_that_grow_beyond_all_numbers_between_two_looks_diverge(factor):
    params, vectors, batches = wide()
    batches = [x * 1e-3 for x in batches] * 2 + [x * factor for x in batches] * 4
    got = solve_lissa_in_outputs(steep, params, vectors, batches, throw=False)
    assert got.status.tolist() == [Status.DIVERGED] * K


@pytest.mark.parametrize("place", [0, 5, 40])
def test_in_outputs_a_batch_that_is_not_finite_is_not_taken_for_divergence(place):
    params, vectors, batches = wide()
    batches = batches * 20
    batches[place] = torch.full_like(batches[place], torch.nan)
    got = solve_lissa_in_outputs(soft, params, vectors, batches, damping=0.1, scale=20.0, throw=False)
    assert got.status.tolist() == [Status.NOT_FINITE] * K
    assert got.value["W"].isnan().all()


def test_in_outputs_one_right_hand_side_that_is_not_finite_does_not_spoil_the_others():
    params, vectors, batches = wide()
    right = solve_lissa_in_outputs(soft, params, vectors, batches * 5, damping=0.1, scale=20.0)
    vectors["W"][1, 0, 0] = torch.inf
    got = solve_lissa_in_outputs(soft, params, vectors, batches * 5, damping=0.1, scale=20.0, throw=False)
    assert got.status.tolist() == [Status.FINISHED, Status.NOT_FINITE, *[Status.FINISHED] * (K - 2)]
    others = [k for k in range(K) if k != 1]
    torch.testing.assert_close(got.value["W"][others], right.value["W"][others], rtol=1e-12, atol=1e-13)


def test_in_outputs_what_is_passed_in_stays_as_it_is_and_nothing_is_recorded():
    params, vectors, batches = wide()
    params = {k: p.requires_grad_() for k, p in params.items()}
    before = pytree.tree_map(lambda t: t.detach().clone(), (params, vectors, batches))
    with torch.no_grad():
        got = solve_lissa_in_outputs(soft, params, vectors, batches * 15, damping=0.1, scale=20.0)
    assert not got.value["W"].requires_grad
    assert all(p.grad is None for p in params.values())
    torch.testing.assert_close(pytree.tree_map(Tensor.detach, (params, vectors, batches)), before, rtol=0, atol=0)


def test_batches_are_not_asked_for_once_all_have_failed():
    params, vectors, batches = wide()
    asked = []

    def endless():
        for i in range(10_000):
            asked.append(i)
            yield batches[i % 3]

    solve_lissa_in_outputs(steep, params, vectors, endless(), scale=0.1, throw=False)
    assert len(asked) < 100


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scale": 0.0}, "scale"),
        ({"damping": -1.0}, "damping"),
        ({"at_once": 0}, "at_once"),
        ({"steps_at_once": 0}, "steps_at_once"),
        ({"v": {"W": torch.ones(M, D, dtype=torch.float64)}}, "v"),
        ({"v": {"U": torch.ones(K, M, D, dtype=torch.float64)}}, "keys"),
        ({"loss_fn": lambda p, x: F.linear(x, p["W"]).sum(1)}, "scalar"),
        ({"loss_fn": lambda p, x: F.linear(x, p["W"]).sum() * torch.rand(())}, "deterministic"),
    ],
)
def test_in_outputs_arguments_are_checked(wrong, message):
    params, vectors, batches = wide()
    with pytest.raises(ValueError, match=rf"solve_lissa_in_outputs.*{message}"):
        solve_lissa_in_outputs(**({"loss_fn": soft, "params": params, "v": vectors, "batches": batches} | wrong))


def test_numbers_in_outputs_are_those_of_input_layers():
    problem = problems.bag_of_words(seed=0, kind=nn.Embedding)
    table = max(problem.params.values(), key=Tensor.numel)
    assert numbers_in_outputs(problem.loss_fn, problem.params, problem.batch) == table.numel()
    tied = problems.tied_weights(seed=0)
    assert numbers_in_outputs(tied.loss_fn, tied.params, tied.batch) == 0
