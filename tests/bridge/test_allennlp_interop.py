"""The real AllenNLP 2.10.1 and the bridge in one process, seeded alike, must give the same numbers."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bridge
from bridge.data import collate_alike
from tests.bridge.allennlp_standins import import_allennlp

import_allennlp()

from allennlp.common import Lazy, Params  # noqa: E402
from allennlp.data import Batch, DatasetReader, Instance, Token, Vocabulary  # noqa: E402
from allennlp.data.data_loaders import MultiProcessDataLoader, SimpleDataLoader  # noqa: E402
from allennlp.data.fields import ArrayField, LabelField, MetadataField, TextField  # noqa: E402
from allennlp.data.token_indexers import SingleIdTokenIndexer  # noqa: E402
from allennlp.interpret.influence_interpreters import SimpleInfluence as Theirs  # noqa: E402
from allennlp.interpret.influence_interpreters.simple_influence import get_hvp, get_inverse_hvp_lissa  # noqa: E402
from allennlp.models import Model  # noqa: E402
from allennlp.models.archival import archive_model  # noqa: E402
from allennlp.modules.seq2vec_encoders import LstmSeq2VecEncoder  # noqa: E402
from allennlp.modules.text_field_embedders import BasicTextFieldEmbedder  # noqa: E402
from allennlp.modules.token_embedders import Embedding  # noqa: E402
from allennlp.nn.util import get_text_field_mask  # noqa: E402
from allennlp.training.metrics import CategoricalAccuracy  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::bridge.diagnostics.InfluenceWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-5}


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request):
    """AllenNLP rounds its scores to the default dtype, so float64 has to be the default to compare in it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


# ------------------------------------------------------------------ data


WORDS = ["good", "bad", "fine", "poor", "film", "plot", "very", "not"]


