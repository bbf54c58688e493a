import logging
from collections import OrderedDict
from functools import partial
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lissa import batch_stream, ggnvp, hvp, solve_lissa, tracing
from lissa.tracing import compiled, traced
from tests import problems
from tests.oracles import flatten, relative_error
from tests.problems import ZOO, random_vector, random_vectors


@pytest.fixture(autouse=True)
def said_anew():
    tracing.say_once.cache_clear()


@pytest.mark.parametrize("name", ZOO)
def test_gives_the_products_of_the_function_itself_for_every_model(name):
    matvec = None
    for seed in (0, 0, 1, 2):  # other data at the same shapes: lengths of sequences, signs that branches look at
        problem = ZOO[name](seed=seed)
        v = random_vector(problem, seed)
        if matvec is None:
            loss_fn, params = problem.loss_fn, problem.params
            matvec = traced(partial(hvp, loss_fn, params))

        got = flatten(matvec(problem.batch, v))

        # Replays are the same operations; an LSTM's are those of another kernel. Differences of gradients differ more.
        expected = flatten(hvp(loss_fn, params, problem.batch, v))
        assert relative_error(got, expected) <= (1e-9 if name == "EmbeddingBag" else 1e-12)


@pytest.mark.parametrize("name", ZOO)
def test_under_vmap_it_gives_each_product(name):
    problem = ZOO[name]()
    vectors = random_vectors(problem, 3)
    matvec = traced(partial(hvp, problem.loss_fn, problem.params))

    for _ in range(2):
        stacked = torch.vmap(matvec, in_dims=(None, 0))(problem.batch, vectors)

    for i in range(3):
        one = hvp(problem.loss_fn, problem.params, problem.batch, {k: t[i] for k, t in vectors.items()})
        got = {k: t[i] for k, t in stacked.items()}
        assert relative_error(flatten(got), flatten(one)) <= (1e-8 if name == "EmbeddingBag" else 1e-12)


@given(
    batch_size=st.integers(1, 5),
    count=st.integers(1, 4),
    out_dim=st.integers(0, 1),
    seed=st.integers(0, 99),
)
@settings(max_examples=6)
def test_nested_vmap_over_batches_and_vectors(batch_size, count, out_dim, seed):
    problem = problems.mlp(seed=seed, batch_size=2 * batch_size)
    vectors = random_vectors(problem, count, seed)
    halves = tuple(t.unflatten(0, (2, batch_size)) for t in problem.batch)
    plain = partial(hvp, problem.loss_fn, problem.params)

    def nested(matvec):
        return torch.vmap(torch.vmap(matvec, in_dims=(None, 0), out_dims=out_dim), in_dims=(0, None))(halves, vectors)

    matvec = traced(plain)
    nested(matvec)
    replayed = nested(matvec)

    assert relative_error(flatten(replayed), flatten(nested(plain))) <= 1e-12


def counting(fn):
    """`fn`, and a list that grows by one each time its Python code runs: twice at a new shape, never on a replay."""
    calls = []

    def counted(*args):
        calls.append(None)
        return fn(*args)

    return counted, calls


def test_records_once_for_each_shape():
    counted, calls = counting(lambda x, y: {"sum": x + y})
    fn = traced(counted)

    for size in (3, 3, 3, 2, 3, 2):  # full and ragged batches
        x = torch.randn(size)
        assert torch.equal(fn(x, x)["sum"], 2 * x)

    assert len(calls) == 4


def test_further_shapes_run_as_they_are_and_the_log_says_so_once(caplog):
    counted, calls = counting(lambda x: x * 2)
    fn = traced(counted, max_traces=2)

    for size in (1, 2, 3, 4, 3, 1, 2):
        assert torch.equal(fn(torch.ones(size)), torch.full((size,), 2.0))

    assert len(calls) == 2 * 2 + 3
    assert [r.levelno for r in caplog.records if r.name == "lissa.tracing"] == [logging.WARNING]
    assert "traced(max_traces=2) met more shapes" in caplog.text
    assert "drop_last=True" in caplog.text


def test_what_partial_binds_is_never_stale():
    problem = problems.mlp()
    v = random_vector(problem)
    params = {k: p.clone() for k, p in problem.params.items()}
    matvec = traced(partial(hvp, problem.loss_fn, params))
    matvec(problem.batch, v)

    for p in params.values():
        p.mul_(1.5)  # an optimizer's step

    expected = hvp(problem.loss_fn, params, problem.batch, v)
    assert relative_error(flatten(matvec(problem.batch, v)), flatten(expected)) <= 1e-12


