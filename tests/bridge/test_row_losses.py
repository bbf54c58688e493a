"""Losses of single rows, found by watching the mean being taken."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bridge.row_losses import MEANS, NoRowLossesError, row_losses

N = 5


def of(loss):
    return lambda params, batch: loss(params["z"], *batch)


Z = torch.randn(N, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
CLASSES = torch.tensor([0, 2, 1, 1, 0])
FLAGS = torch.tensor([[0.0, 1.0, 1.0]] * N, dtype=torch.float64)

TAKES: dict = {
    F.cross_entropy: (Z, CLASSES),
    F.nll_loss: (Z.log_softmax(1), CLASSES),
    F.binary_cross_entropy: (Z.sigmoid(), FLAGS),
    F.binary_cross_entropy_with_logits: (Z, FLAGS),
    F.soft_margin_loss: (Z, 2 * FLAGS - 1),
    F.multilabel_soft_margin_loss: (Z, FLAGS),
}


@pytest.mark.parametrize("loss", MEANS, ids=lambda loss: loss.__name__)
def test_rows_are_the_losses_of_batches_of_one(loss):
    z, y = TAKES.get(loss, (Z, FLAGS))
    rows = row_losses(of(loss), {"z": z}, (y,), N)
    alone = torch.stack([loss(z[i : i + 1], y[i : i + 1]) for i in range(N)])
    torch.testing.assert_close(rows, alone)
    torch.testing.assert_close(rows.mean(), loss(z, y))


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        lambda z, y: F.cross_entropy(input=z, target=y.reshape(-1)).reshape(()),
        lambda z, y: {"other": F.mse_loss(z, FLAGS), "loss": F.cross_entropy(z, y)}["loss"],
    ],
    ids=["module", "smoothed", "by name", "beside another"],
)
def test_forms_that_are_known(loss):
    rows = row_losses(of(loss), {"z": Z}, (CLASSES,), N)
    torch.testing.assert_close(rows.mean(), loss(Z, CLASSES))


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: F.cross_entropy(z, y) + 0.1,
        lambda z, y: F.cross_entropy(z, y, reduction="sum"),
        lambda z, y: F.cross_entropy(z, y, weight=torch.ones(3, dtype=z.dtype)),
        lambda z, y: F.cross_entropy(z, y, ignore_index=2),
        lambda z, y: F.cross_entropy(torch.cat([z, z]), torch.cat([y, y])),
        lambda z, y: F.cross_entropy(z, y).mul_(2.0),
        lambda z, y: z.square().mean(),
        lambda z, y: F.cross_entropy(z[0], y[0]),
    ],
    ids=["penalised", "sum", "weighted", "ignored", "twice the rows", "in place", "no loss of torch's", "one row"],
)
def test_others_are_refused(loss):
    with pytest.raises(NoRowLossesError, match="5 rows"):
        row_losses(of(loss), {"z": Z.clone()}, (CLASSES,), N)


def test_a_loss_without_its_rows_warns_as_it_would():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        row_losses(lambda p, b: F.mse_loss(p["z"][:, :1], p["z"]), {"z": Z}, None, N)
    assert any("broadcasting" in str(w.message) for w in caught)
