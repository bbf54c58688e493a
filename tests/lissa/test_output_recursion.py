"""LiSSA in the outputs of a layer against the same steps taken one by one."""

import pytest
import torch
import torch.nn.functional as F

import lissa
from lissa import LastLayer, Status, expansion_of_graph, solve_lissa_last_layer, solve_lissa_stacked
from lissa.output_recursion import most_rows

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
