"""What a result is worth, measured: against explicit products."""

import pytest
import torch
import torch.nn.functional as F

import lissa
from bridge import SimpleInfluence, measurements
from bridge.distributed import Ranks
from lissa import tree
from tests.bridge.fakes import BagOfWords, Reader, dense_problem, sentences

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


@pytest.mark.parametrize("most_rows", [None, 7])
def test_residuals_of_texts_of_all_lengths(most_rows):
    influence = SimpleInfluence(
        BagOfWords(), sentences(40), Reader(), progress=False, ridge=0.5, score_batch_size=most_rows or 1000
    )
    with influence._session() as session:
        params, n = session.model.params, len(influence._train)
        g = torch.Generator().manual_seed(0)
        v, x = (tree.map(lambda p: torch.randn(2, *p.shape, generator=g, dtype=p.dtype), params) for _ in range(2))
        got = measurements.relative_residuals(session, influence._train, 0.5, v, x, count=2, ranks=Ranks())
        for k in range(2):
            v_k, x_k = (tree.map(lambda t, k=k: t[k], stack) for stack in (v, x))
            product = tree.zeros_like(x_k)
            for i in range(n):
                of_one = lissa.hvp(session.model.loss_fn, params, session.batch(influence._train, [i]), x_k)
                product = tree.add_scaled(product, 1 / n, of_one)
            residual = tree.sub(v_k, tree.add_scaled(product, 0.5, x_k))
            assert float(got[k]) == pytest.approx(float(tree.norm(residual) / tree.norm(v_k)), rel=1e-10)
