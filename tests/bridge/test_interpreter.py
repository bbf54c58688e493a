import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bridge import (
    BothEnds,
    InfluenceInterpreter,
    InstanceInfluence,
    InstanceWithGrads,
    InterpretOutput,
    Lazy,
    SimpleInfluence,
)
from tests.bridge.fakes import BagOfWords, Reader, Watch, linear, pairs, sentences, text_instance

pytestmark = pytest.mark.filterwarnings("ignore::bridge.diagnostics.InfluenceWarning")


def of_pairs(n=30, model=None, **kwargs):
    settings = {"loss_fn": F.cross_entropy, "ridge": 0.5, "scale": 5.0, "recursion_depth": 20, "progress": False}
    return SimpleInfluence.from_dataset(model or linear(), pairs(n), **{**settings, **kwargs})


def of_text(rows=None, **kwargs):
    settings = {"ridge": 0.5, "scale": 5.0, "recursion_depth": 20, "progress": False}
    return SimpleInfluence(BagOfWords(), rows or sentences(12), Reader(), **{**settings, **kwargs})


# ------------------------------------------------------------------ outputs


def test_output_holds_the_largest_signed_scores_first_and_losses_of_single_instances():
    tests = pairs(3, seed=1)
    outputs = of_pairs().interpret_instances(tests, k=4)
    scores = of_pairs().scores(tests)
    model, data = linear(), pairs(30)
    assert [type(output) for output in outputs] == [InterpretOutput] * 3
    for output, test, row in zip(outputs, tests, scores, strict=True):
        assert output._fields == ("test_instance", "loss", "top_k")
        assert output.test_instance is test
        assert output.loss == pytest.approx(F.cross_entropy(model(test[0]), test[1]).item(), rel=1e-12)
        best = row.topk(4)
        assert [influence.score for influence in output.top_k] == pytest.approx(best.values.tolist(), rel=1e-12)
        for influence, i in zip(output.top_k, best.indices.tolist(), strict=True):
            assert type(influence) is InstanceInfluence
            assert torch.equal(influence.instance[0], data[i][0])
            assert influence.loss == pytest.approx(F.cross_entropy(model(data[i][0]), data[i][1]).item(), rel=1e-12)


def test_interpret_is_one_of_interpret_instances():
    test = pairs(1, seed=1)[0]
    one, many = of_pairs().interpret(test, k=3), of_pairs().interpret_instances([test], k=3)[0]
    assert one.loss == many.loss
    assert [i.score for i in one.top_k] == [i.score for i in many.top_k]


def test_both_ends_are_the_most_helpful_and_the_most_harmful():
    test = pairs(1, seed=1)
    (output,) = of_pairs().interpret_both_ends(test, k=5)
    row = of_pairs().scores(test)[0].sort(descending=True).values.tolist()
    assert type(output) is BothEnds
    assert [i.score for i in output.most_helpful] == pytest.approx(row[:5], rel=1e-12)
    assert [i.score for i in output.most_harmful] == pytest.approx(row[:-6:-1], rel=1e-12)


@pytest.mark.parametrize(("k", "expected"), [(0, 0), (1, 1), (12, 12), (13, 12), (20, 12)])
def test_k_beyond_the_training_data_gives_all_of_it(k, expected):
    assert len(of_pairs(12).interpret(pairs(1, seed=1)[0], k).top_k) == expected


def test_the_default_k_is_20():
    assert len(of_pairs(30).interpret(pairs(1, seed=1)[0]).top_k) == 20
    assert len(of_pairs(5).interpret(pairs(1, seed=1)[0]).top_k) == 5


def test_no_test_instance_is_no_output():
    influence = of_pairs(9)
    assert influence.interpret_instances([]) == []
    assert influence.interpret_both_ends([]) == []
    assert influence.scores([]).shape == (0, 9)
    assert {name: tuple(t.shape) for name, t in influence.inverse_hvps([]).items()} == {
        "weight": (0, 3, 4),
        "bias": (0, 3),
    }


def test_test_instances_may_come_from_an_iterator_or_a_dataset():
    tests = pairs(3, seed=1)

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, i):
            if i >= 3:
                raise AssertionError("asked beyond its length")
            return tests[i]

    expected = of_pairs().scores(tests)
    for given in (iter(tests), Rows(), tuple(tests)):
        torch.testing.assert_close(of_pairs().scores(given), expected, rtol=0, atol=0)


# ------------------------------------------------------------------ files, readers, loaders


