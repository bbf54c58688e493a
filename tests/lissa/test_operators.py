"""Means of products over batches equal the product on all the data, ragged or not."""

from functools import partial

import pytest
import torch

from lissa import hvp, mean_matvec
from lissa.operators import damped
from lissa.sampling import take
from tests.oracles import flatten, relative_error
from tests.problems import random_vector, softmax_regression

PROBLEM = softmax_regression(batch_size=13)
MATVEC = partial(hvp, PROBLEM.loss_fn, PROBLEM.params)
V = random_vector(PROBLEM)


@pytest.mark.parametrize("size", [1, 4, 5, 13, 20])
def test_mean_over_ragged_batches_is_the_product_on_all_the_data(size):
    batches = [take(PROBLEM.batch, slice(i, i + size)) for i in range(0, 13, size)]
    got = mean_matvec(MATVEC, batches)(V)
    assert relative_error(flatten(got), flatten(MATVEC(PROBLEM.batch, V))) <= 1e-14


def test_weights_count_the_examples_of_opaque_batches():
    parts = {"head": slice(0, 3), "tail": slice(3, 13)}

    def matvec(name, v):
        return MATVEC(take(PROBLEM.batch, parts[name]), v)

    expected = flatten(MATVEC(PROBLEM.batch, V))
    assert relative_error(flatten(mean_matvec(matvec, parts, weights=[3, 10])(V)), expected) <= 1e-14
    assert relative_error(flatten(mean_matvec(matvec, parts)(V)), expected) > 1e-3  # names have no sizes: equal weights


def test_damped():
    got = damped(partial(MATVEC, PROBLEM.batch), 0.7)(V)
    expected = flatten(MATVEC(PROBLEM.batch, V)) + 0.7 * flatten(V)
    assert relative_error(flatten(got), expected) <= 1e-15


@pytest.mark.parametrize(
    ("batches", "weights", "words"),
    [
        ([], None, "at least one batch"),
        ([torch.ones(2)], [1, 2], "one number a batch, got 2 for 1"),
        ([torch.ones(2)], [0], "must be > 0"),
        ([torch.ones(2), "opaque"], None, "weights="),
    ],
)
def test_bad_arguments_are_named(batches, weights, words):
    with pytest.raises(ValueError, match=words):
        mean_matvec(MATVEC, batches, weights=weights)
