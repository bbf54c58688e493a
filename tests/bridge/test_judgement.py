"""What is said of a result, against dense matrices and explicit products, and that nothing is said for nothing."""

import pytest
import torch
import torch.nn.functional as F

from bridge import SimpleInfluence
from bridge.diagnostics import InfluenceWarning
from bridge.judgement import MOST_CORRELATED
from tests.bridge.fakes import dense_problem

pytestmark = pytest.mark.filterwarnings("ignore::bridge.diagnostics.InfluenceWarning")


def test_the_defaults_are_measured_against_the_hessian_and_plain_gradients():
    model, pairs, H, G = dense_problem()
    influence = SimpleInfluence.from_dataset(model, pairs, loss_fn=F.cross_entropy, progress=False)
    with pytest.warns(InfluenceWarning, match="largest eigenvalue") as warned:
        scores = influence.scores(pairs[:2])
    found = influence.diagnostics

    largest = float(torch.linalg.eigvalsh(H)[-1])
    # A Rayleigh quotient is at most the eigenvalue; one whose residual is a tenth of it leaves about the square out.
    assert 0.95 * largest <= found.largest_eigenvalue <= largest * (1 + 1e-10)
    assert f"about {found.largest_eigenvalue:.2g}" in str(warned[0].message)
    plain = G[:2] @ G.mT
    expected = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(plain, scores, strict=True)])
    torch.testing.assert_close(found.correlation_with_plain, expected, rtol=1e-9, atol=0)
    assert float(found.correlation_with_plain.min()) > 0.9999


def test_a_few_right_hand_sides_are_compared_with_plain_products():
    model, pairs, _, _ = dense_problem()
    influence = SimpleInfluence.from_dataset(model, pairs, loss_fn=F.cross_entropy, progress=False)
    influence.scores(pairs[: MOST_CORRELATED + 3])
    measured = ~influence.diagnostics.correlation_with_plain.isnan()
    assert measured.tolist() == [True] * MOST_CORRELATED + [False] * 3


def test_nothing_is_measured_where_nothing_is_wrong():
    model, pairs, _, _ = dense_problem()
    influence = SimpleInfluence.from_dataset(
        model, pairs, loss_fn=F.cross_entropy, solver="cg", ridge=0.05, progress=False
    )
    influence.scores(pairs[:2])
    assert not influence.diagnostics.problems()
    assert influence.diagnostics.correlation_with_plain.isnan().all()
    assert influence.diagnostics.largest_eigenvalue != influence.diagnostics.largest_eigenvalue
