"""AllenNLP 2.10.1's own order of randomness, for those who want its numbers run for run.

Here, and only here, Python's global random state is read, and gradients are taken in train mode.
"""

import random
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from bridge.functional import Functional, loss_and_used_gradient
from lissa import Batch, Params


def shuffled_passes(n: int, batch_size: int) -> Iterator[list[int]]:
    """An endless stream of batches of indices: one list, shuffled anew by `random.shuffle` before each pass."""
    order = list(range(n))
    while True:
        random.shuffle(order)
        for start in range(0, n, batch_size):
            yield order[start : start + batch_size]


def train_mode_gradients(model: Functional, batches: Iterable[Batch]) -> Iterator[tuple[Tensor, Params]]:
    """`L_i, grad L_i` of batches of one, in order, with dropout drawn from the global generator.

    As in AllenNLP, only the parameters that the first instance uses count: the gradients in others are left out.
    """
    params, names = model.params, []
    for number, batch in enumerate(batches):
        loss, used = loss_and_used_gradient(model.loss_fn, params, batch)
        if number == 0:
            names = list(used)
        yield loss, {name: used[name] if name in used else torch.zeros_like(params[name]) for name in names}
