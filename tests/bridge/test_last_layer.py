"""Expansions of the last layer: the same scores as without, whatever the model; and none where they would be wrong."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bridge import SimpleInfluence, last_layer
from bridge.functional import evaluation, functional
from bridge.last_layer import ExpandedRows, Expander, expanded, layer_of
from bridge.row_losses import NoRowLossesError
from tests.bridge.fakes import BagOfWords, Reader, linear, pairs, sentences, two_layers

pytestmark = pytest.mark.filterwarnings("ignore::bridge.diagnostics.InfluenceWarning")

EXACT = {"rtol": 1e-10, "atol": 1e-12}
"""Sums of a few hundred terms in float64, in another order."""


class Reported(nn.Module):
    """Returns its loss, made in the way that is asked for."""

    def __init__(self, loss):
        super().__init__()
        self.first, self.last = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()
        self.loss = loss

    def forward(self, x, y):
        return {"loss": self.loss(self, self.last(self.first(x).tanh()), y)}


def without(monkeypatch):
    monkeypatch.setattr(last_layer, "expanded", lambda *_: None)


def of(model, data, loss_fn=F.cross_entropy, **settings):
    settings = {"ridge": 0.5, "scale": 5.0, "recursion_depth": 40, "progress": False, "lissa_batch_size": 4, **settings}
    return SimpleInfluence.from_dataset(model, data, loss_fn=loss_fn, **settings)


def everything(make, tests):
    """What several calls return, as tensors."""
    outputs = make().interpret_both_ends(tests, k=4)
    ends = torch.tensor([[(e.score, e.loss) for e in (*o.most_helpful, *o.most_harmful)] for o in outputs])
    losses = torch.tensor([o.loss for o in outputs])
    influence = make(measure_residual=True)
    scores = influence.scores(tests)
    residual = influence.diagnostics.relative_residual
    return ends, losses, scores, residual, make().self_influence(range(7)), *make().inverse_hvps(tests).values()


def assert_expanded(make, yes=True):
    with make()._session() as session:
        assert (session.expand is not None) == yes


CASES = {
    "linear": (lambda: linear(), {}),
    "linear, weight alone": (lambda: linear(), {"params_to_freeze": ["bias"]}),
    "linear, bias alone": (lambda: linear(), {"params_to_freeze": ["weight"]}),
    "last of two layers": (two_layers, {"params_to_freeze": ["0"]}),
    "first of two layers": (two_layers, {"params_to_freeze": ["2"]}),
    "two runs": (lambda: linear(), {"num_samples": 2}),
    "cg": (lambda: linear(), {"solver": "cg"}),
    "tuned": (lambda: linear(), {"solver": "auto", "scale": "auto", "recursion_depth": "auto"}),
    "nothing kept": (lambda: linear(), {"max_memory": 400}),
    "little at a time": (lambda: linear(), {"score_batch_size": 3}),
    "mean squares": (lambda: nn.Sequential(two_layers(), nn.Softmax(-1)), {"params_to_freeze": ["0.0"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_results_are_those_of_the_model_itself(monkeypatch, case):
    make_model, settings = CASES[case]
    data, tests = pairs(30), pairs(3, seed=1)
    loss_fn = F.cross_entropy
    if case == "mean squares":
        loss_fn = F.mse_loss
        data, tests = ([(x, F.one_hot(y, 3).double()) for x, y in some] for some in (data, tests))

    def make(**more):
        return of(make_model(), data, loss_fn, **settings, **more)

    assert_expanded(make)
    got = everything(make, tests)
    without(monkeypatch)
    for a, b in zip(got, everything(make, tests), strict=True):
        torch.testing.assert_close(a, b, **EXACT, equal_nan=True)


def test_instances_of_different_lengths(monkeypatch):
    def make(**more):
        return SimpleInfluence(
            BagOfWords(), sentences(50), Reader(), params_to_freeze=["embed"], ridge=0.5, scale=5.0, progress=False,
            recursion_depth=40, **more,
        )  # fmt: skip

    tests = list(Reader().read(sentences(3, seed=1)))
    assert_expanded(make)
    got = everything(make, tests)
    without(monkeypatch)
    for a, b in zip(got, everything(make, tests), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_each_instance_goes_through_the_model_once_a_call():
    seen = []

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = linear()

        def forward(self, x):
            seen.append(len(x))
            return self.net(x)

    influence = of(Watched(), pairs(40), recursion_depth=60, measure_residual=True)
    _ = influence.used_param_names
    seen.clear()
    influence.interpret_instances(pairs(5, seed=1), k=3)
    # The comparison takes 8 instances once as they are and once expanded; then 40 training and 5 test instances.
    assert sum(seen) == 2 * 8 + 40 + 5


def penalised(model, z, y):
    return F.cross_entropy(z, y) + model.last.weight.square().sum()


def weighted(model, z, y):
    return F.cross_entropy(z, y, weight=torch.tensor([1.0, 2.0, 5.0], dtype=z.dtype))


def of_differences(model, z, y):
    """Looks at other rows."""
    return F.cross_entropy(z - z.mean(0), y)


def summed(model, z, y):
    return F.cross_entropy(z, y, reduction="sum")


def called_twice(model, z, y):
    return F.cross_entropy(z + model.last(torch.ones(1, 5).double()), y)


def elsewhere_too(model, z, y):
    return F.cross_entropy(z + model.last.weight.sum(1), y)


def in_place(model, z, y):
    loss = F.cross_entropy(z, y)
    loss *= 3
    return loss


def left_out(model, z, y):
    return F.cross_entropy(z, torch.where(torch.arange(len(y)) == 1, -100, y))


@pytest.mark.parametrize(
    "loss", [penalised, weighted, of_differences, summed, called_twice, elsewhere_too, in_place, left_out]
)
def test_a_loss_that_is_no_mean_over_rows_of_functions_of_the_outputs_is_left_alone(loss):
    data = [{"x": x, "y": y} for x, y in pairs(12)]

    def make():
        return SimpleInfluence.from_dataset(
            Reported(loss), data, params_to_freeze=["first"], ridge=0.5, scale=50.0, recursion_depth=3, progress=False
        )

    assert_expanded(make, yes=False)


def test_a_plain_reported_loss_is_expanded():
    data = [{"x": x, "y": y} for x, y in pairs(12)]

    def make():
        return SimpleInfluence.from_dataset(
            Reported(lambda _, z, y: nn.CrossEntropyLoss()(z, y)), data, params_to_freeze=["first"], progress=False
        )

    assert_expanded(make)


def test_which_layer_has_the_parameters():
    model = two_layers()
    layer, names = layer_of(model, ["2.weight", "2.bias"]) or (None, None)
    assert layer is model[2]
    assert names == ("2.weight", "2.bias")
    assert layer_of(model, ["0.weight"]) == (model[0], ("0.weight", None))
    assert layer_of(model, ["0.weight", "2.weight"]) is None
    assert layer_of(nn.Linear(3, last_layer.MOST_OUTPUTS + 1), ["weight", "bias"]) is None
    assert layer_of(nn.Conv1d(2, 3, 1), ["weight"]) is None
    tied = nn.ModuleDict({"embed": nn.Embedding(3, 4), "out": nn.Linear(4, 3, bias=False)})
    tied["out"].weight = tied["embed"].weight
    assert layer_of(tied, ["embed.weight"]) is None


def test_the_model_is_found_wrong_by_its_derivatives():
    """A hook of the user's changes what the layer gives after ours has seen it, in a way that rows do not show."""
    model = Reported(lambda m, z, y: F.cross_entropy(z * (1 + m.last.bias.sum()), y))
    rows = SimpleInfluence.from_dataset(model, [{"x": x, "y": y} for x, y in pairs(12)], progress=False)._train
    with evaluation(model) as module:
        functions = functional(module, ["last.weight", "last.bias"])
        assert expanded(functions, module, rows, range(12)) is None