def test_files_are_read_by_the_readers():
    class Upside(Reader):
        def read(self, file_path):
            return super().read([(text, 1 - label) for text, label in file_path])

    rows = sentences(3, seed=1)
    from_file = of_text().interpret_from_file(rows, k=2)
    given = of_text().interpret_instances([text_instance(*row) for row in rows], k=2)
    assert [o.top_k[0].score for o in from_file] == [o.top_k[0].score for o in given]
    upside = of_text(test_dataset_reader=Upside()).interpret_from_file(rows, k=2)
    given = of_text().interpret_instances([text_instance(text, 1 - label) for text, label in rows], k=2)
    assert [o.loss for o in upside] == [o.loss for o in given]


def test_a_dataset_takes_the_place_of_a_file():
    tests = pairs(2, seed=1)
    outputs = of_pairs().interpret_from_file(tests, k=1)
    assert [o.top_k[0].score for o in outputs] == [o.top_k[0].score for o in of_pairs().interpret_instances(tests, k=1)]


def test_of_a_loader_only_the_instances_count():
    """A loader that is not ours, with the least that is used of AllenNLP's."""

    class Loader:
        def __init__(self, reader, data_path, batch_size, reverse):
            self.instances = list(reader.read(data_path))[::-1] if reverse else list(reader.read(data_path))
            self.batch_size, self.calls = batch_size, []

        def set_target_device(self, device):
            self.calls.append(device)

        def index_with(self, vocab):
            self.calls.append(vocab)

        def iter_instances(self):
            return iter(self.instances)

    class TheirLazy:
        """AllenNLP's `Lazy` has this method, and is no class of ours."""

        def construct(self, **kwargs):
            made.append(Loader(**kwargs, reverse=True))
            return made[-1]

    made = []
    test = text_instance("good film", 1)
    scores = of_text(train_data_loader=TheirLazy()).scores([test])
    again = of_text(train_data_loader=Lazy(Loader, {"reverse": True})).scores([test])
    assert torch.equal(scores, again)
    assert made[0].batch_size == 1
    assert made[0].calls[0] == torch.device("cpu")
    assert isinstance(made[0].calls[1].index, dict)


def test_a_dataset_is_not_copied():
    asked = []

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 10

        def __getitem__(self, i):
            asked.append(i)
            return pairs(10)[i]

    SimpleInfluence.from_dataset(linear(), Rows(), loss_fn=F.cross_entropy, progress=False)
    assert asked == []


def test_mappings_and_collate_fn():
    """Ragged rows, padded by the user's collate_fn for LiSSA and alone for scores, equal the same rows given whole."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = linear(1, 2)

        def forward(self, x, mask, y):
            return {"loss": F.cross_entropy(self.net(((x * mask).sum(1) / mask.sum(1)).unsqueeze(1)), y)}

    generator = torch.Generator().manual_seed(0)
    ragged = [{"x": torch.randn(1 + i % 4, generator=generator).double(), "y": i % 2} for i in range(12)]

    def pad(rows):
        longest = max(len(row["x"]) for row in rows)
        x = torch.stack([F.pad(row["x"], (0, longest - len(row["x"]))) for row in rows])
        mask = torch.stack([(torch.arange(longest) < len(row["x"])).double() for row in rows])
        return {"x": x, "mask": mask, "y": torch.tensor([row["y"] for row in rows])}

    whole = [{name: t[i] for name, t in pad(ragged).items()} for i in range(12)]
    settings = {"ridge": 0.5, "scale": 5.0, "recursion_depth": 20, "progress": False}
    by_pad = SimpleInfluence.from_dataset(Masked(), ragged, collate_fn=pad, **settings).scores(ragged[:2])
    by_rows = SimpleInfluence.from_dataset(Masked(), whole, **settings).scores(whole[:2])
    torch.testing.assert_close(by_pad, by_rows, rtol=1e-12, atol=1e-14)


# ------------------------------------------------------------------ what is known of training


def test_train_instances_hold_losses_and_gradients_in_the_order_of_used_params():
    model, data = linear(), pairs(5)
    instances = of_pairs(5, model=model).train_instances
    for instance, (x, y) in zip(instances, data, strict=True):
        assert type(instance) is InstanceWithGrads
        loss = F.cross_entropy(model(x), y)
        assert instance.loss == pytest.approx(loss.item(), rel=1e-12)
        for got, expected in zip(instance.grads, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            torch.testing.assert_close(got, expected)
            assert not got.requires_grad


def test_a_failure_leaves_nothing_half_built():
    """AllenNLP kept the instances before the bad one, and ranked those the next time."""
    rows = sentences(12)
    rows[5] = (rows[5][0], None)
    influence = of_text(rows)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"Training instance 5: .*label"):
            _ = influence.train_instances
        with pytest.raises(ValueError, match=r"Training instance 5: .*label"):
            influence.interpret(text_instance("good film", 1))


def test_the_model_may_be_trained_on_between_calls():
    model = linear()
    influence = of_pairs(model=model)
    test = pairs(1, seed=1)
    before = influence.scores(test)
    with torch.no_grad():
        model.weight.mul_(0.5)
    fresh = of_pairs(model=model)
    fresh._draw(fresh.settings.steps)  # the second call goes on where the first stopped
    after = influence.scores(test)
    torch.testing.assert_close(after, fresh.scores(test), rtol=1e-12, atol=1e-14)
    assert not torch.allclose(before, after, rtol=1e-3)


# ------------------------------------------------------------------ nothing of the caller's changes


class Everything(nn.Module):
    """Flags, buffers and Python state that a careless interpreter would change."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4, sparse=True)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(4, 3)
        self.frozen = nn.Linear(4, 4)
        self.frozen.requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()))
        self.history = []

    def forward(self, word, y):
        self.calls += 1
        self.history.append(len(word))
        hidden = self.drop(self.norm(self.frozen(self.embed(word))))
        return {"loss": F.cross_entropy(self.out(hidden), y), "logits": hidden}


