"""One row per wrong argument or datum: the call, the error type and the words that must appear."""

from functools import partial

import pytest
import torch

import lissa
from lissa import checks
from lissa.hvp import MODES
from tests.oracles import flatten
from tests.problems import mlp, random_vector

PARAMS = {"w": torch.ones(2, 3), "b": torch.zeros(3)}
V = {"w": torch.ones(2, 3), "b": torch.ones(3)}
X = torch.ones(4, 2)


def loss_fn(params, x):
    return (x @ params["w"] + params["b"]).square().mean()


def example_loss_fn(params, x):
    return (x @ params["w"] + params["b"]).square().mean(1)


def with_(d, **changes):
    return {**d, **changes}


def without(d, key):
    return {k: t for k, t in d.items() if k != key}


def matvec(batch, v):
    return v


hvp = partial(lissa.hvp, loss_fn)
scores = partial(lissa.influence_scores, example_loss_fn, PARAMS)
solve = partial(lissa.solve_lissa, matvec, V)
GENERATOR = torch.Generator()

TABLE = {
    "hvp: unknown mode": (lambda: hvp(PARAMS, X, V, mode="fast"), ValueError, ["hvp(mode=", "'auto'", "'fast'"]),
    "hvp: params is a list": (lambda: hvp([torch.ones(2)], X, V), TypeError, ["hvp(params=", "dict", "list"]),
    "hvp: params is empty": (lambda: hvp({}, X, {}), ValueError, ["hvp(params=", "at least one"]),
    "hvp: an array for a tensor": (lambda: hvp(with_(PARAMS, b=[0.0]), X, V), TypeError, ["params", "'b'", "list"]),
    "hvp: an integer parameter": (
        lambda: hvp(with_(PARAMS, b=torch.zeros(3, dtype=torch.int64)), X, V),
        TypeError,
        ["params", "'b'", "int64", "floating-point"],
    ),
    "hvp: missing key": (lambda: hvp(PARAMS, X, without(V, "b")), ValueError, ["hvp(v=", "missing keys ['b']"]),
    "hvp: extra key": (lambda: hvp(PARAMS, X, with_(V, c=X)), ValueError, ["hvp(v=", "extra keys ['c']"]),
    "hvp: wrong shape": (
        lambda: hvp(PARAMS, X, with_(V, b=torch.ones(4))),
        ValueError,
        ["hvp(v=", "shape", "'b'", "(3,)", "(4,)"],
    ),
    "hvp: wrong dtype": (
        lambda: hvp(PARAMS, X, with_(V, b=V["b"].double())),
        TypeError,
        ["hvp(v=", "dtype", "'b'", "float32", "float64"],
    ),
    "hvp: wrong device": (
        lambda: hvp(PARAMS, X, with_(V, b=V["b"].to("meta"))),
        ValueError,
        ["hvp(v=", "device", "'b'", "cpu", "meta"],
    ),
    "hvp: loss per example": (
        lambda: lissa.hvp(example_loss_fn, PARAMS, X, V),
        ValueError,
        ["hvp(loss_fn=", "scalar", "(4,)", "mean"],
    ),
    "hvp: loss is a float": (
        lambda: lissa.hvp(lambda p, b: 1.0, PARAMS, X, V),
        TypeError,
        ["loss_fn", "tensor", "float"],
    ),
    "ggnvp: wrong shape": (
        lambda: lissa.ggnvp(lambda p, b: b @ p["w"], lambda z, b: z.mean(), PARAMS, X, with_(V, b=torch.ones(4))),
        ValueError,
        ["ggnvp(v=", "'b'", "(4,)"],
    ),
    "ggnvp: output loss per example": (
        lambda: lissa.ggnvp(lambda p, b: b @ p["w"] + p["b"], lambda z, b: z.mean(1), PARAMS, X, V),
        ValueError,
        ["ggnvp(output_loss_fn=", "scalar", "(4,)"],
    ),
    "lissa: scale 0": (lambda: solve([X], scale=0.0), ValueError, ["solve_lissa(scale=", "> 0", "0.0"]),
    "lissa: scale negative": (lambda: solve([X], scale=-1.0), ValueError, ["solve_lissa(scale=", "> 0", "-1.0"]),
    "lissa: scale nan": (lambda: solve([X], scale=float("nan")), ValueError, ["solve_lissa(scale=", "finite", "nan"]),
    "lissa: scale a string": (lambda: solve([X], scale="big"), TypeError, ["solve_lissa(scale=", "number", "str"]),
    "lissa: damping negative": (lambda: solve([X], damping=-1.0), ValueError, ["damping", ">= 0", "-1.0"]),
    "lissa: damping infinite": (lambda: solve([X], damping=float("inf")), ValueError, ["damping", "finite", "inf"]),
    "lissa: v is empty": (lambda: lissa.solve_lissa(matvec, {}, [X]), ValueError, ["solve_lissa(v=", "at least one"]),
    "lissa: v is a tensor": (
        lambda: lissa.solve_lissa(matvec, X, [X]),
        TypeError,
        ["solve_lissa(v=", "dict", "Tensor"],
    ),
    "lissa: steps negative": (lambda: solve([X], steps=-1), ValueError, ["steps", ">= 0", "-1"]),
    "lissa: steps a float": (lambda: solve([X], steps=1.5), TypeError, ["steps", "int", "float"]),
    "lissa: too few batches": (lambda: solve([X], scale=9.0, steps=3), ValueError, ["batches", "1 of 3"]),
    "lissa: rtol 0": (lambda: solve([X], rtol=0.0), ValueError, ["rtol", "> 0"]),
    "lissa: diverges": (lambda: solve([X] * 99, scale=0.01), lissa.SolverError, ["DIVERGED", "scale", "damping"]),
    "lissa: v holds NaN": (
        lambda: lissa.solve_lissa(matvec, with_(V, b=torch.full((3,), torch.nan)), [X]),
        lissa.SolverError,
        ["NOT_FINITE", "right-hand side", "NaN"],
    ),
    "lissa: a batch holds NaN": (
        lambda: lissa.solve_lissa(partial(lissa.hvp, loss_fn, PARAMS), V, [X, X * torch.nan], scale=99.0),
        lissa.SolverError,
        ["NOT_FINITE", "data"],
    ),
    "scores: unknown method": (lambda: scores(V, X, method="fast"), ValueError, ["influence_scores(method=", "'fast'"]),
    "scores: wrong key": (
        lambda: scores({"u": X}, X),
        ValueError,
        ["influence_scores(ihvp=", "missing keys ['b', 'w']"],
    ),
    "scores: wrong shape": (lambda: scores(with_(V, b=torch.ones(4)), X), ValueError, ["ihvp", "'b'", "(3,)", "(4,)"]),
    "scores: uneven stacks": (
        lambda: scores({"w": torch.ones(5, 2, 3), "b": torch.ones(4, 3)}, X),
        ValueError,
        ["ihvp", "equally many", "5", "4"],
    ),
    "scores: mean loss": (
        lambda: lissa.influence_scores(loss_fn, PARAMS, V, X),
        ValueError,
        ["example_loss_fn", "(B,)", "reduction"],
    ),
    "scores: chunk size 0": (lambda: scores(V, X, chunk_size=0), ValueError, ["chunk_size", ">= 1", "0"]),
    "scores: gradients of a batch without rows": (
        lambda: scores(V, (X, torch.ones(3)), method="per-example-gradients"),
        ValueError,
        ["first dimension", "[3, 4]"],
    ),
    "stream: no examples": (lambda: lissa.index_stream(0, 1, generator=GENERATOR), ValueError, ["n=", ">= 1", "0"]),
    "stream: batch size 0": (lambda: lissa.index_stream(3, 0, generator=GENERATOR), ValueError, ["batch_size", ">= 1"]),
    "stream: a seed for a generator": (lambda: lissa.index_stream(3, 1, generator=0), TypeError, ["Generator", "int"]),
    "stream: nothing is left": (
        lambda: lissa.index_stream(3, 4, generator=GENERATOR, drop_last=True),
        ValueError,
        ["drop_last", "4", "3"],
    ),
    "stream: uneven data": (
        lambda: lissa.batch_stream((X, torch.ones(3)), 1, generator=GENERATOR),
        ValueError,
        ["data", "[3, 4]"],
    ),
    "stream: empty data": (
        lambda: lissa.batch_stream(X[:0], 1, generator=GENERATOR),
        ValueError,
        ["data", ">= 1", "[0]"],
    ),
    "ranking: k negative": (lambda: lissa.ranking_init(torch.ones(3), -1), ValueError, ["k=", ">= 0", "-1"]),
    "ranking: wrong indices": (
        lambda: lissa.ranking_update(lissa.ranking_init(X, 1), X, torch.arange(3), k=1),
        ValueError,
        ["indices", "(2,)", "(3,)"],
    ),
}


