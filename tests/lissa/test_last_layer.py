"""Closed forms for a linear layer against autodiff of the same losses."""

import pytest
import torch
import torch.nn.functional as F

import lissa
from lissa import LastLayer, expansion_of_graph, stacked_hvp, tree

B, K, D, M = 7, 4, 5, 3


def losses_after(z):
    """Not a cross-entropy: rows differ, and the Hessian is indefinite."""
    rates = torch.arange(1.0, len(z) + 1, dtype=z.dtype)
    return (z.sin() * z.roll(1, 1)).sum(1) * rates + z.square().prod(1)


@pytest.fixture(params=[("W", "b"), ("W", None), (None, "b")], ids=["both", "weight", "bias"])
def case(request):
    torch.manual_seed(0)
    whole = {"W": torch.randn(M, D, dtype=torch.float64), "b": torch.randn(M, dtype=torch.float64)}
    inputs = torch.randn(B, D, dtype=torch.float64)
    names = [name for name in request.param if name is not None]
    params = {name: whole[name] for name in names}

    def example_losses(params, a):
        return losses_after(F.linear(a, *{**whole, **params}.values()))

    z = F.linear(inputs, whole["W"], whole["b"]).requires_grad_()
    batch = expansion_of_graph(losses_after(z), z, inputs)
    vectors = {name: torch.randn(K, *p.shape, dtype=torch.float64) for name, p in params.items()}
    return LastLayer(*request.param), params, example_losses, batch, vectors


# Sums of at most B D M terms of size about 1, in float64.
CLOSE = {"rtol": 1e-11, "atol": 1e-12}


def test_products(case):
    layer, params, example_losses, batch, vectors = case
    expected = stacked_hvp(lambda p, a: example_losses(p, a).mean(), params, batch.inputs, vectors)
    torch.testing.assert_close(layer(batch, vectors), expected, **CLOSE)


def test_gradients_and_scores(case):
    layer, params, example_losses, batch, vectors = case
    expected = torch.func.jacrev(example_losses)(params, batch.inputs)
    torch.testing.assert_close(layer.gradients(batch), expected, **CLOSE)
    scores = torch.stack([sum((expected[k] * vectors[k][j]).flatten(1).sum(1) for k in params) for j in range(K)])
    torch.testing.assert_close(layer.scores(batch, vectors), scores, **CLOSE)


def test_the_expanded_loss_has_the_same_value_gradient_and_hessian(case):
    layer, params, example_losses, batch, vectors = case
    expanded = layer.loss_fn(params)

    def exact(params, batch):
        return example_losses(params, batch.inputs).mean()

    torch.testing.assert_close(expanded(params, batch), exact(params, batch), **CLOSE)
    torch.testing.assert_close(torch.func.grad(expanded)(params, batch), torch.func.grad(exact)(params, batch), **CLOSE)
    v = tree.map(lambda t: t[0], vectors)
    for mode in ("forward-over-reverse", "double-backward"):
        got = lissa.hvp(expanded, params, batch, v, mode=mode)
        torch.testing.assert_close(got, lissa.hvp(exact, params, batch, v), **CLOSE)


def test_a_loss_that_is_linear_in_the_outputs_has_no_hessian():
    z = torch.ones(2, 3, requires_grad=True)
    batch = expansion_of_graph(z @ torch.tensor([1.0, 2.0, 3.0]), z, torch.ones(2, 4))
    assert not batch.hessians.any()
    assert batch.gradients.tolist() == [[1.0, 2.0, 3.0]] * 2


def test_an_expansion_is_a_batch_whose_rows_can_be_taken(case):
    layer, _, _, batch, vectors = case
    some = lissa.take(batch, torch.tensor([4, 1]))
    torch.testing.assert_close(layer.scores(some, vectors), layer.scores(batch, vectors)[:, [4, 1]])


def test_a_run_is_continued(case):
    layer, _, _, batch, vectors = case
    batches = [lissa.take(batch, slice(i % 4, i % 4 + 3)) for i in range(40)]
    settings = {"damping": 100.0, "scale": 1000.0}  # definite and stable, whatever the losses
    whole = lissa.solve_lissa_stacked(layer, vectors, batches, **settings)
    part = lissa.solve_lissa_stacked(layer, vectors, batches[:13], **settings)
    rest = lissa.solve_lissa_stacked(layer, vectors, batches[13:], **settings, state=part.state)
    torch.testing.assert_close(rest.value, whole.value, rtol=1e-9, atol=1e-10)


def test_a_scale_that_is_too_small_diverges(case):
    layer, params, _, batch, vectors = case
    H = lissa.dense_matrix(lambda v: tree.map(lambda t: t[0], layer(batch, tree.map(lambda t: t[None], v))), params)
    scale = float(torch.linalg.eigvalsh(H).abs().max()) / 10
    solution = lissa.solve_lissa_stacked(layer, vectors, [batch] * 64, scale=scale, throw=False)
    assert (solution.status == lissa.Status.DIVERGED).all()
    assert all(t.isnan().all() for t in solution.value.values())


def test_a_loss_that_is_differentiable_once_is_refused():
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            ctx.save_for_backward(z)
            return z**3

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return 3 * ctx.saved_tensors[0] ** 2 * g

    z = torch.ones(2, 3, requires_grad=True)
    with pytest.raises(NotImplementedError, match="expansion_of_graph"):
        expansion_of_graph(Cube.apply(z).sum(1), z, torch.ones(2, 4))
