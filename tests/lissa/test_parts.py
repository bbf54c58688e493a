"""Rows some at a time."""

import pytest
import torch

from lissa.parts import row_parts

MOST = {"cpu": 12, "cuda": 8}


@pytest.mark.parametrize(("width", "sizes"), [(1, [7]), (4, [3, 3, 1]), (5, [2, 2, 2, 1]), (99, [1] * 7)])
def test_as_many_rows_as_make_up_what_a_device_holds_at_least_one(width, sizes):
    x, y = torch.arange(14.0).reshape(7, 2), torch.arange(7)
    found = [*row_parts(width, x, y, most=MOST)]
    assert [len(a) for a, _ in found] == [len(b) for _, b in found] == sizes
    assert torch.equal(torch.cat([a for a, _ in found]), x)
    assert torch.equal(torch.cat([b for _, b in found]), y)


def test_parts_are_views():
    x = torch.zeros(3, 1)
    for (part,) in row_parts(12, x, most=MOST):
        part.add_(1)
    assert torch.equal(x, torch.ones(3, 1))


def test_another_type_of_device_is_taken_for_a_gpu():
    assert [len(x) for (x,) in row_parts(4, torch.empty(3, 1, device="meta"), most=MOST)] == [2, 1]
