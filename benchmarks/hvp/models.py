"""The rows of the benchmark: zoo models at sizes that take real work. To add one, write an entry."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from tests import problems
from tests.problems import Problem

MODELS: dict[str, Callable[..., Problem]] = {
    "softmax regression, P = 7,850": partial(problems.softmax_regression, features=784, classes=10),
    "MLP, P = 85,170": partial(problems.mlp, features=784, widths=(100, 60), classes=10),
    "transformer, 2 x 128, 32 tokens": partial(
        problems.transformer, width=128, heads=4, layers=2, tokens=32, vocabulary=100
    ),
    "decoder (SDPA), 1 x 64, 16 tokens": partial(
        problems.decoder, width=64, heads=4, layers=1, tokens=16, vocabulary=100
    ),
    "CNN, 28 x 28": partial(problems.cnn, size=28, channels=8),
    "GRU, padded, 12 tokens": partial(problems.recurrent, kind=nn.GRU, packed=False, tokens=12, width=32),
    "LSTM, packed, 12 tokens": partial(problems.recurrent, kind=nn.LSTM, packed=True, tokens=12, width=32),
    "Embedding(sparse=True)": partial(problems.bag_of_words, kind=nn.Embedding, vocabulary=2000, width=32, tokens=20),
}
"""Builders by the name they have in the table; all take `seed`, `dtype` and `batch_size`."""


class Row(NamedTuple):
    """One row: a model, its batch size, the number of vectors and the dtype."""

    model: str
    batch_size: int
    vectors: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.model}; batch {self.batch_size}, {self.vectors} vectors, {str(self.dtype)[6:]}"


SOFTMAX, MLP, TRANSFORMER, DECODER, CNN, GRU, LSTM, SPARSE = MODELS

QUICK = [Row(SOFTMAX, 8, 1), Row(SOFTMAX, 8, 16), Row(MLP, 8, 1), Row(MLP, 64, 1), Row(MLP, 64, 16)]
"""Under two minutes."""

FULL = [
    Row(SOFTMAX, 8, 1),
    Row(SOFTMAX, 8, 16),
    Row(SOFTMAX, 64, 1),
    Row(MLP, 8, 1),
    Row(MLP, 8, 16),
    Row(MLP, 64, 1),
    Row(MLP, 64, 16),
    Row(MLP, 64, 1, torch.float64),
    Row(TRANSFORMER, 8, 1),
    Row(TRANSFORMER, 8, 16),
    Row(DECODER, 8, 1),
    Row(CNN, 16, 1),
    Row(CNN, 16, 4),
    Row(GRU, 8, 1),
    Row(LSTM, 8, 1),
    Row(SPARSE, 8, 1),
]
"""The default table."""
