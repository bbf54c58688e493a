"""What a result is worth, measured: against explicit products."""

import pytest
import torch
import torch.nn.functional as F

from bridge import SimpleInfluence, measurements
from tests.bridge.fakes import dense_problem

pytestmark = pytest.mark.filterwarnings("ignore::bridge.diagnostics.InfluenceWarning")


def test_the_default_measures_as_many_residuals_as_add_a_quarter():
    model, pairs, _, _ = dense_problem()
    for steps, expected in ((1, 1), (10, 3), (100, 6)):  # 6 solves multiply by 8 examples a step, a residual by 40
        influence = SimpleInfluence.from_dataset(
            model, pairs, loss_fn=F.cross_entropy, progress=False, recursion_depth=steps
        )
        influence.scores(pairs[:6])
        residuals = influence.diagnostics.relative_residual
        assert (~residuals.isnan()).tolist() == [i < expected for i in range(6)]


def test_cosines_of_stacked_vectors():
    v = {"w": torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])}
    x = {"w": torch.tensor([[3.0, 0.0], [1.0, 0.0], [1.0, 0.0]])}
    assert measurements.cosines(v, x).tolist() == pytest.approx([1.0, 0.5**0.5, 0.0])
