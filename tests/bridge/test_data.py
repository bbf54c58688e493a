import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bridge import Lazy, SimpleDataLoader
from bridge.data import collate, is_sequence, stacked_alike, to_device
from tests.bridge.fakes import Reader, Vocabulary, text_instance

VOCAB = Vocabulary(["a", "b", "c"])


def instances(*texts):
    return [text_instance(text, i % 2) for i, text in enumerate(texts)]


# ------------------------------------------------------------------ collation


def test_instances_are_padded_to_the_longest_of_the_batch():
    batch = collate(instances("a b c", "b", "c a"), vocab=VOCAB)
    assert batch["text"]["tokens"]["tokens"].tolist() == [[1, 2, 3], [2, 0, 0], [3, 1, 0]]
    assert batch["label"].tolist() == [0, 1, 0]
    alone = collate(instances("b"), vocab=VOCAB)
    assert alone["text"]["tokens"]["tokens"].tolist() == [[2]]


def test_instances_are_indexed_once():
    (instance,) = instances("a b")
    collate([instance], vocab=VOCAB)
    again = collate([instance], vocab=Vocabulary(["b", "a"]))
    assert again["text"]["tokens"]["tokens"].tolist() == [[1, 2]]


def test_instances_of_different_fields_are_an_error():
    with pytest.raises(ValueError, match=r"same fields.*label"):
        collate([text_instance("a", 1), text_instance("b")], vocab=VOCAB)


def test_mappings_and_pairs_are_stacked():
    batch = collate([{"x": torch.ones(2), "y": 1}, {"x": torch.zeros(2), "y": 0}])
    assert batch["x"].shape == (2, 2)
    assert batch["y"].tolist() == [1, 0]
    x, y = collate([(torch.ones(2), 1.5), (torch.zeros(2), 0.5)])
    assert x.shape == (2, 2)
    assert y.tolist() == [1.5, 0.5]


def test_collate_fn_is_used_for_every_kind():
    assert collate([1, 2, 3], collate_fn=sum) == 6
    assert collate(instances("a", "b"), vocab=VOCAB, collate_fn=len) == 2


def test_to_device_does_not_change_the_batch():
    batch = {"x": torch.ones(2), "notes": ["a"], "nested": {"y": torch.zeros(1)}}
    moved = to_device(batch, torch.device("meta"))
    assert moved["x"].is_meta
    assert moved["nested"]["y"].is_meta
    assert moved["notes"] == ["a"]
    assert not batch["x"].is_meta


def test_what_is_a_sequence():
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, i):
            return i

    assert is_sequence([1])
    assert is_sequence(Rows())
    assert not is_sequence(iter([1]))
    assert not is_sequence({"x": 1})


# ------------------------------------------------------------------ stacks


@given(lengths=st.lists(st.integers(1, 4), max_size=30), size=st.integers(1, 5))
def test_stacks_hold_every_batch_once_as_it_was(lengths, size):
    batches = [{"x": torch.full((1, n), float(i)), "same": "note"} for i, n in enumerate(lengths)]
    seen = []
    for numbers, stack in stacked_alike(enumerate(batches), size):
        assert 1 <= len(numbers) <= size
        assert stack["same"] == "note"
        for row, number in zip(stack["x"], numbers, strict=True):
            assert torch.equal(row, batches[number]["x"])
            seen.append(number)
    assert sorted(seen) == list(range(len(lengths)))


def test_batches_that_differ_in_shape_dtype_structure_or_plain_values_are_kept_apart():
    different = [
        {"x": torch.ones(1, 2)},
        {"x": torch.ones(1, 3)},
        {"x": torch.ones(1, 2, dtype=torch.float64)},
        {"y": torch.ones(1, 2)},
        {"x": torch.ones(1, 2), "note": "a"},
        {"x": torch.ones(1, 2), "note": "b"},
        {"x": torch.ones(1, 2), "note": object()},
        {"x": torch.ones(1, 2), "note": object()},
    ]
    assert [numbers for numbers, _ in stacked_alike(enumerate(different), 8)] == [[i] for i in range(8)]


def test_batches_that_find_no_partner_do_not_wait_for_ever():
    drawn = 0

    def many():
        nonlocal drawn
        for i in range(1000):
            drawn = i
            yield i, {"x": torch.ones(1, i)}

    next(stacked_alike(many(), 4))
    assert drawn < 40


# ------------------------------------------------------------------ Lazy and SimpleDataLoader


def test_lazy_calls_with_extras_that_later_arguments_override():
    lazy = Lazy(lambda **kwargs: kwargs, {"a": 1, "b": 2})
    assert lazy.construct(b=3, c=4) == {"a": 1, "b": 3, "c": 4}
    assert lazy.construct() == {"a": 1, "b": 2}


def flat(batches):
    return [i for batch in batches for i in batch.tolist()]


def test_a_loader_runs_through_its_instances_in_order():
    loader = SimpleDataLoader(range(7), 3)
    assert len(loader) == 3
    assert [batch.tolist() for batch in loader] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [batch.tolist() for batch in loader] == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(loader.iter_instances()) == list(range(7))


def test_epochs_of_batches_go_on_where_the_last_stopped():
    loader = SimpleDataLoader(range(5), 2, batches_per_epoch=2)
    assert len(loader) == 2
    epochs = [[batch.tolist() for batch in loader] for _ in range(3)]
    assert epochs == [[[0, 1], [2, 3]], [[4], [0, 1]], [[2, 3], [4]]]


def test_shuffled_passes_come_from_pythons_random_and_leave_the_instances_in_order():
    mine = list(range(10))
    loader = SimpleDataLoader(mine, 4, shuffle=True)
    random.seed(3)
    first, second = flat(loader), flat(loader)
    random.seed(3)
    order = list(range(10))
    random.shuffle(order)
    assert first == order
    random.shuffle(order)
    assert second == order
    assert mine == list(range(10))


def test_a_loader_reads_indexes_and_places():
    loader = SimpleDataLoader.from_dataset_reader(Reader(), [("a b", 1), ("c", 0)], 2, quiet=True)
    loader.index_with(VOCAB)
    loader.set_target_device(torch.device("meta"))
    (batch,) = loader
    assert batch["text"]["tokens"]["tokens"].shape == (2, 2)
    assert batch["label"].is_meta
