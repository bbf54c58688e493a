import pytest
import torch

from lissa import influence_scores
from lissa.testing import make_problem, scores


@pytest.mark.parametrize(
    "problem",
    [make_problem(features=2, seed=512), make_problem(batch_size=5, seed=3)],
    ids=["two features", "batch of five"],
)
def test_leaving_out_the_least_example_is_told_from_rounding(problem):
    """Here a score is 1e-4 of the test loss or less, and the tolerance from its formula about the rounding of the loss.

    The difference of two test losses in float64 is right to the rounding of the losses, not to its own.
    """
    assert problem.dtype == torch.float64
    assert scores.leave_one_out(influence_scores, problem) is None