def test_constants_are_told_apart_by_value_and_type():
    fn = traced(lambda x, c: x + c if type(c) is int else x * 10 * c)
    x = torch.tensor([1.0, 2.0])

    for _ in range(2):
        assert fn(x, 1).tolist() == [2.0, 3.0]
        assert fn(x, 1.0).tolist() == [10.0, 20.0]
        assert fn(x, 2).tolist() == [3.0, 4.0]
        assert fn(x, c=2).tolist() == [3.0, 4.0]


class Pair(NamedTuple):
    first: torch.Tensor
    name: str


def test_keeps_the_structure_of_arguments_and_results():
    def fn(pair, ordered):
        return Pair(pair.first + ordered["x"], pair.name), [OrderedDict(y=ordered["x"]), (None, 3)]

    arguments = Pair(torch.tensor(1.0), "a"), OrderedDict(x=torch.tensor(2.0))
    replayed = traced(fn)
    replayed(*arguments)

    assert replayed(*arguments) == (Pair(torch.tensor(3.0), "a"), [OrderedDict(y=torch.tensor(2.0)), (None, 3)])


class Opaque:
    def __init__(self, x):
        self.x = x


def test_an_argument_that_cannot_be_looked_into_is_passed_on(caplog):
    fn = traced(lambda batch: batch.x * 2)

    assert [fn(Opaque(torch.tensor(x))).item() for x in (1.0, 2.0, 3.0)] == [2.0, 4.0, 6.0]
    assert len(caplog.records) == 1
    assert "holds a Opaque" in caplog.text


def test_errors_of_the_function_are_its_own():
    with pytest.raises(ValueError, match=r"`hvp\(v=...\)` must have the keys of params"):
        traced(hvp)(lambda p, b: p["w"].sum(), {"w": torch.ones(2)}, None, {"u": torch.ones(2)})


@pytest.mark.parametrize("transform", [torch.func.grad, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))])
def test_says_that_it_cannot_be_differentiated(transform):
    fn = traced(lambda x: (x**2).sum())

    with pytest.raises(NotImplementedError, match=r"cannot be differentiated. Differentiate `fn`, and trace that"):
        transform(fn)(torch.ones(2))


def test_a_derivative_can_be_traced():
    fn = traced(torch.func.grad(lambda x: (x**3).sum()))

    for _ in range(2):
        assert fn(torch.tensor([1.0, 2.0])).tolist() == [3.0, 12.0]


def test_is_a_constant_to_autograd():
    x = torch.ones(2, requires_grad=True)
    fn = traced(lambda x: x * 2)

    assert not any(fn(x).requires_grad for _ in range(2))


def test_a_replay_that_differs_is_not_used(monkeypatch, caplog):
    monkeypatch.setattr(tracing, "_record", lambda function, tensors: lambda x: (x * 2.1,))

    fn = traced(lambda x: x * 2)

    assert [fn(torch.ones(1)).item() for _ in range(3)] == [2.0, 2.0, 2.0]
    assert "differs by 5e-02" in caplog.text


@pytest.mark.parametrize("batch_size", [2, 3])
def test_compiled_gives_the_products_of_the_function_itself(batch_size):
    problem = problems.softmax_regression(batch_size=batch_size)
    v, vectors = random_vector(problem), random_vectors(problem, 3)
    plain = partial(hvp, problem.loss_fn, problem.params)
    matvec = compiled(plain)
    expected = flatten(plain(problem.batch, v))

    for _ in range(3):
        assert relative_error(flatten(matvec(problem.batch, v)), expected) <= 1e-12
    for _ in range(2):
        stacked = torch.vmap(matvec, in_dims=(None, 0))(problem.batch, vectors)
    expected = flatten(torch.vmap(plain, in_dims=(None, 0))(problem.batch, vectors))
    assert relative_error(flatten(stacked), expected) <= 1e-12


