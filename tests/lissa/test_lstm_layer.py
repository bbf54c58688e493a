"""A layer's derivatives are those of finite differences, twice, and many vectors' are those of each."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from lissa import lstm_layer, parts
from lissa.lstm_layer import Layer, rows, steps_of

SIZES = [[3, 2, 2, 1], [2], [1, 1]]
I, H = 2, 3  # noqa: E741


def layer(sizes, curved=True):
    steps = steps_of(sizes, torch.device("cpu"))
    return lambda x, h, c, W, b: Layer.apply(x, h, c, W, b, steps, lambda: curved)


def inputs(sizes):
    g = torch.Generator().manual_seed(0)
    shapes = (sum(sizes), I), (sizes[0], H), (sizes[0], H), (4 * H, I + H), (4 * H,)
    return [torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_first_and_second_derivatives(sizes):
    assert gradcheck(layer(sizes), inputs(sizes))
    assert gradgradcheck(layer(sizes), inputs(sizes))


def test_what_is_not_curved_has_second_derivatives_in_the_cotangents_alone():
    sizes, at = SIZES[0], inputs(SIZES[0])
    results = {curved: layer(sizes, curved)(*at) for curved in (True, False)}
    cotangents = [torch.randn_like(t).requires_grad_() for t in results[True]]
    found = []
    for result in results.values():
        gradients = torch.autograd.grad(result, at, cotangents, create_graph=True)
        found.append(torch.autograd.grad(gradients, [*cotangents, *at], gradients, allow_unused=True))
    for both in zip(*(one[:5] for one in found), strict=True):
        torch.testing.assert_close(*both)
    assert found[1][5:] == (None,) * 5


@pytest.mark.parametrize("asked", [(0,), (3,), (1, 2), (0, 1, 2, 3, 4)], ids=str)
def test_many_vectors_are_pulled_back_as_each_is(asked, monkeypatch):
    monkeypatch.setitem(parts.NUMBERS_AT_ONCE, "cpu", 100)  # two rows of four vectors, all of one
    at = inputs(SIZES[0])
    loss = sum(t.sin().sum() for t in layer(SIZES[0])(*at))
    gradients = torch.autograd.grad(loss, at, create_graph=True)
    chosen = [gradients[k] for k in asked]
    vectors = tuple(torch.randn(4, *g.shape, dtype=g.dtype) for g in chosen)

    def pulled(vector):
        return torch.autograd.grad(chosen, at, vector, retain_graph=True)

    for k, result in itertools.product(range(4), [torch.vmap(pulled)(vectors)]):
        for got, expected in zip(result, pulled([v[k] for v in vectors]), strict=True):
            torch.testing.assert_close(got[k], expected)


def test_many_vectors_take_one_sweep(monkeypatch):
    at, sweeps = inputs(SIZES[0]), []
    swept = lstm_layer._swept_forward
    monkeypatch.setattr(lstm_layer, "_swept_forward", lambda *args: sweeps.append(1) or swept(*args))
    gradients = torch.autograd.grad(layer(SIZES[0])(*at)[3].sum(), at, create_graph=True)
    torch.vmap(lambda v: torch.autograd.grad(gradients[3], at[3], v))(torch.ones(5, *at[3].shape, dtype=at[3].dtype))
    assert sweeps == [1]


def test_there_is_no_third_derivative():
    at = inputs(SIZES[0])
    gradients = torch.autograd.grad(layer(SIZES[0])(*at)[3].square().sum(), at, create_graph=True)
    second = torch.autograd.grad(gradients[3].square().sum(), at[3], create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="third derivative"):
        torch.autograd.grad(second.sum(), at[3])


def test_layers_at_many_places_are_refused():
    x, *others = inputs([2])
    gradients = torch.autograd.grad(layer([2])(x, *others)[3].sum(), x, create_graph=True)
    assert gradients[0].shape == x.shape
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.vmap(layer([2]), in_dims=(0, None, None, None, None))(x.unsqueeze(0), *others)


@pytest.mark.parametrize("transposed", [False, True])
def test_rows_and_their_transpose(transposed):
    index = torch.tensor([2, 0])
    x = torch.randn(2 if transposed else 4, 3, dtype=torch.float64, requires_grad=True)

    def taken(x):
        return lstm_layer._Rows.apply(x, index, 4, transposed)

    expected = torch.zeros(4, 3, dtype=torch.float64).index_copy(0, index, x) if transposed else x[index]
    assert torch.equal(taken(x), expected)
    assert gradcheck(taken, (x,))
    assert gradgradcheck(lambda x: taken(x.sin()), (x,))
    assert torch.equal(torch.vmap(taken, in_dims=1, out_dims=1)(x), taken(x))


def test_rows_of_an_index_that_varies_are_refused():
    with pytest.raises(NotImplementedError, match="stacks vectors"):
        torch.vmap(lambda i: rows(torch.ones(3, 2), i))(torch.tensor([[0], [1]]))