def test_rows_of_a_stretch_are_views_and_others_are_taken():
    model = linear()
    with evaluation(model) as module:
        functions = functional(module, ["weight", "bias"], output_loss=F.cross_entropy)
        rows = ExpandedRows(of(model, pairs(9))._train, Expander(functions, module))
        before = rows.batch([5, 2, 2])
        rows.gather()
        assert rows.gathered
        assert rows.kept_bytes == 9 * rows._expand.row_bytes
        after = rows.batch([5, 2, 2])
        for a, b in zip(before, after, strict=True):
            torch.testing.assert_close(a, b)
        assert rows.batch(range(3, 6)).inputs.data_ptr() == rows.batch(range(9)).inputs[3].data_ptr()
        indices = [found for found, _ in rows.examples(4)]
        assert indices == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]


def test_a_layer_along_a_sequence_has_no_row_for_each_instance():
    class Along(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = linear()

        def forward(self, x):
            return self.net(x.unsqueeze(1).expand(-1, 2, -1)).mean(1)

    with evaluation(Along()) as module:
        functions = functional(module, ["net.weight", "net.bias"], output_loss=F.cross_entropy)
        x, y = zip(*pairs(4), strict=True)
        with pytest.raises(NoRowLossesError, match="row for each instance"):
            Expander(functions, module.net)((torch.stack(x), torch.stack(y)), 4)
