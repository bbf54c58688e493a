import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from bridge.data import collate
from bridge.functional import Functional
from bridge.session import Session, check_finite
from lissa import SolverError
from tests.bridge.fakes import linear, pairs


def session(loss_fn=None):
    def mean_loss(params, batch):
        x, y = batch
        return F.cross_entropy(x @ params["weight"].T, y)

    params = {"weight": linear().weight.detach()}
    model = Functional(params, loss_fn or mean_loss, torch.device("cpu"), None, None)
    return Session(model, partial(collate), show=False)


def test_examples_are_batches_of_one_with_their_indices():
    data = pairs(5)
    seen = []
    for indices, (x, y) in session().examples(data, size=2, description="test"):
        assert x.shape == (len(indices), 1, 4)
        assert y.shape == (len(indices), 1)
        assert all(torch.equal(x[row, 0], data[i][0]) for row, i in enumerate(indices))
        seen += indices
    assert seen == list(range(5))


def test_an_instance_that_fails_by_itself_is_named():
    data = pairs(6)
    data[4] = (torch.ones(3, dtype=torch.float64), torch.tensor(0))
    work = session()
    with pytest.raises(ValueError, match="Training instance 4: RuntimeError"), work.naming("training", data, range(6)):
        work.batch(data)


def test_instances_that_fail_together_alone_are_said_to():
    data = [(torch.ones(n, 4, dtype=torch.float64), torch.zeros(n, dtype=torch.int64)) for n in (1, 2, 3)]
    work = session(lambda params, batch: (batch[0] @ params["weight"].T).square().mean())
    with (
        pytest.raises(ValueError, match=r"instances 0, 1, 2 work one by one but not in one batch.*collate_fn"),
        work.naming("training", data, range(3)),
    ):
        work.batch(data)


def test_an_error_that_is_no_instances_fault_is_kept():
    data = pairs(3)
    with pytest.raises(RuntimeError, match="elsewhere"), session().naming("training", data, [0]):
        raise RuntimeError("elsewhere")
    with pytest.raises(RuntimeError, match="elsewhere"), session().naming("training", data, range(3)):
        raise RuntimeError("elsewhere")
    with pytest.raises(SolverError), session().naming("training", data, range(3)):
        raise SolverError("diverged", None)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_named(bad):
    values = torch.ones(2, 3)
    check_finite("score", "training", [5, 6, 7], values)
    values[1, 1] = bad
    with pytest.raises(ValueError, match="Training instance 6: its score is not finite"):
        check_finite("score", "training", [5, 6, 7], values)


def test_a_finite_loss_with_a_gradient_that_is_not_is_named():
    work = session(lambda params, batch: (params["weight"] * 0).square().sum().sqrt())  # the slope of a root at 0
    assert work.losses("test", pairs(2), [1]) == {1: 0.0}
    with pytest.raises(ValueError, match="Test instance 1: its gradient is not finite"):
        work.loss_and_gradient("test", pairs(2), 1)
