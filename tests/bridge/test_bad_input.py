# ruff: noqa: E501 -- one row of the table for each wrong argument or datum
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bridge import InfluenceInterpreter, Lazy, SimpleDataLoader, SimpleInfluence, get_hvp, get_inverse_hvp_lissa
from tests.bridge.fakes import BagOfWords, Reader, linear, pairs, sentences, text_instance

pytestmark = pytest.mark.filterwarnings("ignore::bridge.diagnostics.InfluenceWarning")


def of_pairs(n=30, **kwargs):
    settings = {"loss_fn": F.cross_entropy, "ridge": 0.5, "scale": 5.0, "recursion_depth": 20, "progress": False}
    return SimpleInfluence.from_dataset(linear(), pairs(n), **{**settings, **kwargs})


def of_text(**kwargs):
    return SimpleInfluence(BagOfWords(), sentences(12), Reader(), ridge=0.5, scale=5.0, progress=False, **kwargs)


def inverse_hvp(vs=None, num_samples=1, scale=10.0, damping=0.0):
    model = linear()
    params = list(model.parameters())
    vs = [torch.ones_like(p) for p in params] if vs is None else vs
    return get_inverse_hvp_lissa(vs, model, params, [{"input": torch.ones(1, 4).double()}], damping, num_samples, scale)


def text_without_label():
    return text_instance("good film")


def nan_pair():
    return (torch.full((4,), math.nan, dtype=torch.float64), torch.tensor(0))


class NoLoss(nn.Module):
    def __init__(self, value=None, key="loss"):
        super().__init__()
        self.net, self.value, self.key = linear(), value, key

    def forward(self, x):
        return {self.key: self.value if self.value is not None or self.key == "loss" else self.net(x)}


def dataset(model=None, data=None, **kwargs):
    return SimpleInfluence.from_dataset(model or linear(), pairs(9) if data is None else data, progress=False, **kwargs)


DICTS = [{"x": x} for x, _ in pairs(9)]
RAGGED = [(torch.ones(4 + i % 2, dtype=torch.float64), torch.tensor(0)) for i in range(9)]

