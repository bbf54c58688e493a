"""How batches are cut into stretches, and in which form each leaf's iterates are."""

import math

import pytest
import torch
import torch.nn.functional as F

from lissa import Expansion, LastLayer
from lissa.iterates import LookedUp, Multiplied, Whole
from lissa.stretches import MOST_DAMPED, SHRINKS, Expanded, Graphs, in_lists, most_rows, of_expansions

D, M = 3, 2
MOST = most_rows(D)


def expanded(rows):
    inputs = torch.ones(rows, D)
    return Expanded(Expansion(inputs, torch.ones(rows), torch.ones(rows, M), torch.eye(M).expand(rows, M, M)))


def sizes(batches, c, most):
    return [[len(each.batch.losses) for each in some] for some in in_lists(batches, c, most)]


@pytest.mark.parametrize(
    ("rows", "c", "most", "expected"),
    [
        ([1, 1, 1, 1, 1], 0.0, 2, [[1, 1], [1, 1], [1]]),
        ([MOST // 2, MOST // 2, MOST // 2], 0.0, 9, [[MOST // 2, MOST // 2], [MOST // 2]]),
        ([1, MOST + 1, 1], 0.0, 9, [[1], [MOST + 1], [1]]),
        ([1, 1], MOST_DAMPED + 0.01, 9, [[1], [1]]),
        ([], 0.0, 9, []),
    ],
    ids=["steps", "rows", "one too large", "strong damping", "none"],
)
def test_a_stretch_ends_where_the_next_batch_is_one_too_many(rows, c, most, expected):
    assert sizes(map(expanded, rows), c, most) == expected


def test_the_decay_of_a_stretch_leaves_enough_to_divide_by():
    for c in (0.5, 0.1, 0.01):
        longest = max(map(len, in_lists([expanded(1)] * 40, c, 40)))
        assert (1 - c) ** longest >= SHRINKS
        assert longest == min(40, math.floor(math.log(SHRINKS) / math.log(1 - c)))


def test_expansions_are_taken_in_outputs_unless_alone():
    h = {"W": torch.ones(1, M, D), "b": torch.ones(1, M)}
    layer = LastLayer("W", "b")
    several = of_expansions(layer, [expanded(2), expanded(3)], 0.0, 0.1).begin(h, h, dict(h))
    assert [type(each) for each in several.values()] == [Multiplied]
    alone = of_expansions(layer, [expanded(2)], 0.0, 0.1).begin(h, h, {k: t.clone() for k, t in h.items()})
    assert {k: type(each) for k, each in alone.items()} == {"W": Whole, "b": Whole}


PARAMS = {"w": torch.ones(M, D), "table": torch.ones(5, M), "b": torch.ones(M)}


def loss_fn(params, batch):
    x, words = batch
    z = F.linear(x, params["w"], params["b"]) * F.embedding(words, params["table"])
    return z.exp().mean() if x[0, 0] > 0 else z.exp().mean() + params["w"].pow(4).sum()


def batch(rows, sign=1.0):
    return sign * torch.ones(rows, D), torch.zeros(rows, dtype=torch.long)


def forms(batches, c=0.0):
    graphs = Graphs("a test", loss_fn, PARAMS)
    stretch = graphs.stretch([graphs.of(each) for each in batches], c, 0.1)
    h = {k: p.unsqueeze(0) for k, p in PARAMS.items()}
    return {k: type(each) for k, each in stretch.begin(h, h, {k: t.clone() for k, t in h.items()}).items()}


def test_leaves_are_taken_in_the_form_in_which_all_batches_see_them():
    assert forms([batch(2), batch(3)]) == {"w": Multiplied, "table": LookedUp, "b": Whole}
    assert forms([batch(2), batch(3, sign=-1.0)]) == {"w": Whole, "table": LookedUp, "b": Whole}
    assert forms([batch(MOST + 1)]) == {"w": Whole, "table": LookedUp, "b": Whole}
    assert set(forms([batch(2)], c=MOST_DAMPED + 0.1).values()) == {Whole}
