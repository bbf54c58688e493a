"""Layers with a trap each go through the bridge, and come out as they were: scores are gradients times a solution."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bridge import SimpleInfluence
from tests.bridge.fakes import Watch

pytestmark = pytest.mark.filterwarnings("ignore::bridge.diagnostics.InfluenceWarning")


class OfTokens(nn.Module):
    """Embedded tokens, `mix`ed into one vector, and a linear layer."""

    def __init__(self, mix, out=None, features=4):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.mix = mix
        self.out = out or nn.Linear(features, 3)

    def forward(self, x):
        return self.out(self.mix(self.embed(x)))


class Mean(nn.Module):
    def forward(self, x):
        return torch.tanh(x.mean(1))


class NoisyMean(Mean):
    def forward(self, x):
        return super().forward(x) + 0 * torch.rand(1)


class LastState(nn.Module):
    def __init__(self, cls):
        super().__init__()
        self.rnn = cls(4, 4, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0][:, -1]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attend(x, x, x, need_weights=False)[0].mean(1)


class Bag(nn.Module):
    def __init__(self, sparse):
        super().__init__()
        self.embed, self.out = nn.EmbeddingBag(9, 4, sparse=sparse), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.embed(x)))


class Convolution(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Embedding(9, 4), nn.Conv1d(5, 3, 2), nn.BatchNorm1d(3), nn.Tanh(), nn.MaxPool1d(2), nn.Flatten(),
            nn.Dropout(0.5), nn.Linear(3, 3),
        )  # fmt: skip


MODELS = {
    "lstm": lambda: OfTokens(LastState(nn.LSTM)),
    "gru": lambda: OfTokens(LastState(nn.GRU)),
    "attention": lambda: OfTokens(Attention()),
    "bag": lambda: Bag(False),
    "sparse bag": lambda: Bag(True),
    "convolution, batch norm and dropout": Convolution,
    "weight norm": lambda: OfTokens(Mean(), nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))),
    "spectral norm": lambda: OfTokens(Mean(), nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))),
}


@pytest.fixture(autouse=True)
def _seeded_float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    torch.set_default_dtype(before)


def tokens():
    return [(torch.randint(9, (5,)), torch.tensor(i % 3)) for i in range(9)]


def interpreter(model, data):
    return SimpleInfluence.from_dataset(
        model, data, loss_fn=F.cross_entropy, ridge=2.0, scale=6.0, recursion_depth=120, lissa_batch_size=9,
        progress=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_gradients_times_a_solution(name):
    data = tokens()
    model = MODELS[name]()
    watch = Watch(model)
    influence = interpreter(model, data)
    scores = influence.scores(data[:2])
    # It contracts by 1 - 2/6 a step at worst: (2/3)^120 is 1e-21. A bag's Hessian is a difference of gradients, 1e-10.
    assert float(influence.diagnostics.relative_residual.max()) < 1e-9

    model.eval()
    gradients = torch.stack([
        torch.cat([g.reshape(-1).to_dense() for g in _gradients(model, row)]) for row in data
    ])  # fmt: skip
    model.train()
    x = torch.cat([t.reshape(2, -1) for t in influence.inverse_hvps(data[:2]).values()], 1)
    torch.testing.assert_close(scores, x @ gradients.T, rtol=1e-8, atol=1e-10)
    assert watch.changes() == []


def _gradients(model, row):
    loss = F.cross_entropy(model(row[0].unsqueeze(0)), row[1].unsqueeze(0))
    return [g.to_dense() if g.is_sparse else g for g in torch.autograd.grad(loss, list(model.parameters()))]


def test_a_model_that_draws_random_numbers_is_refused_and_advances_no_global_state():
    data, model = tokens(), OfTokens(NoisyMean())
    watch = Watch(model)
    influence = interpreter(model, data)
    assert len(influence.train_instances) == 9
    with pytest.raises(ValueError, match="must be deterministic"):
        influence.interpret(data[0])
    assert watch.changes() == []