@pytest.mark.parametrize("row", TABLE)
def test_bad_input_is_named_before_any_work(row):
    call, error, words = TABLE[row]
    before = (flatten(PARAMS).clone(), flatten(V).clone(), torch.get_rng_state())
    with pytest.raises(error) as raised:
        call()
    message = str(raised.value)
    assert all(word in message for word in words), message
    assert torch.equal(before[0], flatten(PARAMS))
    assert torch.equal(before[1], flatten(V))
    assert torch.equal(before[2], torch.get_rng_state())


def test_numbers_of_other_libraries_are_numbers():
    numpy = pytest.importorskip("numpy")
    checks.positive("f", "x", numpy.float32(0.5))
    checks.count("f", "x", numpy.int64(3))
    with pytest.raises(TypeError, match="got bool"):
        checks.positive("f", "x", True)


@pytest.mark.parametrize("name", [*MODES, "ggnvp", "stacked_hvp", "influence_scores", "per_example_gradients"])
@pytest.mark.parametrize("differentiates", [True, False], ids=["as torch is", "as torch was"])
def test_in_inference_mode_derivatives_are_right_or_an_error(name, differentiates, monkeypatch):
    """In torch 2.11 and before, those of torch.func are zero there, without a word."""
    problem = mlp()
    v = random_vector(problem)
    calls = {
        **{mode: partial(lissa.hvp, problem.loss_fn, problem.params, problem.batch, v, mode=mode) for mode in MODES},
        "ggnvp": lambda: lissa.ggnvp(problem.output_fn, problem.output_loss_fn, problem.params, problem.batch, v),
        "stacked_hvp": lambda: lissa.stacked_hvp(
            problem.loss_fn, problem.params, problem.batch, lissa.tree.map(lambda t: t.unsqueeze(0), v)
        ),
        "influence_scores": lambda: lissa.influence_scores(problem.example_loss_fn, problem.params, v, problem.batch),
        "per_example_gradients": lambda: lissa.per_example_gradients(
            problem.example_loss_fn, problem.params, problem.batch
        ),
    }
    expected = calls[name]()
    if not differentiates:
        monkeypatch.setattr(checks, "differentiates_in_inference", lambda: False)
    with torch.inference_mode():
        try:
            got = calls[name]()
        except RuntimeError as error:
            assert "torch.inference_mode()" in str(error)  # noqa: PT017
            return
        assert differentiates
        tolerance = 1e-4 if name == "finite-difference" else 1e-10
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
