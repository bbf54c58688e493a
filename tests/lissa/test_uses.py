"""Scores by what parameters are multiplied with, against gradients of one example after the other."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lissa import influence, parts, tree
from lissa import uses as uses_
from lissa.influence import scores_of_row_losses
from lissa.lstm import DirectionalLSTM
from lissa.uses import uses
from tests.oracles import flatten
from tests.problems import ZOO, random_vectors

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
"""Of float64: sums of a few hundred terms of about one, in another order."""


def expected(losses, params, vectors):
    """`grad_i . x_k`, a backward pass for each example."""
    leaves = tree.leaves(params)
    gradients = [
        torch.cat([g.flatten() for g in torch.autograd.grad(one, [*leaves.values()], materialize_grads=True)])
        for one in (losses(leaves)[i] for i in range(len(losses(leaves))))
    ]
    K = len(next(iter(vectors.values())))
    return torch.stack([torch.stack(gradients) @ flatten(tree.map(lambda t, k=k: t[k], vectors)) for k in range(K)])


def found(losses, params, vectors):
    """The same by `uses`, or None."""
    leaves = tree.leaves(params)
    with DirectionalLSTM():
        values = losses(leaves)
    entering = uses(values)
    if entering is None:
        return None
    gradients = torch.autograd.grad(values.sum(), entering.rows, retain_graph=True)
    return entering.scores(gradients, values, leaves, vectors)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stacked(params, count):
    return {key: normal(count, *p.shape, seed=i) for i, (key, p) in enumerate(params.items())}


KNOWN = {
    "softmax regression",
    "MLP",
    "LSTM, padded",
    "LSTM, packed",
    "GRU, padded",
    "GRU, packed",
    "data-dependent branch",
    "in-place operations",
    "frozen part, unused parameter, buffer",
}


@pytest.mark.parametrize("name", [name for name in ZOO if "sparse" not in name])
@pytest.mark.parametrize("count", [1, 9])
def test_scores_of_the_zoo_where_all_uses_are_known(name, count):
    problem = ZOO[name]()

    def losses(params):
        return problem.example_loss_fn(params, problem.batch)

    vectors = random_vectors(problem, count)
    scores = found(losses, problem.params, vectors)
    assert (scores is not None) == (name in KNOWN)
    if scores is not None:
        assert not scores.requires_grad
        torch.testing.assert_close(scores, expected(losses, problem.params, vectors), **CLOSE)


X, LONG = normal(6, 4, seed=7), normal(6, 5, 4, seed=8)
WORDS = torch.tensor([[0, 3, 3], [1, 2, 0], [4, 4, 4], [2, 0, 1], [3, 1, 0], [0, 0, 2]])


def squares(z):
    return z.tanh().flatten(1).square().sum(1)


def of_last_layer(p):
    return squares(X @ p["w"] + p["b"])


CASES = {
    "matrix and bias": of_last_layer,
    "factors": lambda p: squares(torch.add(torch.addmm(p["b"], X, p["w"], alpha=2, beta=3), p["b"], alpha=5)),
    "sequences": lambda p: squares(F.linear(LONG, p["w"].T, p["b"])),
    "two layers": lambda p: squares(F.linear(LONG, p["w"].T, p["b"]).tanh() @ p["u"]),
    "a matrix twice": lambda p: squares((X @ p["v"]).tanh() @ p["w"] + (X[:, :3] * 2) @ p["w"][:3]),
    "computed from parameters": lambda p: squares(F.linear(X, torch.cat([p["w"].T, p["w"].T * 2]), p["b"].repeat(2))),
    "lookups": lambda p: squares(F.embedding(WORDS, p["table"]).sum(1) @ p["w"]),
    "padded lookups": lambda p: squares(F.embedding(WORDS, p["table"], padding_idx=0) @ p["w"]),
    "rows out of order": lambda p: squares((X[torch.tensor([3, 0, 5, 1, 4, 2])] @ p["w"])[torch.arange(5, -1, -1)]),
    "rows that matter to none": lambda p: squares(F.relu(LONG @ p["w"] - 3) @ p["u"]),
    "an example that nothing matters to": lambda p: of_last_layer(p) * torch.tensor([1, 1, 0, 1, 1, 1]),
    "a parameter that nothing uses": lambda p: squares(X @ p["w"]),
}


def parameters():
    shapes = {"w": (4, 3), "b": (3,), "v": (4, 4), "u": (3, 4), "table": (5, 4)}
    return {key: normal(*shape, seed=i) for i, (key, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("count", [1, 3, 9])
def test_scores_of_each_way_to_enter(case, count):
    params = parameters()
    vectors = stacked(params, count)
    scores = found(CASES[case], params, vectors)
    assert scores is not None
    torch.testing.assert_close(scores, expected(CASES[case], params, vectors), **CLOSE)


UNKNOWN = {
    "a factor of each input": lambda p: squares(X * p["v"][0]),
    "a norm's factor": lambda p: squares(F.layer_norm(X, (4,), p["v"][0])),
    "lookups by frequency": lambda p: squares(F.embedding(WORDS, p["table"], scale_grad_by_freq=True).sum(1)),
    "a bias for each place": lambda p: squares(LONG @ p["w"] + F.pad(p["w"], (0, 0, 0, 1))),
    "parameters alone": lambda p: p["b"].square(),
    "a product of two": lambda p: squares((X @ p["v"]) * (X @ p["w"]).sum(1, keepdim=True) * p["b"][0]),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_is_not_known_is_told(case):
    assert uses(UNKNOWN[case](tree.leaves(parameters()))) is None


SHARED = {
    "a table of places": lambda p: squares(F.embedding(torch.arange(4), p["table"]) + X.unsqueeze(1)),
    "a mean over examples": lambda p: squares((X @ p["w"]) - (X @ p["w"]).mean(0)),
    "one row for two": lambda p: squares((X[:3] @ p["w"]).repeat(2, 1)),
    "a number for each example": lambda p: squares(X @ p["w"]) + torch.cat([p["b"], p["b"]]),
}


@pytest.mark.parametrize("case", SHARED)
def test_rows_of_several_examples_are_seen(case):
    """Of such rows the two gradients differ by more than a factor."""
    params = parameters()
    assert uses(SHARED[case](tree.leaves(params))) is not None
    assert found(SHARED[case], params, stacked(params, 3)) is None


@settings(max_examples=30)
@given(
    examples=st.integers(1, 7), rows=st.integers(1, 4), inputs=st.integers(1, 3), count=st.integers(1, 12),
    at_once=st.integers(1, 40), seed=st.integers(0, 99),
)  # fmt: skip
def test_sums_are_those_of_dense_gradients_however_they_are_cut(examples, rows, inputs, count, at_once, seed):
    x = normal(examples, rows, inputs, seed=seed)
    there = torch.rand(examples, rows, 1, generator=torch.Generator().manual_seed(seed)) < 0.7  # some have no rows
    params = {"w": normal(inputs, 2, seed=seed + 1), "b": normal(2, seed=seed + 2)}
    vectors = stacked(params, count)

    def losses(params):
        return squares((x @ params["w"] + params["b"]) * there)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(parts.NUMBERS_AT_ONCE, "cpu", at_once)
        patch.setitem(uses_.GRADIENTS_AT_ONCE, "cpu", at_once)
        patch.setattr(uses_, "OUTPUTS_AT_ONCE", at_once)
        scores = found(losses, params, vectors)
    torch.testing.assert_close(scores, expected(losses, params, vectors), **CLOSE)


def test_thousands_of_examples_are_told_apart_in_float32():
    x, w, v = (normal(*shape, seed=i).float() for i, shape in enumerate([(4000, 3), (3, 2), (2, 3, 2)]))
    scores = found(lambda p: squares(x @ p["w"]), {"w": w}, {"w": v})
    gradients = x.unsqueeze(2) * (2 * (t := (x @ w).tanh()) * (1 - t.square())).unsqueeze(1)
    torch.testing.assert_close(scores, torch.einsum("nij,kij->kn", gradients, v), rtol=1e-4, atol=1e-5)


def test_gradients_that_are_no_numbers_belong_to_no_example():
    x = torch.cat([X[:5], torch.full((1, 4), torch.inf, dtype=torch.float64)])
    params = parameters()
    assert found(lambda p: squares(x @ p["w"]), params, stacked(params, 2)) is None


@pytest.mark.parametrize("products", [0, 1, 2])
def test_row_losses_are_scored_by_uses_where_that_is_possible(products, monkeypatch):
    params, pulled = parameters(), []
    vectors, plain = stacked(params, 5), influence.pulled_back

    def pulled_back(outputs, leaves, cotangents, **kwargs):
        pulled.append(len(cotangents[0]))
        return plain(outputs, leaves, cotangents, **kwargs)

    monkeypatch.setattr(influence, "pulled_back", pulled_back)
    for losses, all_pulled in (
        (of_last_layer, max(products, 1)),
        (UNKNOWN["a norm's factor"], 5),
        (SHARED["one row for two"], 5),
    ):
        pulled.clear()
        scored = scores_of_row_losses(losses, params, vectors, products=products, by_uses=True)
        assert sum(pulled) == all_pulled
        by_pulling = scores_of_row_losses(losses, params, vectors, products=products)
        torch.testing.assert_close(scored, by_pulling, **CLOSE)


@pytest.mark.parametrize("products", [0, 1])
def test_a_row_that_all_share_is_not_taken_for_that_of_the_one_in_the_middle(products):
    """All of an odd number of examples say the same of a penalty: the mean of their numbers is a whole number."""
    params, ones = {"w": normal(4, 1, seed=1)}, torch.ones(1, 4, dtype=torch.float64)
    vectors, x = stacked(params, 5), normal(7, 4, seed=2)

    def losses(p):
        return squares(x @ p["w"]) + squares(ones @ p["w"])

    scored = scores_of_row_losses(losses, params, vectors, products=products, by_uses=True)
    torch.testing.assert_close(scored.scores, expected(losses, params, vectors), **CLOSE)
    assert not torch.allclose(found(losses, params, vectors), scored.scores)  # which is what the check is for


def test_more_examples_than_the_precision_tells_apart_are_not_numbered():
    x, w = normal(9000, 2).float(), normal(2, 1).float()
    for examples, told in ((8000, True), (9000, False)):
        scores = found(lambda p, n=examples: squares(x[:n] @ p["w"]), {"w": w}, {"w": w.unsqueeze(0)})
        assert (scores is not None) == told
    assert found(lambda p: squares(x[:2].bfloat16() @ p["w"]), {"w": w.bfloat16()}, {"w": w[None].bfloat16()}) is None


def test_few_vectors_are_not_scored_by_uses(monkeypatch):
    monkeypatch.setattr(influence, "uses", None)
    params = parameters()
    scored = scores_of_row_losses(of_last_layer, params, stacked(params, 4), products=2, by_uses=True)
    torch.testing.assert_close(scored.scores, expected(of_last_layer, params, stacked(params, 4)), **CLOSE)
