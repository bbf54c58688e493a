from functools import partial

import pytest
import torch
from torch.utils.data import default_collate

from bridge.data import collate, collate_alike
from bridge.rows import CHUNK, Rows, are_rows, likeness_of_fields
from tests.bridge.fakes import BagOfWords, Instance, Reader, TextField, pairs, sentences, text_instance

CPU = torch.device("cpu")


class Counted(list):
    """A dataset that counts how often it is read."""

    reads = 0

    def __getitem__(self, i):
        self.reads += 1
        return super().__getitem__(i)


def same(a, b):
    assert torch.utils._pytree.tree_structure(a) == torch.utils._pytree.tree_structure(b)
    for x, y in zip(torch.utils._pytree.tree_leaves(a), torch.utils._pytree.tree_leaves(b), strict=True):
        assert torch.equal(x, y)
        assert x.dtype == y.dtype


@pytest.mark.parametrize("n", [1, 5, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
def test_what_is_gathered_is_what_is_collated(n):
    data = Counted((x, int(y)) for x, y in pairs(n))
    rows = Rows(data, default_collate, CPU)
    rows.gather()
    rows.gather()
    assert data.reads == n
    indices = torch.randperm(n)[:8].tolist()
    same(rows.batch(indices), default_collate([list.__getitem__(data, i) for i in indices]))
    assert data.reads == n
    seen = []
    for found, stack in rows.examples(3):
        for j, i in enumerate(found):
            same(tuple(t[j] for t in stack), tuple(default_collate([list.__getitem__(data, i)])))
        seen += found
    assert seen == list(range(n))


def test_what_is_gathered_is_kept_within_bounds():
    data = Counted(pairs(40))  # 5 numbers of 8 bytes each
    for most, kept in ((40 * 40, True), (40 * 40 - 1, False)):
        rows = Rows(data, default_collate, CPU, most_bytes=most)
        rows.gather()
        reads = data.reads
        rows.batch([0])
        assert (data.reads == reads) == kept


def of_different_lengths():
    return [(torch.ones(2 + i % 3), torch.tensor(i)) for i in range(10)]


@pytest.mark.parametrize(
    ("data", "make"),
    [
        (pairs(10), {}),
        (of_different_lengths(), {}),
        ([(x, float(i)) if i else (x, 0) for i, (x, _) in enumerate(pairs(4))], {}),  # a kind of number differs
        ([{"x": x, "name": f"row {i % 2}"} for i, (x, _) in enumerate(pairs(4))], {}),
        (list(Reader().read(sentences(20))), {"vocab": BagOfWords().vocab}),
        ([text_instance("good film", 1, note=f"row {i}") for i in range(4)], {"vocab": BagOfWords().vocab}),
        (pairs(10), {"pads": True}),
    ],
    ids=["alike", "lengths", "kinds", "strings", "texts", "metadata", "collate_fn"],
)
@pytest.mark.parametrize("gather", [False, True])
def test_every_example_is_what_it_is_alone(data, make, gather):
    def collated(instances):
        return collate(instances, vocab=make.get("vocab"))

    rows = Rows(data, collated, CPU, **make)
    if gather:
        rows.gather()
    seen = []
    for indices, stack in rows.examples(3):
        for j, i in enumerate(indices):
            row = torch.utils._pytree.tree_map(lambda t, j=j: t[j] if isinstance(t, torch.Tensor) else t, stack)
            alone = collated([data[i]])
            tensors, expected = (torch.utils._pytree.tree_leaves(x) for x in (row, alone))
            for a, b in zip(tensors, expected, strict=True):
                assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
                assert getattr(a, "dtype", None) == getattr(b, "dtype", None)
        seen += indices
    assert sorted(seen) == list(range(len(data)))


def test_chosen_examples_in_their_order():
    rows = Rows(pairs(10), default_collate, CPU)
    rows.gather()
    assert [indices for indices, _ in rows.examples(2, [7, 1, 3])] == [[7, 1], [3]]


def test_examples_of_one_shape_are_collated_together():
    sizes = []

    def counted(instances):
        sizes.append(len(instances))
        return default_collate(instances)

    list(Rows(of_different_lengths(), counted, CPU).examples(100))
    assert sorted(sizes) == [3, 3, 4]


def test_likeness_of_texts_is_their_length():
    vocab = BagOfWords().vocab
    long, short = (Instance({"text": TextField(text)}) for text in ("good film", "good"))
    for instance in (long, short):
        instance.index_fields(vocab)
    rows = Rows([long, short, long], collate_alike, CPU)
    likeness = [rows._likeness(instance) for instance in (long, short, long)]
    assert likeness[0] == likeness[2] != likeness[1]


def test_likeness_tells_fields_apart_by_name_kind_and_length():
    lengths = {"a": {"x": 1, "y": 2}, "b": {"x": 1}}
    alike = likeness_of_fields(["a", "b"], [int, str], lengths)
    assert alike == likeness_of_fields(["a", "b"], [int, str], {"b": {"x": 1}, "a": {"y": 2, "x": 1}})
    assert alike != likeness_of_fields(["a", "b"], [int, int], lengths)
    assert alike != likeness_of_fields(["b", "a"], [int, str], lengths)
    assert alike != likeness_of_fields(["a", "b"], [int, str], {**lengths, "b": {"x": 2}})


def test_what_are_rows():
    assert are_rows({"x": torch.ones(2, 3), "y": torch.ones(2)}, 2)
    for other in ({"x": torch.ones(2), "s": ["a", "b"]}, torch.tensor(1.0), [torch.ones(2), torch.ones(3)], ()):
        assert not are_rows(other, 2)


def test_windows_run_from_the_shortest_instance_to_the_longest():
    rows = Rows(of_different_lengths(), lambda some: [x for x, _ in some], CPU, pads=True)
    windows = list(rows.windows(6, range(10)))
    assert [indices for indices, _ in windows] == [[0, 3, 1, 4, 2, 5], [6, 9, 7, 8]]
    assert [len(x) for x in rows.together(windows[0][1])] == [2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("most", [10**6, 100])
def test_batches_of_windows_are_collated_once_within_bounds(most):
    data = [text_instance(" ".join(["good"] * count), 1) for count in (4, 1, 3, 2)]
    vocab, collated = BagOfWords().vocab, []

    def counted(some):
        collated.append(len(some))
        return collate(some, vocab=vocab)

    rows = Rows(data, counted, CPU, vocab=vocab, most_bytes=most)
    ((_, window),) = rows.windows(9, range(4))
    first = rows.together(window)
    expected = collate([data[i] for i in (1, 3, 2, 0)], vocab=vocab)
    same(first, expected)
    first["label"].zero_()  # which is the caller's own
    second = rows.together(window)
    same(second, expected)
    second["label"].zero_()
    same(rows.together(window), expected)
    assert collated == ([4] if most > 1000 else [4, 4, 4])
    assert rows.kept_bytes == (sum(t.nbytes for t in torch.utils._pytree.tree_leaves(expected)) if most > 1000 else 0)
    rows.together(window[:2])
    assert collated[-1] == 2


def test_no_batch_of_a_window_is_kept_where_not_all_of_them_would_fit():
    data = [text_instance("good good", 1) for _ in range(4)]
    vocab = BagOfWords().vocab
    of_two = sum(t.nbytes for t in torch.utils._pytree.tree_leaves(collate(data[:2], vocab=vocab)))
    for most, kept in ((2 * of_two, of_two), (2 * of_two - 1, 0)):
        rows = Rows(data, partial(collate, vocab=vocab), CPU, vocab=vocab, most_bytes=most)
        ((_, window),) = rows.windows(9, range(4))
        rows.together(window[:2])
        assert rows.kept_bytes == kept


def test_a_users_function_is_asked_each_time():
    calls = []
    rows = Rows(of_different_lengths(), lambda some: calls.append(1) or torch.zeros(len(some)), CPU, pads=True)
    ((_, window),) = rows.windows(10, range(10))
    rows.together(window)
    rows.together(window)
    assert calls == [1, 1]


def test_lengths_are_measured_once(monkeypatch):
    data, measured = of_different_lengths(), []
    rows = Rows(data, lambda some: some, CPU, pads=True)
    looked_at = rows._is_of_fields
    monkeypatch.setattr(rows, "_is_of_fields", lambda instance: measured.append(1) or looked_at(instance))
    first, second = (list(rows.windows(10, range(10))) for _ in range(2))
    assert [i for i, _ in first] == [i for i, _ in second]
    assert len(measured) == 10


def test_instances_that_differ_are_not_collated_to_find_that_out():
    calls = []
    rows = Rows(of_different_lengths(), lambda some: calls.append(1) or default_collate(some), CPU)
    rows.gather()
    assert not rows.gathered
    assert not calls


def test_windows_of_what_is_held_hold_nothing_more():
    rows = Rows(pairs(5), default_collate, CPU)
    rows.gather()
    ((indices, window),) = rows.windows(8, range(5))
    assert indices == [0, 1, 2, 3, 4]
    assert all(instance is None for _, instance in window)
    same(rows.together(window[1:3]), rows.batch([1, 2]))


def test_windows_of_texts_are_sorted_by_their_words():
    data = [text_instance(" ".join(["good"] * count), 1) for count in (4, 1, 3, 2)]
    vocab = BagOfWords().vocab
    rows = Rows(data, lambda some: collate(some, vocab=vocab), CPU, vocab=vocab)
    assert [indices for indices, _ in rows.windows(9, range(4))] == [[1, 3, 2, 0]]