CALLS = {
    "interpret": lambda influence, rows: influence.interpret(rows[0]),
    "interpret_instances": lambda influence, rows: influence.interpret_instances(rows[:2]),
    "interpret_both_ends": lambda influence, rows: influence.interpret_both_ends(rows[:2]),
    "interpret_from_file": lambda influence, rows: influence.interpret_from_file(rows[:2]),
    "scores": lambda influence, rows: influence.scores(rows[:2]),
    "inverse_hvps": lambda influence, rows: influence.inverse_hvps(rows[:2]),
    "self_influence": lambda influence, rows: influence.self_influence(),
    "used_params": lambda influence, rows: influence.used_params,
    "used_param_names": lambda influence, rows: influence.used_param_names,
    "train_instances": lambda influence, rows: influence.train_instances,
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("failing", [False, True], ids=["", "on-failure"])
def test_nothing_of_the_callers_changes(call, failing):
    model = Everything()
    model.embed.eval()  # a mixture of modes
    model.out.weight.grad = torch.ones_like(model.out.weight)
    rows = [{"word": i % 5, "y": i % 3} for i in range(10)]
    if failing:
        rows[0] = {"word": 99, "y": 0}
    watch = Watch(model)
    influence = SimpleInfluence.from_dataset(
        model, rows, params_to_freeze=["norm"], ridge=0.5, scale=9.0, recursion_depth=8, progress=False
    )
    assert watch.changes() == []
    if failing:
        with pytest.raises(ValueError, match=r"[Ii]nstance 0: IndexError"):
            CALLS[call](influence, rows)
    else:
        CALLS[call](influence, rows)
    assert watch.changes() == []
    assert model.history == []
    assert len(rows) == 10


def test_it_works_under_no_grad():
    expected = of_pairs().scores(pairs(1, seed=1))
    with torch.no_grad():
        assert torch.equal(of_pairs().scores(pairs(1, seed=1)), expected)


def test_progress_is_shown_or_not(capfd, monkeypatch):
    monkeypatch.setattr("bridge.progress.DELAY_SECONDS", 0.0)
    of_pairs(progress=False).interpret(pairs(1, seed=1)[0])
    assert capfd.readouterr() == ("", "")
    of_text(progress=True).interpret(text_instance("good film", 1))
    shown = capfd.readouterr().err
    assert all(words in shown for words in ("loading instances", "LiSSA", "residual and scores"))
    monkeypatch.setattr("bridge.scored.MOST_FOUND", 0)
    of_text(progress=True).interpret(text_instance("good film", 1))
    shown = capfd.readouterr().err
    assert all(words in shown for words in ("loading instances", "LiSSA", "scoring", "measuring the residual"))


# ------------------------------------------------------------------ names and archives


def test_the_registry_knows_simple_influence():
    assert InfluenceInterpreter.default_implementation == "simple-influence"
    assert InfluenceInterpreter.list_available()[0] == "simple-influence"
    assert InfluenceInterpreter.by_name("simple-influence") is SimpleInfluence


def test_an_archive_gives_an_interpreter():
    """The parts of AllenNLP's `Archive` that are used."""

    class Archive:
        model = BagOfWords()
        config = {"train_data_path": sentences(12)}  # noqa: RUF012
        dataset_reader = Reader()
        validation_dataset_reader = Reader()

    test = text_instance("good film", 1)
    settings = {"ridge": 0.5, "scale": 5.0, "recursion_depth": 20, "progress": False}
    for cls in (InfluenceInterpreter, SimpleInfluence):
        influence = cls.from_archive(Archive, **settings)
        assert type(influence) is SimpleInfluence
        assert torch.equal(influence.scores([test]), of_text().scores([test]))
    other = SimpleInfluence.from_archive(Archive, train_data_path=sentences(5), params_to_freeze=["embed"], **settings)
    assert other.scores([test]).shape == (1, 5)
    assert other.used_param_names == ["out.weight", "out.bias"]
