"""`solver="gauss-newton"` gives the dense Gauss-Newton answer, for every kind of output, and refuses what has none."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bridge import SimpleInfluence, gauss_newton
from tests.oracles import relative_error

RIDGE, N, T = 0.05, 30, 3


def mlp(outputs, *last):
    """In float64, and not at an optimum."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs), *last).double()


def x_and(y):
    generator = torch.Generator().manual_seed(0)
    return list(zip(torch.randn(len(y), 4, generator=generator, dtype=torch.float64), y, strict=True))


CLASSES = torch.arange(N + T) % 3
REALS = torch.linspace(-1, 1, N + T, dtype=torch.float64)
KINDS = {
    "cross-entropy": (mlp(3), F.cross_entropy, CLASSES),
    "two classes, as a module": (mlp(2), nn.CrossEntropyLoss(), CLASSES % 2),
    "cross-entropy of another name": (mlp(3), lambda z, y: F.nll_loss(z.log_softmax(1), y), CLASSES),
    "one number, squared error": (mlp(1, nn.Flatten(0)), F.mse_loss, REALS),
    "two numbers, squared error": (mlp(2), F.mse_loss, torch.stack([REALS, REALS.square()], 1)),
    "binary, with logits": (
        mlp(1, nn.Flatten(0)),
        F.binary_cross_entropy_with_logits,
        (REALS > 0).to(torch.float64),
    ),
}  # fmt: skip


def dense(model, loss, pairs, ridge):
    """`G_test (G + ridge I)^-1 G_train^T` of the last `T` and the first `N` pairs, example by example."""
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    sizes = [p.numel() for p in model.parameters()]

    def output(flat, x):
        parts = dict(zip(dict(model.named_parameters()), flat.split(sizes), strict=True))
        shaped = {name: parts[name].view_as(p) for name, p in model.named_parameters()}
        return torch.func.functional_call(model, shaped, (x.unsqueeze(0),))

    G, gradients = torch.zeros(len(flat), len(flat), dtype=flat.dtype), []
    for i, (x, y) in enumerate(pairs):
        of_outputs = lambda z: loss(z, torch.as_tensor(y).unsqueeze(0))  # noqa: B023, E731
        z = output(flat, x)
        J = torch.func.jacrev(output)(flat, x).reshape(z.numel(), -1)
        gradients.append(J.T @ torch.func.grad(of_outputs)(z).flatten())
        if i < N:
            D = torch.autograd.functional.hessian(of_outputs, z).reshape(z.numel(), z.numel())
            G += J.T @ D @ J / N
    gradients = torch.stack(gradients)
    return gradients[N:] @ torch.linalg.solve(G + ridge * torch.eye(len(flat), dtype=G.dtype), gradients[:N].T), G


def influence(model, loss, train, **more):
    more = {"ridge": RIDGE, "progress": False, "solver": "gauss-newton", **more}
    return SimpleInfluence.from_dataset(model, train, loss_fn=loss, **more)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_dense_matrix(kind):
    model, loss, y = KINDS[kind]
    pairs = x_and(y)
    expected, _ = dense(model, loss, pairs, RIDGE)
    interpreter = influence(model, loss, pairs[:N])

    scores = interpreter.scores(pairs[N:])
    output = interpreter.interpret(pairs[N], k=4)

    assert scores.dtype is torch.float64
    assert relative_error(scores, expected) <= 1e-10
    values, places = expected[0].topk(4)
    assert [entry.score for entry in output.top_k] == pytest.approx(values.tolist(), rel=1e-9)
    assert all(entry.instance is pairs[i] for entry, i in zip(output.top_k, places.tolist(), strict=True))
    assert float(interpreter.diagnostics.relative_residual.max()) <= 1e-10


def test_self_influence_is_the_diagonal():
    model, loss, y = KINDS["cross-entropy"]
    pairs = x_and(y)[:N]
    expected, _ = dense(model, loss, [*pairs, *pairs], RIDGE)
    assert relative_error(influence(model, loss, pairs).self_influence(), expected.diagonal()) <= 1e-10


