"""Products in bfloat16: close to those in float32, measured, and nowhere where they were not asked for."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bridge import SimpleInfluence
from bridge.functional import functional
from bridge.precision import lowered
from lissa import tree
from lissa.stacked import stacked_hvp
from tests.bridge.fakes import linear, pairs

pytestmark = pytest.mark.filterwarnings("ignore::bridge.diagnostics.InfluenceWarning")

UNIT = 2.0**-8
"""Half the distance of neighbouring numbers in bfloat16, relative to them."""


def wide():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 3))


def of(model, **settings):
    data = [(x.float(), y) for x, y in pairs(60)]
    settings = {"ridge": 0.5, "scale": 20.0, "recursion_depth": 200, "progress": False, **settings}
    return SimpleInfluence.from_dataset(model, data, loss_fn=F.cross_entropy, **settings)


TESTS = [(x.float(), y) for x, y in pairs(5, seed=1)]


def test_products_are_rounded_and_stay_in_float32():
    module = wide()
    model = functional(module, [name for name, _ in module.named_parameters()], output_loss=F.cross_entropy)
    x, y = zip(*TESTS, strict=True)
    batch = torch.stack(x), torch.stack(y)
    vectors = tree.normal_like(
        tree.map(lambda p: p.expand(3, *p.shape), model.params), generator=torch.Generator().manual_seed(0)
    )
    exact = stacked_hvp(model.loss_fn, model.params, batch, vectors)
    low = stacked_hvp(lowered(model).loss_fn, model.params, batch, vectors)
    for k in range(3):
        a, b = (tree.map(lambda t, k=k: t[k], p) for p in (exact, low))
        assert all(t.dtype == torch.float32 for t in b.values())
        # A product passes through five roundings or so of factors and results.
        assert 0 < float(tree.norm(tree.sub(a, b)) / tree.norm(a)) < 5 * UNIT


def test_the_solution_is_close_and_the_error_is_measured():
    expected = of(wide()).scores(TESTS)
    influence = of(wide(), mixed_precision=True, measure_residual=True)
    scores = influence.scores(TESTS)
    known = influence.diagnostics
    assert 0 < known.product_error < 5 * UNIT
    assert "Products in bfloat16 have a relative error of" in known.in_words()
    # (H + E + d)^-1 v differs from (H + d)^-1 v by E / d at most relative to it, and H is not far above the damping.
    assert float((scores - expected).norm() / expected.norm()) < 10 * UNIT
    exact = of(wide(), measure_residual=True)
    exact.scores(TESTS)
    assert float((known.relative_residual - exact.diagnostics.relative_residual).abs().max()) < 10 * UNIT


def test_float32_says_nothing_of_it():
    influence = of(wide())
    influence.scores(TESTS)
    assert influence.diagnostics.product_error == 0.0
    assert "bfloat16" not in influence.diagnostics.in_words()


def test_the_closed_forms_of_a_last_layer_stay_in_float32():
    influence = of(linear(dtype=torch.float32), mixed_precision=True)
    assert torch.equal(influence.scores(TESTS), of(linear(dtype=torch.float32)).scores(TESTS))
    assert influence.diagnostics.product_error == 0.0


@pytest.mark.parametrize(
    "settings",
    [
        {"solver": "cg"},
        {"solver": "auto", "scale": "auto", "recursion_depth": "auto"},
        {"scale": "auto"},
        {"recursion_depth": "auto"},
        {"compat": "allennlp", "ridge": None},
    ],
)
def test_it_is_for_lissa_with_numbers(settings):
    with pytest.raises(ValueError, match="mixed_precision=True"):
        of(wide(), mixed_precision=True, **settings)


def test_it_is_for_float32():
    with pytest.raises(ValueError, match="float64"):
        of(wide().double(), mixed_precision=True)
