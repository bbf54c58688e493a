import random

import torch
import torch.nn.functional as F

from bridge.compat import shuffled_passes, train_mode_gradients
from bridge.functional import Functional


def test_passes_are_those_of_one_list_shuffled_again_and_again():
    random.seed(5)
    stream = shuffled_passes(10, 4)
    drawn = [next(stream) for _ in range(7)]
    random.seed(5)
    order = list(range(10))
    expected = []
    for _ in range(3):
        random.shuffle(order)
        expected += [order[0:4], order[4:8], order[8:10]]
    assert drawn == expected[:7]


def test_nothing_is_drawn_before_the_first_batch_is_asked_for():
    random.seed(5)
    before = random.getstate()
    shuffled_passes(10, 4)
    assert random.getstate() == before


def test_the_parameters_of_the_first_instance_count():
    params = {name: torch.tensor(2.0) for name in ("all", "first", "later")}

    def loss_fn(params, batch):
        return params["all"] * params["first" if batch == 0 else "later"]

    model = Functional(params, loss_fn, torch.device("cpu"), None, None)
    found = [
        (loss.item(), {k: g.item() for k, g in grads.items()}) for loss, grads in train_mode_gradients(model, [0, 1])
    ]
    assert found == [(4.0, {"all": 2.0, "first": 2.0}), (4.0, {"all": 2.0, "first": 0.0})]


def test_each_instance_draws_once_from_the_global_generator():
    params = {"w": torch.ones(100)}
    model = Functional(params, lambda p, _: F.dropout(p["w"], 0.5).sum(), torch.device("cpu"), None, None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        grads = [g["w"] for _, g in train_mode_gradients(model, range(3))]
        torch.manual_seed(0)
        assert all(torch.equal(g, F.dropout(torch.ones(100), 0.5)) for g in grads)
