"""Intervals cover, bounds hold, and places are settled exactly where no exact scores could change them."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lissa import score_bound, score_interval, settled_places
from lissa.uncertainty import student_95


@pytest.mark.parametrize(
    ("degrees", "expected"),
    # Tables of Student's t.
    [(1, 12.7062), (4, 2.77645), (10, 2.22814), (11, 2.20099), (15, 2.13145), (30, 2.04227), (100, 1.98397)],
)
def test_student_quantile(degrees, expected):
    assert abs(student_95(degrees) - expected) <= 2e-4


@pytest.mark.parametrize("repeats", [2, 4, 12])
def test_interval_covers_the_mean_in_95_of_100_cases(repeats):
    g = torch.Generator().manual_seed(repeats)
    samples = 3.0 + 0.5 * torch.randn(repeats, 20_000, dtype=torch.float64, generator=g)
    interval = score_interval(samples)
    covered = ((interval.score - 3.0).abs() <= interval.half_width).double().mean()
    # The share of 20,000 independent cases has standard deviation 0.0015; four of them.
    assert abs(float(covered) - 0.95) <= 0.006


def test_interval_of_many_right_hand_sides():
    samples = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    interval = score_interval(samples)
    assert interval.score.shape == interval.half_width.shape == (4, 5)
    torch.testing.assert_close(interval.standard_error, samples.std(0) / 3**0.5)


def test_bound_holds_for_every_error_and_is_sharp_in_the_softest_direction():
    g = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=g))[0]
    eigenvalues = torch.tensor([-0.3, 0.0, 0.5, 1.0, 3.0, 9.0], dtype=torch.float64)
    A = Q @ torch.diag(eigenvalues + 0.5) @ Q.T
    gradients, v = (
        torch.randn(40, 6, dtype=torch.float64, generator=g),
        torch.randn(6, dtype=torch.float64, generator=g),
    )
    exact = gradients @ torch.linalg.solve(A, v)
    for size in (1e-6, 1e-1, 10.0):
        x = torch.linalg.solve(A, v) + size * torch.randn(6, dtype=torch.float64, generator=g)
        bound = score_bound(gradients.norm(dim=1), (v - A @ x).norm(), damping=0.5, smallest=-0.3)
        assert ((gradients @ x - exact).abs() <= bound).all()
    softest = Q[:, 0]
    bound = score_bound(softest.norm(), (A @ softest).norm(), damping=0.5, smallest=-0.3)
    torch.testing.assert_close(bound, torch.tensor(1.0, dtype=torch.float64))


@given(
    st.lists(st.tuples(st.integers(-8, 8), st.integers(0, 5)), min_size=1, max_size=5),
)
def test_a_place_is_settled_exactly_where_every_corner_of_the_intervals_ranks_alike(pairs):
    scores = torch.tensor([float(s) for s, _ in pairs])
    errors = torch.tensor([e / 2 for _, e in pairs])
    order = scores.sort(descending=True, stable=True).indices
    settled = settled_places(scores, errors)
    for place, i in enumerate(order.tolist()):
        others = [j for j in range(len(pairs)) if j != i]
        ranks = set()
        for corner in itertools.product((-1, 1), repeat=len(pairs)):
            exact = scores + torch.tensor(corner) * errors
            above, tied = (exact[others] > exact[i]).sum(), (exact[others] == exact[i]).sum()
            ranks |= {int(above), int(above + tied)}
        assert bool(settled[place]) == (ranks == {place})


def test_places_of_many_rankings():
    scores = torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.1, 5.0]])
    assert settled_places(scores, torch.full_like(scores, 0.2)).tolist() == [[True, True, True], [True, False, False]]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: score_interval(torch.zeros(1, 3)), "at least 2 repeats"),
        (lambda: score_bound(torch.ones(2), torch.tensor(1.0), damping=0.1, smallest=-0.2), "must have smallest"),
        (lambda: settled_places(torch.zeros(3), torch.zeros(2)), "must have the shape of scores"),
        (lambda: student_95(0), "must be >= 1"),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
