"""Files are what NumPy reads, and are there only when complete."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bridge import SimpleInfluence, npy

pytestmark = pytest.mark.filterwarnings("ignore::bridge.diagnostics.InfluenceWarning")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 1, 70)])
def test_numpy_reads_what_was_written(tmp_path, shape, dtype):
    expected = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    with npy.being_written(tmp_path / "a.npy", shape, dtype) as array:
        array.copy_(expected)
    got = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert got.shape == shape
    assert torch.equal(torch.from_numpy(np.array(got)).to(dtype), expected)


def test_nothing_is_left_of_an_array_that_failed_and_what_was_there_stays(tmp_path):
    path = tmp_path / "a.npy"
    path.write_bytes(b"before")
    with pytest.raises(RuntimeError, match="stop"), npy.being_written(path, (2,), torch.float32):
        raise RuntimeError("stop")
    assert [p.name for p in tmp_path.iterdir()] == ["a.npy"]
    assert path.read_bytes() == b"before"


@pytest.mark.parametrize("max_memory", [None, 8 * 8 * 2 * 15])
def test_scores_in_a_file_are_the_scores(tmp_path, max_memory):
    """The smaller memory has room for two right-hand sides of 15 parameters at a time."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    pairs = list(zip(x, torch.randint(3, (20,), generator=generator), strict=True))
    settings = {"loss_fn": F.cross_entropy, "ridge": 0.1, "scale": 5.0, "recursion_depth": 20, "progress": False}
    model = nn.Linear(4, 3).double()
    expected = SimpleInfluence.from_dataset(model, pairs, **settings).scores(pairs[:5])
    influence = SimpleInfluence.from_dataset(model, pairs, **settings, max_memory=max_memory)
    influence.scores_to_file(iter(pairs[:5]), tmp_path / "scores.npy")
    got = torch.from_numpy(np.load(tmp_path / "scores.npy"))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_no_test_instances_are_an_error(tmp_path):
    pairs = [(torch.ones(2), torch.tensor(0))]
    influence = SimpleInfluence.from_dataset(nn.Linear(2, 2), pairs, loss_fn=F.cross_entropy, progress=False)
    with pytest.raises(ValueError, match="at least one instance"):
        influence.scores_to_file([], tmp_path / "scores.npy")