def test_what_is_compiled_is_run_without_wrappers(monkeypatch, caplog):
    built = []

    def keep(*args):
        built.append(machine_code(*args))
        return built[-1]

    machine_code = tracing._machine_code
    monkeypatch.setattr(tracing, "_machine_code", keep)
    fn = compiled(lambda x, y: (x @ y, x.sum()))
    x, y = torch.randn(2, 2, 3).unbind()

    for _ in range(2):
        product, total = fn(x, y.t())
        assert torch.allclose(product, x @ y.t())
        assert torch.allclose(total, x.sum())

    assert [program.__qualname__ for program in built] == ["_without_wrappers.<locals>.<lambda>"]
    assert not [r for r in caplog.records if r.name == "lissa.tracing"]


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_is_compiled_runs_under_vmap_again_and_again(monkeypatch, wrapped):
    if wrapped:
        monkeypatch.setattr(tracing, "_without_wrappers", lambda *_: None)
    fn = compiled(lambda x: {"sin": x.sin(), "square": x * x})
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        found = torch.vmap(fn)(x)
        assert torch.allclose(found["sin"], x.sin())
        assert torch.allclose(found["square"], x * x)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, y: (x, y + 1),  # a result that is an argument
        lambda x, y: (x.t(), y + 1),  # or a view of it
        lambda x, y: (y.sin(), torch.ones(2)),
    ],
)
def test_compiled_keeps_results_that_are_not_new(fn):
    f = compiled(fn)

    for seed in range(3):
        x, y = torch.randn(2, 2, 2, generator=torch.Generator().manual_seed(seed)).unbind()
        assert all(torch.equal(got, expected) for got, expected in zip(f(x, y), fn(x, y), strict=True))


@pytest.mark.parametrize("make", [traced, compiled])
def test_the_same_tensor_may_be_given_twice(make):
    counted, calls = counting(lambda x, y: x * 2 + y)
    fn = make(counted)
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])

    for _ in range(2):
        assert fn(x, x).tolist() == [3.0, 6.0]
        assert fn(x, y).tolist() == [12.0, 24.0]
        assert fn(y, x).tolist() == [21.0, 42.0]

    assert len(calls) == 2


def test_layouts_and_dtypes_are_told_apart():
    counted, calls = counting(lambda x: x.reshape(-1) * 2)
    fn = traced(counted)
    x = torch.arange(6.0).reshape(2, 3)

    for _ in range(2):
        for t in (x, x.double(), x.t().contiguous().t(), torch.nn.Parameter(x)):
            assert torch.equal(fn(t), t.detach().reshape(-1) * 2)

    assert len(calls) == 2 * 3


def test_without_a_compiler_the_recording_is_replayed_and_the_log_says_so_once(monkeypatch, caplog):
    def no_compiler(*_, **__):
        raise RuntimeError("No working C++ compiler found\nand more")

    monkeypatch.setattr(tracing, "_machine_code", no_compiler)
    counted, calls = counting(lambda x: x * 2)
    fn = compiled(counted)

    for size in (1, 2, 1, 2):
        assert torch.equal(fn(torch.ones(size)), torch.full((size,), 2.0))

    assert len(calls) == 4
    assert caplog.text.count("cannot compile here") == 1
    assert "No working C++ compiler found" in caplog.text


def test_lissa_runs_on_traced_products_and_so_do_many_vectors():
    problem = problems.softmax_regression(batch_size=21)
    vectors = random_vectors(problem, 3)
    plain = partial(hvp, problem.loss_fn, problem.params)

    def solve(matvec):
        def one(v):  # passes of 4, 4, 4, 4, 4 and a ragged 1
            batches = batch_stream(problem.batch, 4, generator=torch.Generator().manual_seed(0))
            return solve_lissa(matvec, v, batches, damping=0.5, scale=10.0, steps=20).value

        return torch.vmap(one)(vectors)

    assert relative_error(flatten(solve(traced(plain))), flatten(solve(plain))) <= 1e-12


def test_traces_gauss_newton_products_too():
    problem = problems.mlp()
    v = random_vector(problem)
    plain = partial(ggnvp, problem.output_fn, problem.output_loss_fn, problem.params)
    matvec = traced(plain)

    for _ in range(2):
        assert relative_error(flatten(matvec(problem.batch, v)), flatten(plain(problem.batch, v))) <= 1e-12


@pytest.mark.parametrize("make", [traced, compiled])
def test_bad_arguments_are_named(make):
    with pytest.raises(ValueError, match=rf"`{make.__name__}\(max_traces=...\)` must be >= 1, got 0"):
        make(abs, max_traces=0)
