from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from lissa import graph_passes, hvp
from lissa.graph_passes import aten, simplified
from tests import problems
from tests.oracles import flatten, relative_error
from tests.problems import ZOO, random_vectors

SIZES = st.integers(1, 5)
ROUNDING = 1e-13
"""Relative, in float64: a sum of at most some hundred products in another order differs by a few hundred roundings."""


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def recorded(fn, *tensors):
    return make_fx(fn, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)


def count(module, target):
    return sum(node.target == target for node in module.graph.nodes)


def same(module, fn, *tensors):
    """Whether `module` gives the results of `fn`, to rounding, in the same layout."""
    for got, expected in zip(module(*tensors), fn(*tensors), strict=True):
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        assert got.is_contiguous() or not expected.is_contiguous()
        assert torch.linalg.vector_norm(got - expected) <= ROUNDING * (1 + torch.linalg.vector_norm(expected))


@given(K=SIZES, M=SIZES, N=SIZES, P=SIZES)
@settings(max_examples=25)
def test_products_with_one_left_operand_are_folded(K, M, N, P):
    A, B = random(M, N), random(K, N, P, seed=1)

    def fn(A, B):
        return (torch.vmap(lambda b: (A @ b).tanh())(B),)

    module = simplified(recorded(fn, A, B))

    same(module, fn, A, B)
    assert count(module, aten.bmm.default) == (1 if K == 1 else 0)


@given(K=SIZES, M=SIZES, N=SIZES, P=SIZES)
@settings(max_examples=25)
def test_products_with_one_right_operand_are_folded(K, M, N, P):
    A, B = random(K, M, N), random(N, P, seed=1)

    def fn(A, B):
        return (torch.bmm(A.transpose(1, 2).exp().transpose(1, 2), B.expand(K, N, P)),)

    module = simplified(recorded(fn, A, B))

    same(module, fn, A, B)
    assert count(module, aten.bmm.default) == (1 if K == 1 else 0)


@given(M=SIZES, N=SIZES, P=SIZES, Q=SIZES, seed=st.integers(0, 9))
@settings(max_examples=25)
def test_a_sum_of_products_is_one_product(M, N, P, Q, seed):
    tensors = random(M, N, seed=seed), random(N, P, seed=1), random(Q, M, seed=2), random(Q, P, seed=3)

    def fn(A, B, C, D):
        return (A @ B + C.t() @ D,)

    module = simplified(recorded(fn, *tensors))

    same(module, fn, *tensors)
    assert count(module, aten.mm.default) == 1


def test_a_product_that_is_used_twice_is_not_added_away():
    A, B, C = random(3, 3), random(3, 3, seed=1), random(3, 3, seed=2)

    def fn(A, B, C):
        product = A @ B
        return product + B @ C, product

    same(simplified(recorded(fn, A, B, C)), fn, A, B, C)


def test_a_weighted_sum_of_products_is_left():
    A, B = random(3, 3), random(3, 3, seed=1)

    def fn(A, B):
        return torch.add(A @ B, B @ A, alpha=2), A @ B + (B @ A)[:1]

    same(simplified(recorded(fn, A, B)), fn, A, B)


@given(M=SIZES, N=SIZES, P=SIZES, Q=SIZES)
@settings(max_examples=25)
def test_products_with_a_common_operand_are_joined(M, N, P, Q):
    tensors = random(M, N), random(N, P, seed=1), random(N, Q, seed=2), random(P, Q, seed=3)

    def left(A, B, C, D):
        return A @ B, (A @ C).sin()

    def right(A, B, C, D):
        return (A @ C).cos(), B.t() @ C

    for fn in (left, right):
        module = simplified(recorded(fn, *tensors))
        same(module, fn, *tensors)
        assert count(module, aten.mm.default) == 1


def test_products_that_depend_on_each_other_are_not_joined():
    A, B = random(3, 3), random(3, 3, seed=1)

    def fn(A, B):
        first = A @ B
        second = A @ first.tanh()
        return second, A @ (first + second), A @ B.t()

    module = simplified(recorded(fn, A, B))

    same(module, fn, A, B)
    assert count(module, aten.mm.default) == 3  # the first and the last are one


