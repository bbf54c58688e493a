import math

import torch

from benchmarks.accuracy import stability
from benchmarks.accuracy.tasks import Task, linear


def task(x, classes=2):
    y = torch.zeros(len(x), dtype=torch.long)
    return Task("task", linear, {"weight": torch.zeros(x.shape[1], classes)}, (x, y), (x, y), l2=0.01)


def test_the_boundary_of_equal_examples_is_half_the_largest_eigenvalue():
    # Two classes at p = 1/2: H = x x^T (I - 1 1^T / 2) / 2, the same for every example, so that batches have no noise.
    x = torch.ones(16, 4)
    largest = 4 / 2

    assert abs(stability.mean_square(task(x), B=1) / ((largest + 0.01) / 2) - 1) <= 1e-3


def test_the_boundary_of_one_active_direction_is_its_second_moment():
    # Disjoint features: in each direction a is 1/2 |x|^2 with probability 1/2, else 0, and the boundary is
    # E(a + damping)^2 / (2 E(a + damping)), the largest of both directions'.
    x = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    a = torch.tensor([4.5, 0.0]) + 0.01
    expected = float(a.square().mean() / (2 * a.mean()))

    assert abs(stability.mean_square(task(x), B=1) / expected - 1) <= 1e-3


def test_a_curve_crosses_one_where_it_comes_down_for_good():
    falling = [100.0, 0.5, 10.0, 0.1] + [0.01] * (len(stability.FACTORS) - 4)
    f2, f3 = stability.FACTORS[2:4]
    assert math.isclose(stability.crossing(falling), math.sqrt(f2 * f3))
    assert stability.crossing([0.1] * len(stability.FACTORS)) == stability.FACTORS[0]
    assert stability.crossing([2.0] * len(stability.FACTORS)) == math.inf
