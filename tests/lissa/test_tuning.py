"""The tuning rules follow their equations, and refuse what no setting can solve."""

import math

import pytest
import torch

from lissa import Spectrum, least_damping, suggest_damping, tune_lissa
from lissa.tuning import BURN_IN, METHODS


def spectrum(largest=2.0, smallest=0.0, trace=26.0, smallest_bound=None, dimension=7840):
    values = (largest, largest, smallest, smallest if smallest_bound is None else smallest_bound, 0.0, 0.0, trace, 0.1)
    return Spectrum(*(torch.tensor(x, dtype=torch.float64) for x in values), dimension, 18)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_scale_is_twice_the_bound_and_steps_take_off_the_slowest_mode(batch_size):
    settings = tune_lissa(spectrum(), damping=0.01, n=55_000, batch_size=batch_size, method="variance-reduced")
    bound = (2.0 + 0.01 + 26.0 / batch_size) / 2
    assert settings.batch_size == batch_size
    assert math.isclose(settings.scale, 2 * bound)
    assert settings.steps == math.ceil(BURN_IN * settings.scale / 0.01)
    # What the mean over the second half keeps of the slowest mode's residual.
    shrink = 1 - 0.01 / settings.scale
    left = sum(shrink**t for t in range(settings.average_after, settings.steps)) / (
        settings.steps - settings.average_after
    )
    assert left <= 0.005


def test_batch_size_is_the_critical_one_and_never_more_than_n():
    assert tune_lissa(spectrum(), damping=0.01, n=55_000, method="averaged").batch_size == 13
    assert tune_lissa(spectrum(), damping=0.01, n=5, method="averaged").batch_size == 5


def test_methods_are_chosen_by_predicted_cost():
    small, large = (tune_lissa(spectrum(), damping=0.01, n=n) for n in (100, 1_000_000))
    assert small.method == "cg"
    assert large.method == "variance-reduced"
    for settings in (small, large):
        rivals = [tune_lissa(spectrum(), damping=0.01, n=settings.batch_size, method=m) for m in METHODS]
        assert {r.method for r in rivals} == set(METHODS)
    options = [tune_lissa(spectrum(), damping=0.01, n=1_000_000, method=m).passes for m in METHODS]
    assert large.passes == min(options)
    assert tune_lissa(spectrum(), damping=0.01, n=100, method="lissa").method != "cg"


def test_right_hand_sides_that_are_solved_together_share_a_krylov_space():
    """`lambda_K <= trace / K` takes the place of the largest eigenvalue, where it is smaller."""
    alone, few, many = (tune_lissa(spectrum(), damping=0.01, n=100, vectors=K) for K in (1, 5, 100))
    assert (alone.method, few.method, many.method) == ("cg", "block-cg", "block-cg")
    assert few.passes == alone.passes  # 26 / 5 is more than the largest eigenvalue, 2
    kappa = (26 / 100 + 0.01) / 0.01
    assert math.isclose(many.passes, math.sqrt(kappa) / 2 * math.log(2 / 1e-2) + 2, rel_tol=1e-6)
    # Of 100 right-hand sides in 200 dimensions, two steps span them all.
    assert tune_lissa(spectrum(dimension=200), damping=0.01, n=100, vectors=100).passes == 3
    # What LiSSA needs is the same for each of them, so it is chosen from a larger n on.
    assert tune_lissa(spectrum(), damping=0.01, n=10**6).method == "variance-reduced"
    assert tune_lissa(spectrum(), damping=0.01, n=100, vectors=100, method="lissa").method in METHODS[:3]


def test_what_a_step_costs_besides_asks_for_larger_batches_and_fewer_steps():
    free, dear = (
        tune_lissa(spectrum(), damping=0.01, n=10**6, method="variance-reduced", overhead=x) for x in (0.0, 1000.0)
    )
    assert dear.batch_size == math.ceil(math.sqrt(1000 * 26 / 2))
    assert dear.steps < free.steps
    assert dear.passes > free.passes
    # No other batch size is cheaper by more than its rounding.
    others = [
        tune_lissa(spectrum(), damping=0.01, n=10**6, method="variance-reduced", overhead=1000.0, batch_size=B)
        for B in (13, 60, 90, 150, 300, 1000)
    ]
    assert all(other.passes >= dear.passes * (1 - 1e-3) for other in others)
    # Full batches are one step each, so that where steps are dear they are chosen from a larger n on.
    assert tune_lissa(spectrum(), damping=0.01, n=20_000).method == "variance-reduced"
    assert tune_lissa(spectrum(), damping=0.01, n=20_000, overhead=1000.0).method == "cg"


def test_noise_takes_the_place_of_the_trace_where_it_is_larger():
    calm, wild = (tune_lissa(spectrum(), damping=0.01, n=55_000, batch_size=4, noise=x) for x in (1.0, 260.0))
    assert calm == tune_lissa(spectrum(), damping=0.01, n=55_000, batch_size=4)
    assert math.isclose(wild.scale, 2.0 + 0.01 + 260.0 / 4)
    assert tune_lissa(spectrum(), damping=0.01, n=55_000, noise=260.0, method="averaged").batch_size == 130


def test_averaging_alone_is_chosen_where_its_noise_is_low_enough():
    assert tune_lissa(spectrum(trace=4.0), damping=1.0, n=10**6, rtol=0.1).method == "averaged"


def test_settings_are_plain_numbers():
    settings = tune_lissa(spectrum(), damping=0.01, n=55_000)
    assert all(isinstance(value, (str, int, float)) for value in settings)


def test_a_negative_eigenvalue_is_refused_with_the_least_damping():
    indefinite = spectrum(smallest=-0.4, smallest_bound=-0.5)
    assert least_damping(indefinite) == 0.5
    with pytest.raises(ValueError, match=r"smallest eigenvalue found is -0.4. Use damping > 0.5.*ggnvp.*solve_minres"):
        tune_lissa(indefinite, damping=0.3, n=100)
    assert tune_lissa(indefinite, damping=0.6, n=100).scale > 0
    assert suggest_damping(indefinite, fraction=0.1) > 0.5


def test_no_damping_of_a_singular_matrix_is_refused():
    with pytest.raises(ValueError, match="must make H"):
        tune_lissa(spectrum(), damping=0.0, n=100)


def test_least_damping_bears_rounding_and_an_unknown_bound():
    assert least_damping(spectrum(smallest=-1e-6, smallest_bound=-0.3)) == 0
    assert least_damping(spectrum(smallest=-0.4, smallest_bound=-math.inf)) == 0.8


def test_suggested_damping_is_a_tenth_of_the_mean_eigenvalue():
    assert math.isclose(suggest_damping(spectrum()), 0.1 * 26 / 7840)
    with pytest.raises(ValueError, match="must have a trace"):
        suggest_damping(spectrum(largest=0.0, trace=0.0))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"damping": -1.0}, ValueError, r"tune_lissa\(damping=...\)` must be >= 0"),
        ({"n": 0}, ValueError, "must be >= 1"),
        ({"rtol": 0.0}, ValueError, "must be > 0"),
        ({"batch_size": 0}, ValueError, "must be >= 1"),
        ({"noise": -1.0}, ValueError, "must be >= 0"),
        ({"repeats": 1.5}, TypeError, "must be an int"),
        ({"method": "magic"}, ValueError, "must be one of"),
    ],
)
def test_bad_arguments_are_named(change, error, words):
    with pytest.raises(error, match=words):
        tune_lissa(spectrum(), **({"damping": 0.1, "n": 10} | change))
