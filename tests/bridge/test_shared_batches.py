"""All test instances of a call share each LiSSA batch, and no call holds the gradients of the training data."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bridge import SimpleInfluence
from bridge.data import collate
from tests.bridge.fakes import pairs, two_layers

pytestmark = pytest.mark.filterwarnings("ignore::bridge.diagnostics.InfluenceWarning")


def counted(sizes, **kwargs):
    def count(instances):
        sizes.append(len(instances))
        return collate(instances)

    return SimpleInfluence.from_dataset(
        two_layers(), pairs(40), loss_fn=F.cross_entropy, collate_fn=count, ridge=0.5, scale=5.0, progress=False,
        measure_residual=False, lissa_batch_size=8, recursion_depth=12, num_samples=2, **kwargs,
    )  # fmt: skip


@pytest.mark.parametrize("tests", [1, 7, 30])
def test_the_batches_drawn_do_not_depend_on_the_number_of_test_instances(tests):
    sizes = []
    influence = counted(sizes)
    _ = influence.used_param_names
    sizes.clear()
    influence.interpret_instances(pairs(tests, seed=1), k=3)
    assert sizes.count(8) == 12 * 2


def test_the_training_data_are_scored_once_for_all_test_instances():
    sizes = []
    influence = counted(sizes)
    _ = influence.used_param_names
    sizes.clear()
    influence.scores(pairs(7, seed=1))
    # 7 test instances alone, once for loss and gradient; the training instances in one batch, after a look at how much
    # work the last of a window is, and whether it and the first are in company what they are alone.
    assert [size for size in sizes if size != 8] == [1] * 7 + [1, 1, 1, 2, 1] + [40]


def test_memory_does_not_grow_with_the_training_data_times_the_parameters():
    """With n = 400 and P = 40,010 all gradients are 64 MB; in chunks of 4 no tensor is near that (20 vectors are 3)."""

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor):
                    self.numel = max(self.numel, t.numel())
            return out

    n, P = 400, 40010
    model = nn.Linear(4000, 10)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        data = [(torch.rand(4000), torch.tensor(i % 10)) for i in range(n)]
    influence = SimpleInfluence.from_dataset(
        model, data, loss_fn=F.cross_entropy, progress=False, recursion_depth=2, measure_residual=False,
        score_batch_size=4,
    )  # fmt: skip
    with Largest() as largest:
        influence.interpret_instances(data[:20], k=3)
    assert largest.numel < n * P / 10