@DatasetReader.register("sentences", exist_ok=True)
class Sentences(DatasetReader):
    """A path is `seed:count`."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.indexers = {"tokens": SingleIdTokenIndexer()}

    def _read(self, file_path):
        seed, count = map(int, file_path.split(":"))
        generator = torch.Generator().manual_seed(seed)
        for i in range(count):
            length = int(torch.randint(4, 12, (), generator=generator))  # no two alike: no ties
            words = torch.randint(len(WORDS), (length,), generator=generator).tolist()
            label = int(sum(words) / length > 3.5) if i % 5 else i % 2
            yield self.text_to_instance(" ".join(WORDS[w] for w in words), str(label))

    def text_to_instance(self, text, label):
        return Instance({
            "text": TextField([Token(word) for word in text.split()], self.indexers),
            "label": LabelField(label),
            "note": MetadataField({"text": text}),
        })  # fmt: skip


class Points(DatasetReader):
    """A path is `seed:count`."""

    def _read(self, file_path):
        seed, count = map(int, file_path.split(":"))
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            x = torch.randn(5, generator=generator, dtype=torch.float64)
            label = int(x[:3].argmax()) if x[3] > -1 else int(x[:3].argmin())
            array = (3 * x).to(torch.get_default_dtype()).numpy()
            yield Instance({"x": ArrayField(array, dtype=array.dtype), "label": LabelField(label, skip_indexing=True)})


def vocabulary():
    return Vocabulary.from_instances(Sentences().read("0:40"))


# ------------------------------------------------------------------ models


class OfPoints(Model):
    def __init__(self, *, reduction="mean", dropout=0.0, **parts):
        super().__init__(Vocabulary())
        self.reduction, self.dropout = reduction, nn.Dropout(dropout)
        self.accuracy = CategoricalAccuracy()
        for name, part in parts.items():
            setattr(self, name, part)

    def logits(self, x):
        return self.proj(x)

    def forward(self, x, label=None):
        logits = self.logits(self.dropout(x))
        output = {"logits": logits}
        if label is not None:
            self.accuracy(logits, label)
            output["loss"] = F.cross_entropy(logits, label, reduction=self.reduction)
        return output


class MLP(OfPoints):
    def logits(self, x):
        return self.proj_out(torch.tanh(self.proj(x)))


class Branching(OfPoints):
    """`extra` is used by some batches, and not by the first training instance: AllenNLP then leaves it out for all."""

    def logits(self, x):
        first = next(iter(Points().read("1:1")))["x"].array[4]
        return self.proj(x) + (self.extra(x) if bool((x[:, 4] > first).any()) else 0.0)


@Model.register("of-text", exist_ok=True)
class OfText(Model):
    def __init__(self, vocab, lstm=False, sparse=False):
        super().__init__(vocab)
        self.embed = BasicTextFieldEmbedder({
            "tokens": Embedding(4, num_embeddings=vocab.get_vocab_size("tokens"), sparse=sparse)
        })  # fmt: skip
        self.lstm = LstmSeq2VecEncoder(4, 3) if lstm else None
        self.out = nn.Linear(3 if lstm else 4, 2)
        self.idle = nn.Linear(2, 2)

    def forward(self, text, label=None, note=None):
        mask, embedded = get_text_field_mask(text), self.embed(text)
        if self.lstm is not None:
            encoded = self.lstm(embedded, mask)
        else:
            weights = mask.unsqueeze(-1).to(embedded.dtype)
            encoded = torch.tanh((embedded * weights).sum(1) / weights.sum(1))
        logits = self.out(encoded)
        return {"logits": logits} | ({} if label is None else {"loss": F.cross_entropy(logits, label)})


def softmax_regression(**kwargs):
    return OfPoints(proj=nn.Linear(5, 3), **kwargs), Points()


def branching():
    return Branching(proj=nn.Linear(5, 3), extra=nn.Linear(5, 3)), Points()


def mlp(**kwargs):
    return MLP(proj=nn.Linear(5, 4), proj_out=nn.Linear(4, 3), idle=nn.Linear(2, 2), **kwargs), Points()


def text_model(**kwargs):
    return OfText(vocabulary(), **kwargs).to(torch.get_default_dtype()), Sentences()


# ------------------------------------------------------------------ the same numbers


MULTI_STEP = {"recursion_depth": 30, "scale": 25.0, "damping": 0.01}

CASES = {
    "softmax regression, default settings": (softmax_regression, {}),
    "softmax regression, many steps": (softmax_regression, MULTI_STEP),
    "softmax regression, several samples": (softmax_regression, {**MULTI_STEP, "num_samples": 3, "recursion_depth": 7}),
    "softmax regression, ragged batches": (softmax_regression, {**MULTI_STEP, "lissa_batch_size": 7}),
    "softmax regression, batches of one": (softmax_regression, {**MULTI_STEP, "lissa_batch_size": 1}),
    "softmax regression, one full batch": (softmax_regression, {**MULTI_STEP, "lissa_batch_size": 40}),
    "softmax regression, more than one pass": (softmax_regression, {**MULTI_STEP, "recursion_depth": 2.5}),
    "softmax regression, no damping": (softmax_regression, {**MULTI_STEP, "damping": 0.0}),
    "sum loss": (lambda: softmax_regression(reduction="sum"), {**MULTI_STEP, "scale": 200.0, "lissa_batch_size": 7}),
    "mlp": (mlp, {**MULTI_STEP, "damping": 0.05}),
    "mlp, frozen by prefix": (mlp, {**MULTI_STEP, "damping": 0.05, "params_to_freeze": ["proj_out"]}),
    "softmax regression, bias frozen": (softmax_regression, {**MULTI_STEP, "params_to_freeze": [".*bias"]}),
    "a parameter the first instance does not use": (branching, MULTI_STEP),
    "dropout": (lambda: mlp(dropout=0.3), {**MULTI_STEP, "damping": 0.05}),
    "bag of embeddings": (text_model, {**MULTI_STEP, "damping": 0.05}),
    "packed lstm": (lambda: text_model(lstm=True), {**MULTI_STEP, "damping": 0.05, "recursion_depth": 10}),
}  # fmt: skip


def explained(cls, model, reader, settings, **more):
    """Scores, losses and training instances of two calls, in the order of the ranking, after the same seeds."""
    random.seed(3)
    torch.manual_seed(3)
    interpreter = cls(copy.deepcopy(model), "1:40", reader, **settings, **more)
    tests = list(reader.read("2:4"))
    outputs = [*interpreter.interpret_instances(tests[:3], k=40), interpreter.interpret(tests[3], k=10)]
    index = {id(row.instance): i for i, row in enumerate(interpreter.train_instances)}
    ranked = [[(index[id(i.instance)], i.loss, i.score) for i in output.top_k] for output in outputs]
    states = random.getstate(), torch.get_rng_state()
    return interpreter.used_param_names, [output.loss for output in outputs], ranked, states


@pytest.mark.parametrize("case", CASES)
def test_the_same_numbers_run_for_run(case, dtype):
    make, settings = CASES[case]
    torch.manual_seed(0)
    model, reader = make()
    names, losses, ranked, states = explained(Theirs, model, reader, settings)
    our_names, our_losses, our_ranked, our_states = explained(
        bridge.SimpleInfluence, model, reader, settings, compat="allennlp", progress=False
    )
    tolerance = TOLERANCE[dtype]
    assert our_names == names
    assert our_losses == pytest.approx(losses, rel=tolerance)
    for ours, theirs in zip(our_ranked, ranked, strict=True):
        largest = max(abs(score) for _, _, score in theirs)
        by_index = {i: (loss, score) for i, loss, score in theirs}
        for i, loss, score in ours:
            if i in by_index:
                assert loss == pytest.approx(by_index[i][0], rel=tolerance, abs=tolerance)
                assert score == pytest.approx(by_index[i][1], abs=tolerance * largest)
        if dtype is torch.float64:
            assert [i for i, _, _ in ours] == [i for i, _, _ in theirs]
        else:  # the same order but for scores that rounding cannot tell apart
            gaps = [b - a for (_, _, a), (_, _, b) in zip(ours[1:], ours, strict=False)]
            assert all(gap >= 0 for gap in gaps)
            assert [s for _, _, s in ours] == pytest.approx([s for _, _, s in theirs], abs=tolerance * largest)
    assert our_states[0] == states[0]
    assert torch.equal(our_states[1], states[1])


def test_the_settings_that_are_compared_do_something(dtype):
    """With the default settings every implementation gives gradient dot products; the other cases must not."""
    torch.manual_seed(0)
    model, reader = softmax_regression()
    influence = bridge.SimpleInfluence(model, "1:40", reader, progress=False, **MULTI_STEP)
    influence.interpret(next(iter(reader.read("2:1"))))
    assert float(influence.diagnostics.cosine_with_gradient) < 0.999


# ------------------------------------------------------------------ the functions beneath


@pytest.mark.parametrize("num_samples", [1, 3])
def test_inverse_hvps_agree(num_samples, dtype):
    torch.manual_seed(0)
    model, reader = mlp()
    model.eval()
    names = ("proj.weight", "proj.bias", "proj_out.weight", "proj_out.bias")
    used = [dict(model.named_parameters())[name] for name in names]
    vs = [torch.randn_like(p) for p in used]
    results = []
    for function, loader_class in (
        (get_inverse_hvp_lissa, SimpleDataLoader),
        (bridge.get_inverse_hvp_lissa, SimpleDataLoader),
        (bridge.get_inverse_hvp_lissa, bridge.SimpleDataLoader),
    ):
        random.seed(1)
        loader = loader_class(list(reader.read("1:23")), 4, shuffle=True, batches_per_epoch=8, vocab=model.vocab)
        results.append(function(vs, model, used, loader, 0.01, num_samples, 25.0))
    for ours in results[1:]:
        assert (ours - results[0]).norm() <= TOLERANCE[dtype] * results[0].norm()


def test_hvps_agree(dtype):
    torch.manual_seed(0)
    w = torch.randn(3, 2, requires_grad=True)
    v = torch.randn(3, 2)
    (theirs,), (ours,) = (fn((w**4).sum(), [w], [v]) for fn in (get_hvp, bridge.get_hvp))
    torch.testing.assert_close(ours, theirs)


# ------------------------------------------------------------------ their loaders, their archives


SETTINGS = {"ridge": 0.5, "scale": 8.0, "recursion_depth": 20, "progress": False}


def test_their_loaders_are_taken(dtype):
    torch.manual_seed(0)
    model, reader = text_model()
    test = next(iter(reader.read("2:1")))
    expected = bridge.SimpleInfluence(model, "1:20", reader, **SETTINGS).scores([test])
    for lazy in (
        Lazy(SimpleDataLoader.from_dataset_reader),
        Lazy(MultiProcessDataLoader),
        Lazy(MultiProcessDataLoader, constructor_extras={"max_instances_in_memory": 8}),
    ):
        scores = bridge.SimpleInfluence(model, "1:20", reader, train_data_loader=lazy, **SETTINGS).scores([test])
        torch.testing.assert_close(scores, expected, rtol=0, atol=0)


def test_sparse_embeddings_work_where_theirs_do_not(dtype):
    torch.manual_seed(0)
    dense, reader = text_model()
    sparse, _ = text_model(sparse=True)
    sparse.load_state_dict(dense.state_dict())
    test = next(iter(reader.read("2:1")))
    scores, expected = (bridge.SimpleInfluence(m, "1:20", reader, **SETTINGS).scores([test]) for m in (sparse, dense))
    torch.testing.assert_close(scores, expected)
    with pytest.raises(RuntimeError):
        Theirs(sparse, "1:20", reader, recursion_depth=5).interpret(test, k=3)


class Doubled(ArrayField):
    """A field with a way of its own to become a tensor."""

    def as_tensor(self, padding_lengths):
        return 2 * super().as_tensor(padding_lengths)


def test_instances_alike_are_collated_as_by_their_batch(dtype):
    def instance(i):
        text = TextField([Token("good"), Token("film")], {"tokens": SingleIdTokenIndexer()})
        x, y = (torch.tensor([[1.0, i], [2.0, 3.0]], dtype=dtype), torch.tensor([i, i + 1]))
        fields = {"x": ArrayField(x), "own": Doubled(y), "label": LabelField(i > 0, skip_indexing=True), "text": text}
        return Instance(fields | {"number": ArrayField(torch.tensor(float(i)))})

    instances = [instance(i) for i in range(3)]
    vocab = Vocabulary.from_instances(instances)
    for one in instances:
        one.index_fields(vocab)
    given = [one.fields["x"].tensor.clone() for one in instances]
    got = collate_alike(instances)
    torch.testing.assert_close(got, Batch(instances).as_tensor_dict(), rtol=0, atol=0)
    assert list(got) == list(instances[0].fields)
    got["x"].zero_()
    assert all(torch.equal(one.fields["x"].tensor, x) for one, x in zip(instances, given, strict=True))


def test_an_archive_is_loaded(tmp_path):
    torch.manual_seed(0)
    model, reader = text_model()
    model.vocab.save_to_files(str(tmp_path / "vocabulary"))
    torch.save(model.state_dict(), tmp_path / "weights.th")
    Params({
        "model": {"type": "of-text"},
        "dataset_reader": {"type": "sentences"},
        "train_data_path": "1:20",
    }).to_file(str(tmp_path / "config.json"))  # fmt: skip
    archive_model(str(tmp_path), weights="weights.th")
    test = next(iter(reader.read("2:1")))
    expected = bridge.SimpleInfluence(model, "1:20", reader, **SETTINGS).scores([test])
    path = str(tmp_path / "model.tar.gz")
    for cls in (bridge.InfluenceInterpreter, bridge.SimpleInfluence):
        influence = cls.from_path(path, import_plugins=False, **SETTINGS)
        torch.testing.assert_close(influence.scores([test]), expected)
        loss = model.eval()(**_alone(test, model))["loss"].item()
        assert influence.interpret(test, k=1).loss == pytest.approx(loss, rel=1e-6)


def _alone(instance, model):
    from allennlp.data import Batch

    batch = Batch([instance])
    batch.index_instances(model.vocab)
    return batch.as_tensor_dict()
