import torch
from hypothesis import given
from hypothesis import strategies as st

from lissa import ranking_init, ranking_update


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=30), st.integers(0, 12), st.integers(1, 30), st.integers(1, 3))
def test_ranking_equals_sorting_all_scores_however_they_are_cut(values, k, cut, columns):
    # Few distinct values, so that ties are common.
    scores = (
        torch.tensor(values, dtype=torch.float64).expand(columns, -1) * torch.tensor([[1.0], [-1.0], [0.0]])[:columns]
    )
    ranking = ranking_init(scores, k)
    for start in range(0, len(values), cut):
        indices = torch.arange(start, min(start + cut, len(values)))
        ranking = ranking_update(ranking, scores[:, start : start + cut], indices, k=k)

    for column in range(columns):
        row = scores[column].tolist()
        helpful = sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]
        harmful = sorted(range(len(row)), key=lambda i: (row[i], i))[:k]
        assert ranking.helpful_indices[column].tolist() == helpful
        assert ranking.harmful_indices[column].tolist() == harmful
        assert ranking.helpful_scores[column].tolist() == [row[i] for i in helpful]
        assert ranking.harmful_scores[column].tolist() == [row[i] for i in harmful]


def test_ranking_keeps_dtype_and_needs_no_leading_dimension():
    scores = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float32)
    ranking = ranking_update(ranking_init(scores, 2), scores, torch.tensor([10, 11, 12]), k=2)
    assert ranking.helpful_scores.dtype == torch.float32
    assert ranking.helpful_indices.tolist() == [11, 12]
    assert ranking.harmful_indices.tolist() == [10, 12]


def test_scores_without_ties_are_ranked_as_sorting_does_and_one_end_alone_too():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 200, dtype=torch.float64, generator=generator)
    scores[1, 7] = scores[1].max()  # one row with a tie among its best
    for some in (scores[:1], scores):
        whole = alone = ranking_init(some, 5)
        for start in (0, 120):
            indices = torch.arange(200)[start : start + 120]
            whole = ranking_update(whole, some[:, start : start + 120], indices, k=5)
            alone = ranking_update(alone, some[:, start : start + 120], indices, k=5, ends=("harmful",))
        for descending, end in ((True, "helpful"), (False, "harmful")):
            ranked, order = some.sort(dim=1, descending=descending, stable=True)
            assert torch.equal(getattr(whole, f"{end}_scores"), ranked[:, :5])
            assert torch.equal(getattr(whole, f"{end}_indices"), order[:, :5])
        assert torch.equal(alone.harmful_indices, whole.harmful_indices)
        assert alone.helpful_indices.shape == (len(some), 0)
