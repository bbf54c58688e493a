from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lissa import batch_stream, index_stream
from lissa.sampling import take


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 1000))
def test_each_pass_without_replacement_holds_every_index_once(n, batch_size, seed):
    stream = index_stream(n, batch_size, generator=generator(seed))
    batches_a_pass = -(-n // batch_size)
    for _ in range(3):
        batches = list(islice(stream, batches_a_pass))
        assert all(len(batch) == batch_size for batch in batches[:-1])
        assert sorted(torch.cat(batches).tolist()) == list(range(n))


@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 1000))
def test_draws_with_replacement_are_full_and_in_range(n, batch_size, seed):
    for batch in islice(index_stream(n, batch_size, generator=generator(seed), replacement=True), 5):
        assert batch.shape == (batch_size,)
        assert 0 <= batch.min() <= batch.max() < n


def test_passes_are_shuffled_anew():
    stream = index_stream(100, 100, generator=generator())
    first, second = next(stream), next(stream)
    assert not torch.equal(first, second)
    assert not torch.equal(first, torch.arange(100))


def test_draws_with_replacement_repeat_an_index():
    # 50 draws of 50 values miss a repeat with probability 50!/50^50 < 1e-20.
    batch = next(index_stream(50, 50, generator=generator(), replacement=True))
    assert len(set(batch.tolist())) < 50


def test_drop_last_leaves_out_the_ragged_batch():
    stream = index_stream(10, 4, generator=generator(), drop_last=True)
    assert {len(batch) for batch in islice(stream, 20)} == {4}


@pytest.mark.parametrize("replacement", [False, True])
def test_the_generator_alone_decides_the_order(replacement):
    before = torch.get_rng_state()
    one = list(islice(index_stream(9, 2, generator=generator(7), replacement=replacement), 12))
    same = list(islice(index_stream(9, 2, generator=generator(7), replacement=replacement), 12))
    other = list(islice(index_stream(9, 2, generator=generator(8), replacement=replacement), 12))

    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("replacement", [False, True])
def test_a_stream_read_under_vmap_is_shared_and_the_same(replacement):
    def first_four(v):
        stream = index_stream(9, 2, generator=generator(1), replacement=replacement)
        return v + torch.stack(list(islice(stream, 4))).sum()

    assert torch.equal(torch.vmap(first_four)(torch.zeros(3)), torch.stack([first_four(torch.tensor(0.0))] * 3))


def test_batch_stream_takes_the_same_rows_of_every_tensor():
    data = {"x": torch.arange(6.0).reshape(6, 1), "y": [torch.arange(6), "a constant"]}
    for batch in islice(batch_stream(data, 4, generator=generator()), 4):
        assert torch.equal(batch["x"][:, 0], batch["y"][0].double().float())
        assert batch["y"][1] == "a constant"


def test_take_accepts_slices_and_integers():
    x = torch.arange(5)
    assert take((x,), slice(1, 3))[0].tolist() == [1, 2]
    assert take(x, torch.tensor([4, 0])).tolist() == [4, 0]
