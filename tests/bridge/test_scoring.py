import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from bridge.checkpoint import Record
from bridge.distributed import Ranks
from bridge.scoring import Columns, TopK, reduced


def parts_of(scores, cuts, reduction):
    edges = [0, *sorted(cuts), scores.shape[1]]
    return [reduction.fold({}, list(range(a, b)), scores[:, a:b]) for a, b in itertools.pairwise(edges) if a < b]


@given(
    values=st.lists(st.integers(-3, 3), min_size=1, max_size=20),
    cuts=st.lists(st.integers(0, 20), max_size=4),
    k=st.integers(0, 6),
    order=st.randoms(use_true_random=False),
)
def test_the_top_k_of_parts_in_any_order_is_that_of_all_with_ties_by_index(values, cuts, k, order):
    scores = torch.tensor([values, values[::-1]], dtype=torch.float64)
    n = len(values)
    parts = parts_of(scores, [min(cut, n) for cut in cuts], TopK(k))
    order.shuffle(parts)
    joined = TopK(k).join(parts)
    for end, sign in (("helpful", -1), ("harmful", 1)):
        for row, got, found in zip(scores.tolist(), joined[f"{end}_indices"], joined[f"{end}_scores"], strict=True):
            expected = sorted(range(n), key=lambda i: (sign * row[i], i))[:k]
            assert got.tolist() == expected
            assert found.tolist() == [row[i] for i in expected]


def test_columns_join_to_the_matrix():
    scores = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    parts = parts_of(scores, [2, 7], Columns())
    assert torch.equal(Columns.matrix(Columns().join([{}, *parts[::-1]]), 3, 10), scores)


def test_what_was_scored_is_not_scored_again_whoever_scored_it():
    scores = torch.randn(2, 23, generator=torch.Generator().manual_seed(0))
    done = [[0, 4], [6, 9], [20, 21]]
    seen = []

    def scored(block):
        seen.extend(block)
        yield list(block), scores[:, block.start : block.stop]

    before = [i for first, last in done for i in range(first, last)]
    known = {"scored": {"done": done, "reduced": TopK(5).fold({}, before, scores[:, before])}}
    found = reduced(
        scored, range(23), block=4, reduction=TopK(5), ranks=Ranks(), record=Record(lambda values: None, known)
    )
    assert sorted(seen + before) == list(range(23))
    assert torch.equal(found["helpful_indices"], scores.argsort(-1, descending=True)[:, :5])
    assert torch.equal(found["harmful_indices"], scores.argsort(-1)[:, :5])
