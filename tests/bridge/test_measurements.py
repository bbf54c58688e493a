"""What a result is worth, measured: against dense matrices and explicit products."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bridge import SimpleInfluence, measurements
from bridge.diagnostics import InfluenceWarning
from bridge.simple_influence import MOST_CORRELATED
from tests.oracles import dense_gradients, dense_hessian

pytestmark = pytest.mark.filterwarnings("ignore::bridge.diagnostics.InfluenceWarning")


def problem(n=40):
    """Fewer instances than the sample has: the sample is all of them."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(4, 3).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (n,), generator=generator)
    params = {k: p.detach() for k, p in model.named_parameters()}

    def losses(params, batch):
        return F.cross_entropy(torch.func.functional_call(model, params, (batch[0],)), batch[1], reduction="none")

    H = dense_hessian(lambda p, b: losses(p, b).mean(), params, (x, y))
    G = dense_gradients(losses, params, (x, y))
    return model, list(zip(x, y, strict=True)), H, G


def test_the_defaults_are_measured_against_the_hessian_and_plain_gradients():
    model, pairs, H, G = problem()
    influence = SimpleInfluence.from_dataset(model, pairs, loss_fn=F.cross_entropy, progress=False)
    with pytest.warns(InfluenceWarning, match="largest eigenvalue") as warned:
        scores = influence.scores(pairs[:2])
    found = influence.diagnostics

    largest = float(torch.linalg.eigvalsh(H)[-1])
    # A Rayleigh quotient is at most the eigenvalue; eight Lanczos steps of fifteen leave little of it out.
    assert 0.95 * largest <= found.largest_eigenvalue <= largest * (1 + 1e-10)
    assert f"about {found.largest_eigenvalue:.2g}" in str(warned[0].message)
    plain = G[:2] @ G.mT
    expected = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(plain, scores, strict=True)])
    torch.testing.assert_close(found.correlation_with_plain, expected, rtol=1e-9, atol=0)
    assert float(found.correlation_with_plain.min()) > 0.9999


def test_a_few_right_hand_sides_are_compared_with_plain_products():
    model, pairs, _, _ = problem()
    influence = SimpleInfluence.from_dataset(model, pairs, loss_fn=F.cross_entropy, progress=False)
    influence.scores(pairs[: MOST_CORRELATED + 3])
    measured = ~influence.diagnostics.correlation_with_plain.isnan()
    assert measured.tolist() == [True] * MOST_CORRELATED + [False] * 3


def test_the_default_measures_as_many_residuals_as_add_a_quarter():
    model, pairs, _, _ = problem()
    for steps, expected in ((1, 1), (10, 3), (100, 6)):  # 6 solves multiply by 8 examples a step, a residual by 40
        influence = SimpleInfluence.from_dataset(
            model, pairs, loss_fn=F.cross_entropy, progress=False, recursion_depth=steps
        )
        influence.scores(pairs[:6])
        residuals = influence.diagnostics.relative_residual
        assert (~residuals.isnan()).tolist() == [i < expected for i in range(6)]


def test_nothing_is_measured_where_nothing_is_wrong():
    model, pairs, _, _ = problem()
    influence = SimpleInfluence.from_dataset(
        model, pairs, loss_fn=F.cross_entropy, solver="cg", ridge=0.05, progress=False
    )
    influence.scores(pairs[:2])
    assert not influence.diagnostics.problems()
    assert influence.diagnostics.correlation_with_plain.isnan().all()
    assert influence.diagnostics.largest_eigenvalue != influence.diagnostics.largest_eigenvalue


def test_cosines_of_stacked_vectors():
    v = {"w": torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])}
    x = {"w": torch.tensor([[3.0, 0.0], [1.0, 0.0], [1.0, 0.0]])}
    assert measurements.cosines(v, x).tolist() == pytest.approx([1.0, 0.5**0.5, 0.0])