BAD = {
    "scale 0": (lambda: of_pairs(scale=0.0), ValueError, "scale=...)` must be > 0, got 0"),
    "scale negative": (lambda: of_pairs(scale=-1.0), ValueError, "scale=...)` must be > 0, got -1"),
    "scale nan": (lambda: of_pairs(scale=math.nan), ValueError, "scale=...)` must be finite, got nan"),
    "scale not a number": (lambda: of_pairs(scale="10"), TypeError, "scale=...)` must be a number, got str"),
    "damping negative": (lambda: dataset(damping=-1e-3), ValueError, "damping=...)` must be >= 0, got -0.001"),
    "damping and ridge": (lambda: of_pairs(damping=3e-3), ValueError, "give one of the two"),
    "ridge negative": (lambda: of_pairs(ridge=-0.1), ValueError, "ridge=...)` must be >= 0, got -0.1"),
    "no samples": (lambda: of_pairs(num_samples=0), ValueError, "num_samples=...)` must be >= 1, got 0"),
    "half a sample": (lambda: of_pairs(num_samples=0.5), TypeError, "num_samples=...)` must be an int, got float"),
    "empty batches": (lambda: of_pairs(lissa_batch_size=0), ValueError, "lissa_batch_size=...)` must be >= 1, got 0"),
    "negative batches": (lambda: of_pairs(lissa_batch_size=-8), ValueError, "lissa_batch_size=...)` must be >= 1, got -8"),
    "score batches": (lambda: of_pairs(score_batch_size=0), ValueError, "score_batch_size=...)` must be >= 1, got 0"),
    "depth 0": (lambda: of_pairs(recursion_depth=0), ValueError, "recursion_depth=...)` must be an int > 0"),
    "depth 0.0": (lambda: of_pairs(recursion_depth=0.0), ValueError, "recursion_depth=...)` must be an int > 0"),
    "depth negative": (lambda: of_pairs(recursion_depth=-0.5), ValueError, "got -0.5"),
    "depth a word": (lambda: of_pairs(recursion_depth="all"), ValueError, "got 'all'"),
    "depth None": (lambda: of_pairs(recursion_depth=None), ValueError, "got None"),
    "depth nan": (lambda: of_pairs(recursion_depth=math.nan), ValueError, "got nan"),
    "depth infinite": (lambda: of_pairs(recursion_depth=math.inf), ValueError, "got inf"),
    "depth True": (lambda: of_pairs(recursion_depth=True), ValueError, "got True"),
    "unknown compat": (lambda: of_pairs(compat="captum"), ValueError, "compat=...)` must be one of 'allennlp', got 'captum'"),
    "seed a word": (lambda: of_pairs(seed="zero"), TypeError, "seed=...)` must be an int, got str"),
    "k negative": (lambda: of_pairs().interpret(pairs(1)[0], k=-1), ValueError, "k=...)` must be >= 0, got -1"),
    "k half": (lambda: of_pairs().interpret(pairs(1)[0], k=1.5), TypeError, "k=...)` must be an int, got float"),
    "model a function": (lambda: dataset(torch.sin), TypeError, "model=...)` must be a torch.nn.Module"),
    "model without parameters": (lambda: dataset(nn.ReLU()), ValueError, "parameter that requires grad, got none"),
    "one pattern": (lambda: of_pairs(params_to_freeze="weight"), TypeError, "list of regular expressions, got 'weight'"),
    "pattern a number": (lambda: of_pairs(params_to_freeze=[3]), TypeError, "must hold strings, got int"),
    "bad pattern": (lambda: of_pairs(params_to_freeze=["("]), ValueError, "regular expressions, got '('"),
    "all frozen": (lambda: of_pairs(params_to_freeze=["w", ".*"]), ValueError, "freezes every parameter: ['weight', 'bias']"),
    "no such GPU": (lambda: of_pairs(cuda_device=64), ValueError, "cuda_device=...)` must be below the number of GPUs"),
    "GPU by name": (lambda: of_pairs(cuda_device="cuda"), TypeError, "cuda_device=...)` must be an int"),
    "no training data": (lambda: dataset(data=[]), ValueError, "no training instances"),
    "no training text": (lambda: SimpleInfluence(BagOfWords(), (), Reader()), ValueError, "no training instances"),
    "data not iterable": (lambda: dataset(data=3), TypeError, "train_dataset=...)` must be a dataset or an iterable"),
    "data a path": (lambda: dataset(data="train.csv"), TypeError, "(x, y) pairs or mappings, got str"),
    "data a table of columns": (lambda: dataset(data={"x": torch.ones(9, 4), "y": torch.zeros(9)}), TypeError, "got dict"),
    "data inputs alone": (lambda: dataset(data=torch.ones(9, 4)), TypeError, "got Tensor"),
    "test instances None": (lambda: of_pairs().scores(None), TypeError, "test_instances=...)` must be a dataset"),
    "instances of three": (lambda: dataset(data=[(x, y, 1) for x, y in pairs(9)], loss_fn=F.cross_entropy).scores(pairs(1)), ValueError, "must be an (x, y) pair"),
    "loader not a loader": (lambda: of_text(train_data_loader=Lazy(lambda **kwargs: 3)), TypeError, "must construct a data loader"),
    "loader not lazy": (lambda: of_text(train_data_loader=SimpleDataLoader([1], 1)), TypeError, "given as a `Lazy`, got SimpleDataLoader"),
    "loss not callable": (lambda: dataset(loss_fn="mse"), TypeError, "loss_fn=...)` must be callable, got str"),
    "collate not callable": (lambda: dataset(collate_fn=3), TypeError, "collate_fn=...)` must be callable, got int"),
    "pairs without a loss": (lambda: dataset().interpret(pairs(1)[0]), ValueError, "instance 0: TypeError: `loss_fn` is needed"),
    "mappings with a loss": (lambda: dataset(NoLoss(), DICTS, loss_fn=F.mse_loss).interpret(DICTS[0]), ValueError, "`loss_fn` goes with (x, y) pairs"),
    "test text without label": (lambda: of_text().interpret_instances([text_instance("bad", 0), text_without_label()]), ValueError, 'Test instance 1: The model returned no "loss"'),
    "loss None": (lambda: dataset(NoLoss(), DICTS).interpret(DICTS[0]), ValueError, 'instance 0: The model returned no "loss"'),
    "loss of another name": (lambda: dataset(NoLoss(key="nll"), DICTS).interpret(DICTS[0]), ValueError, "it returned ['nll']"),
    "loss a float": (lambda: dataset(NoLoss(value=0.5), DICTS).interpret(DICTS[0]), ValueError, "The loss must be a tensor, got float"),
    "loss not a scalar": (lambda: dataset(loss_fn=lambda o, y: o).interpret(pairs(1)[0]), ValueError, "must be a scalar, the mean loss of the batch, got shape (1, 3)"),
    "loss of constants": (lambda: dataset(NoLoss(value=torch.ones(())), DICTS).interpret(DICTS[0]), ValueError, "depends on any of the parameters"),
    "one pair for many": (lambda: of_text().interpret_instances(text_instance("bad", 0)), TypeError, "test_instances=...)` must be a dataset or an iterable of instances"),
    "NaN in a test instance": (lambda: of_pairs().interpret_instances([pairs(1)[0], nan_pair()]), ValueError, "Test instance 1: its loss is not finite"),
    "NaN in a training instance": (lambda: dataset(data=[*pairs(9), nan_pair()], loss_fn=F.cross_entropy, ridge=0.5, scale=5.0).interpret(pairs(1)[0]), ValueError, "Training instance 9"),
    "ragged without collate_fn": (lambda: dataset(nn.Sequential(nn.AdaptiveAvgPool1d(4), linear()), RAGGED, loss_fn=F.cross_entropy).interpret(RAGGED[0]), ValueError, "pass a `collate_fn`"),
    "label out of range": (lambda: dataset(data=[*pairs(4), (torch.ones(4).double(), torch.tensor(7))], loss_fn=F.cross_entropy, ridge=0.5, scale=5.0).interpret(pairs(1)[0]), ValueError, "Training instance 4: IndexError"),
    "wrong width": (lambda: of_pairs().interpret((torch.ones(5).double(), torch.tensor(0))), ValueError, "Test instance 0: RuntimeError"),
    "lissa without samples": (lambda: inverse_hvp(num_samples=0), ValueError, "get_inverse_hvp_lissa(num_samples=...)` must be >= 1"),
    "lissa with scale 0": (lambda: inverse_hvp(scale=0.0), ValueError, "get_inverse_hvp_lissa(scale=...)` must be > 0"),
    "lissa damping negative": (lambda: inverse_hvp(damping=-1.0), ValueError, "get_inverse_hvp_lissa(damping=...)` must be >= 0"),
    "lissa vectors of other shapes": (lambda: inverse_hvp(vs=[torch.ones(3)]), ValueError, "must have the shapes of used_params"),
    "hvp of a vector": (lambda: get_hvp(torch.ones(2), [], []), ValueError, "get_hvp(loss=...)` must be one number, got shape (2,)"),
    "hvp of a float": (lambda: get_hvp(1.0, [], []), TypeError, "get_hvp(loss=...)` must be a tensor, got float"),
    "hvp of other shapes": (lambda: get_hvp(torch.ones(()), [torch.ones(2)], [torch.ones(3)]), ValueError, "[(2,)], got [(3,)]"),
    "loader without batches": (lambda: SimpleDataLoader([1, 2], 0), ValueError, "SimpleDataLoader(batch_size=...)` must be >= 1"),
    "loader of nothing": (lambda: list(SimpleDataLoader([], 2, batches_per_epoch=3)), ValueError, "at least one instance"),
    "name taken": (lambda: InfluenceInterpreter.register("simple-influence")(dict), ValueError, "the name is taken by SimpleInfluence"),
    "unknown name": (lambda: InfluenceInterpreter.by_name("simple-influense"), ValueError, "Did you mean 'simple-influence'?"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, error, words = BAD[case]
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)


def test_settings_are_checked_before_data_are_read():
    class Unread:
        def read(self, file_path):
            raise AssertionError("read before the settings were checked")

    with pytest.raises(ValueError, match="scale"):
        SimpleInfluence(linear(), "train.txt", Unread(), scale=0.0)
