import logging

import pytest
import torch

from bridge import strategies
from bridge.functional import Functional
from lissa import SolverError


def test_the_first_way_that_runs_is_kept_and_said_once(caplog):
    calls = []

    def refuses(x):
        calls.append("refuses")
        raise RuntimeError("vmap cannot")

    def works(x):
        calls.append("works")
        return 2 * x

    run = strategies.first_that_runs("doubles", refuses, works)
    with caplog.at_level(logging.WARNING):
        assert [run(1), run(2)] == [2, 4]
    assert calls == ["refuses", "works", "works"]
    assert [record.message for record in caplog.records] == [
        "Computing doubles a slower way, because the model refused the fast one: vmap cannot"
    ]


def test_if_no_way_runs_the_last_error_counts_and_all_ways_stay_open():
    broken = True

    def fast(x):
        if broken:
            raise RuntimeError("fast")
        return "fast"

    def slow(x):
        raise ValueError("slow")

    run = strategies.first_that_runs("results", fast, slow)
    with pytest.raises(ValueError, match="slow"):
        run(0)
    broken = False
    assert run(0) == "fast"


def test_a_failed_solve_is_not_a_refusal():
    def fails(x):
        raise SolverError("diverged", None)

    with pytest.raises(SolverError):
        strategies.first_that_runs("solutions", fails, lambda x: x)(0)


def model(refuses=False):
    """`loss_i = sum((w x_i)^3) + b`, batches of one, with `.item()` if vmap is to refuse."""

    def loss_fn(params, batch):
        (x,) = batch
        if refuses:
            x.sum().item()
        return ((params["w"] * x) ** 3).sum(-1).mean() + params["b"]

    params = {"w": torch.tensor([1.0, 2.0], dtype=torch.float64), "b": torch.tensor(0.5, dtype=torch.float64)}
    return Functional(params, loss_fn, torch.device("cpu"), None, None)


X = torch.tensor([[1.0, -1.0], [0.5, 2.0], [3.0, 1.0]], dtype=torch.float64)
STACK = (X.unsqueeze(1),)
W = torch.tensor([1.0, 2.0], dtype=torch.float64)
GRADIENTS = {"w": 3 * (W * X) ** 2 * X, "b": torch.ones(3, dtype=torch.float64)}


@pytest.mark.parametrize("refuses", [False, True])
@pytest.mark.parametrize("limit", [2**27, 1])
def test_every_way_gives_the_same(refuses, limit, monkeypatch):
    monkeypatch.setattr(strategies, "STACK_LIMIT", limit)
    fn = model(refuses)
    torch.testing.assert_close(
        strategies.losses(fn)(STACK), ((W * X) ** 3).sum(1) + 0.5, check_dtype=True, rtol=1e-12, atol=0
    )
    losses, gradients = strategies.losses_and_gradients(fn)(STACK)
    torch.testing.assert_close(losses, ((W * X) ** 3).sum(1) + 0.5, rtol=1e-12, atol=0)
    for name, expected in GRADIENTS.items():
        torch.testing.assert_close(gradients[name], expected, rtol=1e-12, atol=0)

    vectors = {"w": torch.eye(2, dtype=torch.float64), "b": torch.tensor([0.0, 1.0], dtype=torch.float64)}
    expected = torch.stack([GRADIENTS["w"][:, 0], GRADIENTS["w"][:, 1] + 1])
    torch.testing.assert_close(strategies.scores(fn)(vectors, STACK), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("rows", "asked"), [(1, 0), (2, 0), (3, 1)])
def test_gradients_of_a_few_rows_are_taken_one_by_one(rows, asked, monkeypatch, caplog):
    stacks, plain = [], torch.vmap
    monkeypatch.setattr(torch, "vmap", lambda *args, **kwargs: stacks.append(1) or plain(*args, **kwargs))
    losses, gradients = strategies.losses_and_gradients(model(refuses=True))((STACK[0][:rows],))
    assert len(stacks) == len(caplog.records) == asked  # what a model refuses is said where it was tried
    torch.testing.assert_close(losses, ((W * X[:rows]) ** 3).sum(1) + 0.5, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients["w"], GRADIENTS["w"][:rows], rtol=1e-12, atol=0)


def test_the_work_of_examples_of_the_same_shapes_is_counted_once():
    calls, plain = [], model()
    counted = plain._replace(loss_fn=lambda params, batch: calls.append(1) or plain.loss_fn(params, batch))
    rows = [strategies.rows_at_once(counted, (x.unsqueeze(0),), vectors=1) for x in X]
    assert len(calls) == 1
    assert rows == [strategies.rows_at_once(plain, (X[:1],), vectors=1)] * 3
    strategies.by_gradients(counted, (X[:1],), 10, 1)
    assert len(calls) == 1
    strategies.rows_at_once(counted, (X[:1].float(),), vectors=1)
    assert len(calls) == 2


def test_out_of_memory_halves_the_stack_until_it_fits():
    seen = []

    def of_three_at_most(vectors, stack):
        seen.append(len(stack))
        if len(stack) > 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
        return stack.unsqueeze(0) * vectors["x"]

    got = strategies.in_halves(of_three_at_most)({"x": torch.tensor([[2], [3]])}, torch.arange(7))
    assert got.tolist() == [[0, 2, 4, 6, 8, 10, 12], [0, 3, 6, 9, 12, 15, 18]]
    assert seen == [7, 4, 2, 2, 3]


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_an_example_that_does_not_fit_alone_is_an_error_and_so_is_anything_else(error):
    def fails(vectors, stack):
        raise error

    def refuses(vectors, stack):
        raise RuntimeError("no such rule")

    with pytest.raises(type(error)):
        strategies.in_halves(fails)({}, torch.arange(2))
    with pytest.raises(RuntimeError, match="no such rule"):
        strategies.in_halves(refuses)({}, torch.arange(2))
