"""Which leaves a graph sees in products with constants, and products in their outputs against those of all entries."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lissa import stacked_hvp
from lissa.input_layers import ProductsInOutputs, input_layers
from lissa.kernels import twice_differentiable
from tests import problems

V, D, M, K = 6, 4, 3, 2


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X = normal(5, D)
SEQUENCES = normal(2, 5, D, seed=1)
WORDS = torch.tensor([[1, 2, 2], [0, 5, 1]])
PARAMS = {"w": normal(M, D), "b": normal(M), "table": normal(V, M), "other": normal(D, M, seed=2)}


def after(z):
    return (z.sin() * z.roll(1, -1)).sum() + z.pow(3).mean()


SEEN = {
    "a linear layer": ({"w"}, lambda p: after(F.linear(X, p["w"], p["b"]))),
    "without a bias": ({"w"}, lambda p: after(F.linear(X, p["w"]) + p["b"])),
    "of sequences": ({"w"}, lambda p: after(F.linear(SEQUENCES, p["w"], p["b"]))),
    "as a product with .T": ({"w"}, lambda p: after(X @ p["w"].T)),
    "as a product with .mT": ({"w"}, lambda p: after(X @ p["w"].mT + p["b"])),
    "as a product with dimensions swapped": ({"w"}, lambda p: after(X @ p["w"].transpose(1, 0))),
    "as a product with dimensions permuted": ({"w"}, lambda p: after(X @ p["w"].permute(-1, 0))),
    "an embedding": ({"table"}, lambda p: after(F.embedding(WORDS, p["table"]))),
    "one with padding": ({"table"}, lambda p: after(F.embedding(WORDS, p["table"], padding_idx=2))),
    "one with sparse gradients": ({"table"}, lambda p: after(F.embedding(WORDS, p["table"], sparse=True))),
    "both, one after another": (
        {"table"},  # what w is given depends on the table
        lambda p: after(F.linear(F.embedding(WORDS, p["table"]) @ p["other"].T, p["w"], p["b"])),
    ),
    "both, side by side": (
        {"table", "w"},
        lambda p: after(F.embedding(WORDS, p["table"]).mean(1) * F.linear(X[:2], p["w"], p["b"]).tanh()),
    ),
}

NOT_SEEN = {
    "called twice": lambda p: after(F.linear(X, p["w"]) * F.linear(2 * X, p["w"])),
    "looked up twice": lambda p: after(F.embedding(WORDS, p["table"]) * F.embedding(WORDS.flip(0), p["table"])),
    "tied": lambda p: after(F.linear(F.embedding(WORDS, p["table"]), p["table"])),
    "decayed too": lambda p: after(F.linear(X, p["w"])) + p["w"].pow(4).sum(),
    "scaled by frequency": lambda p: after(F.embedding(WORDS, p["table"], scale_grad_by_freq=True)),
    "given what depends on a parameter": lambda p: after(F.linear(X @ p["other"] @ p["w"], p["w"].detach())),
    "a product scaled in passing": lambda p: after(torch.addmm(p["b"], X, p["w"].t(), alpha=2.0)),
    "multiplied as it is": lambda p: after(X @ p["other"]),
    "multiplied as it is, after all": lambda p: after(X @ p["other"].permute(0, 1)),
    "swapped with itself": lambda p: after(X @ p["other"].transpose(0, -2)),
    "a table's entry": lambda p: after(p["table"][1]),
    "nothing of it": lambda p: p["b"].pow(3).sum(),
}


def leaves_of(params):
    return {k: p.clone().requires_grad_() for k, p in params.items()}


@pytest.mark.parametrize("case", SEEN)
def test_layers_of_constants_are_found(case):
    expected, loss_fn = SEEN[case]
    leaves = leaves_of(PARAMS)
    assert input_layers(loss_fn(leaves), leaves).keys() == expected


@pytest.mark.parametrize("case", NOT_SEEN)
def test_leaves_that_are_seen_in_another_way_are_not(case):
    leaves = leaves_of(PARAMS)
    assert input_layers(NOT_SEEN[case](leaves), leaves) == {}


def test_a_loss_without_a_graph_has_none():
    leaves = leaves_of(PARAMS)
    assert input_layers(torch.ones(()), leaves) == {}
    assert not any(t.any() for t in ProductsInOutputs(torch.ones(()), leaves, {})(stacked(PARAMS)).values())


def stacked(params, count=K):
    return {k: normal(count, *p.shape, seed=i) for i, (k, p) in enumerate(params.items())}


def outputs(layer, V_k):
    """`S V_k`, without what gets no gradient: shape `(rows, m)`."""
    if not layer.is_lookup:
        return layer.inputs @ V_k.T
    found = V_k[layer.inputs].flatten(0, -2)
    return found if layer.padding is None else found * (layer.inputs.flatten() != layer.padding).unsqueeze(1)


def pulled(layer, p, like):
    """`S^T p`, the derivative of `<p, S W>` in W."""
    W = torch.zeros_like(like).requires_grad_()
    return torch.autograd.grad((outputs(layer, W) * p).sum(), W)[0]


def products_through_outputs(loss_fn, params, batch, vectors):
    leaves = leaves_of(params)
    with twice_differentiable():
        loss = loss_fn(leaves, batch)
    layers = input_layers(loss, leaves)
    seen = {k: torch.stack([outputs(layers[k], v_k) for v_k in t]) if k in layers else t for k, t in vectors.items()}
    answers = ProductsInOutputs(loss, leaves, layers)(seen)
    return layers, {
        k: torch.stack([pulled(layers[k], p, params[k]) for p in t]) if k in layers else t for k, t in answers.items()
    }


@pytest.mark.parametrize("count", [1, K])
@pytest.mark.parametrize("case", SEEN)
def test_products_are_those_of_all_entries(case, count):
    _, loss_fn = SEEN[case]
    vectors = stacked(PARAMS, count)
    layers, got = products_through_outputs(lambda p, _: loss_fn(p), PARAMS, None, vectors)
    assert layers
    expected = stacked_hvp(lambda p, _: loss_fn(p), PARAMS, None, vectors)
    for key, product in expected.items():
        # The same sums in another order: rounding of float64 in a few dozen terms.
        torch.testing.assert_close(got[key], product, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "problem",
    [
        problems.mlp(seed=0),
        problems.bag_of_words(seed=0, kind=nn.Embedding),
        problems.recurrent(seed=0, kind=nn.LSTM, packed=True),
        problems.transformer(seed=0),
        problems.tied_weights(seed=0),
        problems.cnn(seed=0),
    ],
    ids=lambda problem: problem.name,
)
def test_products_of_whole_models_are_those_of_all_entries(problem):
    vectors = problems.random_vectors(problem, K)
    _, got = products_through_outputs(problem.loss_fn, problem.params, problem.batch, vectors)
    expected = stacked_hvp(problem.loss_fn, problem.params, problem.batch, vectors)
    for key, product in expected.items():
        torch.testing.assert_close(got[key], product, rtol=1e-9, atol=1e-11)


def test_what_curves_nothing_gets_zeros():
    leaves = leaves_of(PARAMS)
    loss = F.linear(X, leaves["w"], leaves["b"]).sum() + leaves["table"].pow(3).sum()
    products = ProductsInOutputs(loss, leaves, input_layers(loss, leaves))
    got = products(stacked(PARAMS) | {"w": normal(K, len(X), M)})
    assert [k for k, t in got.items() if t.any()] == ["table"]
    assert got["w"].shape == (K, len(X), M)


def test_an_operation_with_one_derivative_only_is_refused():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return g

    leaves = leaves_of(PARAMS)
    loss = after(Once.apply(F.linear(X, leaves["w"])))
    with pytest.raises(NotImplementedError, match="Once"):
        ProductsInOutputs(loss, leaves, input_layers(loss, leaves))