def test_large_products_are_left_where_copies_would_cost(monkeypatch):
    monkeypatch.setattr(graph_passes, "SMALL", 10)
    monkeypatch.setattr(graph_passes, "THIN", 2)
    A, B, C = random(3, 3), random(3, 3, seed=1), random(2, 3, 3, seed=2)

    def fn(A, B, C):
        return A @ B + B @ A, A @ A, torch.vmap(lambda c: A @ c)(C)

    module = simplified(recorded(fn, A, B, C))

    same(module, fn, A, B, C)
    assert count(module, aten.mm.default) == 3
    assert count(module, aten.bmm.default) == 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_large_products_are_folded_where_what_varies_is_thin(monkeypatch, side):
    monkeypatch.setattr(graph_passes, "SMALL", 10)
    A, B = random(40, 30), random(3, 30, graph_passes.THIN, seed=1)

    def fn(A, B):
        return (torch.vmap(lambda b: A @ b if side == "left" else b.t() @ A.t())(B),)

    module = simplified(recorded(fn, A, B))

    same(module, fn, A, B)
    assert count(module, aten.bmm.default) == 0


def test_equal_operations_are_computed_once_and_random_ones_are_not():
    x = random(3)

    def fn(x):
        return x.exp() + x.exp(), torch.rand_like(x) - torch.rand_like(x)

    module = simplified(recorded(fn, x))

    assert count(module, aten.exp.default) == 1
    assert module(x)[1].abs().sum() > 0


def test_transposing_twice_is_dropped():
    x = random(2, 3)

    def fn(x):
        return x.t().sin().t().t().t() * 1, x.transpose(0, 1).transpose(0, 1) + 1

    module = simplified(recorded(fn, x))

    same(module, fn, x)
    assert count(module, aten.transpose.int) == 0


def test_a_recording_that_writes_in_place_is_left_as_it_is():
    x = random(2, 2)

    def fn(x):
        a = x.t().contiguous()
        b = x.exp()
        a.add_(b)
        return a, x.exp()

    module = simplified(recorded(fn, x))

    same(module, fn, x)
    assert count(module, aten.exp.default) == 2


@pytest.mark.parametrize("rewrite", dict.fromkeys(graph_passes.PASSES), ids=lambda f: f.__name__)
@pytest.mark.parametrize("mode", ["reverse-over-reverse", "forward-over-reverse"])
@pytest.mark.parametrize("name", ["tied weights", "decoder, SDPA, tied embeddings"])
def test_each_pass_alone_keeps_the_products(name, mode, rewrite, monkeypatch):
    problem = ZOO[name]()
    v = random_vectors(problem, 3)
    matvec = torch.vmap(partial(hvp, problem.loss_fn, problem.params, mode=mode), in_dims=(None, 0))
    expected = matvec(problem.batch, v)
    keys, tensors = list(v), tuple(v.values())

    def fn(*parts):
        return tuple(matvec(problem.batch, dict(zip(keys, parts, strict=True))).values())

    monkeypatch.setattr(graph_passes, "PASSES", (graph_passes.drop_views_that_change_nothing, rewrite))
    got = simplified(recorded(fn, *tensors))(*tensors)

    assert relative_error(flatten(dict(zip(keys, got, strict=True))), flatten(expected)) <= 1e-12


@given(
    widths=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    batch_size=st.integers(1, 5),
    vectors=st.integers(1, 4),
    seed=st.integers(0, 99),
)
@settings(max_examples=10)
def test_the_product_of_any_network_is_kept(widths, batch_size, vectors, seed):
    problem = problems.mlp(seed=seed, batch_size=batch_size, widths=tuple(widths))
    v = random_vectors(problem, vectors, seed)
    matvec = torch.vmap(partial(hvp, problem.loss_fn, problem.params), in_dims=(None, 0))

    def fn(*parts):
        return tuple(matvec(problem.batch, dict(zip(v, parts, strict=True))).values())

    module = simplified(recorded(fn, *v.values()))

    got = dict(zip(v, module(*v.values()), strict=True))
    assert relative_error(flatten(got), flatten(matvec(problem.batch, v))) <= 1e-12
    assert vectors == 1 or count(module, aten.bmm.default) == 0
