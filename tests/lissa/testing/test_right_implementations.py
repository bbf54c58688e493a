"""Every law holds for the project's own products, solvers and scores, and for PyTorch's."""

import pytest

from tests.right_implementations import PAIRS, RIGHT


@pytest.mark.parametrize(("name", "law"), PAIRS, ids=str)
def test_the_law_holds(name, law):
    law.check(RIGHT[name][0], max_examples=4)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "law"), PAIRS, ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_law_holds_on_a_thousand_cases(name, law, seed):
    law.check(RIGHT[name][0], max_examples=1000, seed=seed)
