"""Bounds hold and intervals are those of the repeats; a place marked settled is the exact ranking's."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from bridge import SimpleInfluence

RIDGE = 0.05


def influence(n=60, **options):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 6, generator=g, dtype=torch.float64)
    y = torch.randint(3, (n,), generator=g)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torch.nn.Linear(6, 3).double()
    return SimpleInfluence.from_dataset(
        model, TensorDataset(x, y), loss_fn=cross_entropy, ridge=RIDGE, progress=False, **options
    )


def explained(exact):
    instances = [known.instance for known in exact.train_instances]
    return [instances[3], instances[10]]


LOOSE = {
    "cg": {"solver": "cg", "rtol": 0.1},
    "lissa": {"scale": 3.0, "recursion_depth": 400},
    "lissa, repeated": {"scale": 3.0, "recursion_depth": 400, "num_samples": 4},
}


@pytest.mark.filterwarnings("ignore::bridge.InfluenceWarning")
@pytest.mark.parametrize("name", LOOSE)
def test_the_exact_score_is_within_the_bound_and_settled_places_are_right(name):
    exact = influence(solver="dense")
    tests = explained(exact)
    scores = exact.scores(tests)
    rough = influence(**LOOSE[name])
    found = rough.interpret_with_error_bars(tests, k=60)
    index = {float(known.instance[0][0]): i for i, known in enumerate(rough.train_instances)}

    for t, output in enumerate(found):
        order = scores[t].sort(descending=True).indices.tolist()
        for place, estimate in enumerate(output.top_k):
            i = index[float(estimate.instance[0][0])]
            error = abs(estimate.score - float(scores[t, i]))
            # The bound is exact in real arithmetic; rounding adds some units of the dtype.
            assert error <= estimate.bound * (1 + 1e-9)
            if estimate.settled and name != "lissa, repeated":
                assert order[place] == i
        assert math.isnan(output.top_k[0].standard_error) == (name != "lissa, repeated")
    worst = max(e.bound for output in found for e in output.top_k)
    assert 0 < worst < 100


def test_a_solve_to_rounding_settles_every_place_and_agrees_with_interpret():
    exact = influence(solver="cg", rtol=1e-12)
    tests = explained(exact)
    found, plain = exact.interpret_with_error_bars(tests, k=5), exact.interpret_instances(tests, k=5)

    for output, reference in zip(found, plain, strict=True):
        assert all(e.settled for e in output.top_k)
        assert output.loss == reference.loss
        for estimate, other in zip(output.top_k, reference.top_k, strict=True):
            assert estimate.loss == other.loss
            assert abs(estimate.score - other.score) <= 1e-10


@pytest.mark.filterwarnings("ignore::bridge.InfluenceWarning")
def test_standard_errors_are_those_of_the_runs():
    options = {"scale": 3.0, "recursion_depth": 50, "measure_residual": False}
    repeated = influence(num_samples=3, **options).interpret_with_error_bars(explained(influence()), k=60)
    # The runs take successive batches of one stream: so do three calls of one run each.
    alone = influence(**options)
    runs = torch.stack([alone.scores(explained(influence())) for _ in range(3)])

    expected = (runs.std(0) / 3**0.5)[0].sort().values
    got = torch.tensor([e.standard_error for e in repeated[0].top_k], dtype=torch.float64).sort().values
    assert torch.allclose(got, expected, rtol=1e-8, atol=1e-12)


def test_the_tuned_solver_repeats_too():
    tuned = influence(n=400, solver="auto", num_samples=2)
    plan = tuned.interpret_with_error_bars(explained(influence(n=400)), k=3)
    assert tuned.diagnostics.relative_residual.max() <= 1e-2
    random = "variance-reduced" in tuned.diagnostics.solver or "averaged" in tuned.diagnostics.solver
    assert all(math.isnan(e.standard_error) != random for output in plan for e in output.top_k)


@pytest.mark.parametrize(
    ("options", "arguments", "words"),
    [
        ({"solver": "cg"}, {"smallest": -RIDGE}, "must have smallest"),
        ({"solver": "cg"}, {"k": -1}, "must be >= 0"),
        ({"solver": "cg"}, {"smallest": math.nan}, "must be finite"),
    ],
)
def test_bad_arguments_are_named(options, arguments, words):
    with pytest.raises(ValueError, match=words):
        influence(**options).interpret_with_error_bars(explained(influence()), **arguments)


def test_no_tests_no_work():
    assert influence(solver="cg").interpret_with_error_bars([]) == []
