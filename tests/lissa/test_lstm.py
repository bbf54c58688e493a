"""`nn.LSTM` inside `DirectionalLSTM` is the one outside, and so are its derivatives."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lissa import hvp, lstm, lstm_layer, stacked_hvp, tree
from lissa.influence import influence_scores
from lissa.lstm import DirectionalLSTM, with_directional_lstm

FORMS = {
    "packed": {},
    "packed, two layers": {"num_layers": 2},
    "packed, both directions": {"bidirectional": True},
    "packed, two layers, both directions, no bias": {"num_layers": 2, "bidirectional": True, "bias": False},
    "padded": {"padded": True},
    "padded, batch first": {"padded": True, "batch_first": True},
    "padded, both directions": {"padded": True, "bidirectional": True},
}
LENGTHS = torch.tensor([4, 3, 3, 1])


def problem(padded=False, **form):
    """A loss of all that an LSTM returns, of its weights, its input and its initial states."""
    g = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.LSTM(2, 3, **form).double()
    names = [name for name, _ in module.named_parameters()]
    states = (module.num_layers * (1 + module.bidirectional), 4, 3)
    shapes = {"x": (4, 4, 2), "h": states, "c": states}
    params = {name: p.detach() for name, p in module.named_parameters()}
    params |= {name: torch.randn(*shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}

    def loss_fn(params, batch):
        x = params["x"] if padded else pack_padded_sequence(params["x"], LENGTHS)
        y, last = functional_call(module, {name: params[name] for name in names}, (x, (params["h"], params["c"])))
        y = pad_packed_sequence(y)[0] if isinstance(y, PackedSequence) else y
        return sum((t * (1 + torch.arange(t.numel()).reshape(t.shape) % 7)).sin().mean() for t in (y, *last))

    return loss_fn, params


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_is_that_of_torch(form):
    loss_fn, params = problem(**FORMS[form])
    with DirectionalLSTM():
        got = loss_fn(params, None)
    torch.testing.assert_close(got, loss_fn(params, None))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_products_are_those_of_torch(form, count):
    loss_fn, params = problem(**FORMS[form])
    g = torch.Generator().manual_seed(1)
    vectors = tree.map(lambda p: torch.randn(count, *p.shape, generator=g, dtype=p.dtype), params)
    got = stacked_hvp(loss_fn, params, None, vectors)
    for k in range(count):
        one = hvp(loss_fn, params, None, tree.map(lambda t, k=k: t[k], vectors), mode="double-backward")
        for key, expected in one.items():
            # Float64, a few hundred terms of order one.
            torch.testing.assert_close(got[key][k], expected, rtol=1e-10, atol=1e-12)


def test_scores_are_inner_products_of_gradients():
    module = nn.LSTM(2, 3).double()
    params = {name: p.detach() for name, p in module.named_parameters()}
    x = torch.randn(4, 5, 2, dtype=torch.float64)
    lengths = torch.tensor([5, 4, 2, 1])

    def losses(params, batch):
        x, lengths = batch
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return functional_call(module, params, (packed,))[1][0][0].square().sum(1)

    ihvp = tree.map(torch.randn_like, params)
    got = influence_scores(losses, params, ihvp, (x, lengths), method="double-vjp")
    for i in range(4):
        leaves = tree.map(lambda p: p.clone().requires_grad_(), params)
        gradient = torch.autograd.grad(losses(leaves, (x[i : i + 1], lengths[i : i + 1])).sum(), list(leaves.values()))
        expected = tree.vdot(dict(zip(leaves, gradient, strict=True)), ihvp)
        torch.testing.assert_close(got[i], expected, rtol=1e-10, atol=1e-12)


def count_layers(monkeypatch):
    layers, forward = [], lstm_layer.Layer.forward
    monkeypatch.setattr(lstm_layer.Layer, "forward", staticmethod(lambda *args: layers.append(1) or forward(*args)))
    return layers


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.LSTM(2, 3, proj_size=2), torch.ones(4, 1, 2)),
        (nn.LSTM(2, 3, num_layers=2, dropout=0.5), torch.ones(4, 1, 2)),
        (nn.LSTM(2, 3), torch.ones(4, 0, 2)),
        (nn.GRU(2, 3), torch.ones(4, 1, 2)),
    ],
    ids=["projection", "dropout", "no sequence", "another module"],
)
def test_what_has_another_form_stays_torchs(module, x, monkeypatch):
    layers = count_layers(monkeypatch)
    with DirectionalLSTM():
        module.double()(x.double())
    assert not layers


def test_what_a_transform_works_on_stays_torchs(monkeypatch):
    layers = count_layers(monkeypatch)
    module, x = nn.LSTM(2, 3), torch.ones(4, 1, 2)
    with DirectionalLSTM():
        torch.func.grad(lambda x: module(x)[0].sum())(x)
    assert not layers
    with DirectionalLSTM():
        module(x)
    assert layers == [1]


def test_an_lstm_in_bfloat16_under_autocast_stays_torchs(monkeypatch):
    layers, module, x = count_layers(monkeypatch), nn.LSTM(2, 3), torch.ones(4, 1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        try:
            module(x)
        except RuntimeError as error:
            pytest.skip(f"torch has none on this CPU: {error}")
        with DirectionalLSTM():
            module(x)
    assert not layers


@pytest.mark.parametrize("batch_first", [False, True])
def test_packing_is_that_of_torch(batch_first):
    x = torch.randn(4, 4, 2)
    with DirectionalLSTM():
        got = pack_padded_sequence(x, LENGTHS, batch_first=batch_first)
    expected = pack_padded_sequence(x, LENGTHS, batch_first=batch_first)
    assert torch.equal(got.data, expected.data)
    assert torch.equal(got.batch_sizes, expected.batch_sizes)


@pytest.mark.parametrize("lengths", [[1, 2], [2, 0], [1]], ids=str)
def test_wrong_lengths_are_refused_as_by_torch(lengths):
    x, lengths = torch.ones(4, 2, 3), torch.tensor(lengths)
    with pytest.raises(RuntimeError) as expected:
        pack_padded_sequence(x, lengths)
    with pytest.raises(RuntimeError) as got, DirectionalLSTM():
        pack_padded_sequence(x, lengths)
    assert str(got.value) == str(expected.value)


def test_a_loss_without_an_lstm_is_remembered():
    calls = []

    def loss_fn(params, batch):
        calls.append(len(torch.overrides._get_current_function_mode_stack()))
        return params["w"].sum()

    inside = with_directional_lstm(loss_fn)
    for _ in range(2):
        inside({"w": torch.ones(2)}, None)
    assert calls == [1, 0]
    assert loss_fn in lstm._without_lstm


def test_a_loss_that_cannot_be_remembered_is_called_all_the_same():
    class Loss(tuple):
        __slots__ = ()

        def __call__(self, params, batch):
            return params["w"].sum()

    assert with_directional_lstm(Loss())({"w": torch.ones(2)}, None) == 2