def test_the_damping_left_open_is_a_tenth_of_the_mean_eigenvalue():
    model, loss, y = KINDS["cross-entropy"]
    pairs = x_and(y)
    _, G = dense(model, loss, pairs, RIDGE)
    ridge = 0.1 * float(G.trace()) / len(G)
    expected, _ = dense(model, loss, pairs, ridge)

    interpreter = influence(model, loss, pairs[:N], ridge="auto")
    scores = interpreter.scores(pairs[N:])

    assert interpreter.diagnostics.damping == pytest.approx(ridge, rel=1e-10)
    # Rounding grows with the largest eigenvalue over the damping, some thousands here.
    assert relative_error(scores, expected) <= 1e-8
    assert "Gauss-Newton matrix of 30 examples" in interpreter.diagnostics.in_words()


class Sum(nn.Module):
    """A model that sees sequences of different lengths and reports logits and its loss, as transformers do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.out = nn.Linear(4, 3).double()

    def forward(self, x, labels):
        logits = self.out(torch.tanh(x).sum(1))
        return {"logits": logits, "loss": F.cross_entropy(logits, labels)}


def padded(rows):
    """Zeros add nothing to the sum."""
    x = nn.utils.rnn.pad_sequence([row["x"] for row in rows], batch_first=True)
    return {"x": x, "labels": torch.tensor([row["labels"] for row in rows])}


def test_lengths_may_differ_and_scores_come_in_the_order_of_the_data():
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randn(1 + i % 3, 4, generator=generator, dtype=torch.float64) for i in range(N + T)]
    rows = [{"x": x, "labels": i % 3} for i, x in enumerate(sequences)]
    model = Sum()
    features = [(torch.tanh(row["x"]).sum(0), torch.tensor(row["labels"])) for row in rows]
    expected, _ = dense(model.out, F.cross_entropy, features, RIDGE)
    interpreter = influence(model, None, rows[:N], collate_fn=padded)
    assert relative_error(interpreter.scores(rows[N:]), expected) <= 1e-10


def test_what_was_not_solved_for_is_refused_in_words():
    model, loss, y = KINDS["cross-entropy"]
    pairs = x_and(y)
    interpreter = influence(model, loss, pairs[:N])
    for call in (interpreter.inverse_hvps, interpreter.interpret_with_error_bars):
        with pytest.raises(ValueError, match="finds scores without the solutions behind them"):
            call(pairs[N:])
    assert interpreter.scores([]).shape == (0, N)


class OnlyLoss(Sum):
    """Reports no logits."""

    def forward(self, x, labels):
        return {"loss": super().forward(x, labels)["loss"]}


class Penalised(Sum):
    """Its loss is more than the cross-entropy of its logits."""

    def forward(self, x, labels):
        found = super().forward(x, labels)
        return {**found, "loss": found["loss"] + self.out.weight.square().sum()}


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (OnlyLoss(), TypeError, r"returns a mapping or object with `logits` of shape \(B, m\), got NoneType"),
        (Penalised(), ValueError, "the mean over examples of a loss of the model's outputs"),
    ],
)
def test_a_loss_that_is_not_of_the_logits_is_refused(model, error, message):
    rows = [{"x": torch.ones(1, 4, dtype=torch.float64) * i, "labels": i % 3} for i in range(4)]
    with pytest.raises(error, match=message):
        influence(model, None, rows).scores(rows)


def test_weights_of_classes_are_refused():
    """Such a loss is a weighted mean over the batch, so no mean of the examples' own losses."""
    model, _, y = KINDS["cross-entropy"]
    pairs = x_and(y)
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.1], dtype=torch.float64))
    with pytest.raises(ValueError, match="the mean over examples"):
        influence(model, weighted, pairs[:N]).scores(pairs[N:])


def test_too_many_outputs_are_refused_before_the_work(monkeypatch):
    monkeypatch.setattr(gauss_newton, "MOST_OUTPUTS", 50)
    monkeypatch.setattr(gauss_newton, "output_gram", lambda *_: pytest.fail("the work was begun"))
    model, loss, y = KINDS["cross-entropy"]
    pairs = x_and(y)
    with pytest.raises(ValueError, match="at most 50, got 60"):
        influence(model, loss, pairs[:N]).scores(pairs[N:])


@pytest.mark.parametrize("role", ["training", "test"])
def test_an_instance_with_nan_is_named(role):
    model, loss, y = KINDS["cross-entropy"]
    pairs = x_and(y)
    i = 7 if role == "training" else N + 1
    pairs[i] = (torch.full((4,), torch.nan, dtype=torch.float64), pairs[i][1])
    with pytest.raises(ValueError, match=f"{role.capitalize()} instance {i if i < N else i - N}"):
        influence(model, loss, pairs[:N]).scores(pairs[N:])
