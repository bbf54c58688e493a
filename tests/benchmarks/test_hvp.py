import pytest
import torch

from benchmarks.hvp.__main__ import TOLERANCE, on, relative_error
from benchmarks.hvp.models import FULL, MODELS, QUICK
from benchmarks.hvp.report import markdown
from benchmarks.hvp.strategies import PLAIN, available
from tests import problems

COMPILED = [name for name in available() if "compiled" in name]


@pytest.mark.parametrize("name", [name for name in available() if name not in COMPILED])
@pytest.mark.parametrize("count", [1, 3])
def test_every_strategy_gives_the_plain_product(name, count):
    problem, vectors = on("cpu", problems.mlp(), count)
    expected = available()[PLAIN](problem, vectors, count)()

    run = available()[name](problem, vectors, count)

    for _ in range(2):
        assert relative_error(run(), expected) <= TOLERANCE[torch.float64]


def test_rows_name_models_that_are_there():
    assert {row.model for row in FULL + QUICK} <= set(MODELS)


def test_a_wrong_product_is_shown_as_wrong_and_not_timed():
    row = {"row": "model", "cells": {}, "failures": {PLAIN: "wrong: relative error 1e+00", "auto": "Error: no"}}

    assert markdown([row]).split("\n")[-1] == "| model | wrong | - |"
