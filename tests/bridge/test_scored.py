"""Scores in large padded batches are those of batches of one, and batches of one where they would not be."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lissa
from bridge import SimpleInfluence, scored, strategies
from bridge.scored import losses, scores
from lissa import tree
from tests.bridge.fakes import BagOfWords, Reader, pairs, sentences, two_layers

EXACT = {"rtol": 1e-10, "atol": 1e-12}
"""Sums of a few dozen terms in float64, in another order."""


class Packed(nn.Module):
    """Neither vmap nor forward mode takes it."""

    def __init__(self):
        super().__init__()
        self.embed, self.rnn, self.out = nn.Embedding(9, 3), nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)
        self.double()

    def forward(self, ids, length, y):
        packed = nn.utils.rnn.pack_padded_sequence(self.embed(ids), length, batch_first=True, enforce_sorted=False)
        return {"loss": F.cross_entropy(self.out(self.rnn(packed)[1][0][-1]), y)}


class Unmasked(BagOfWords):
    """Padding counts in the mean over words."""

    def forward(self, text, label=None, **metadata):
        logits = self.out(self.embed(text["tokens"]["tokens"]).mean(1))
        return {"loss": F.cross_entropy(logits, label)}


class Normalised(nn.Module):
    """Rows are normalised by the batch."""

    def __init__(self):
        super().__init__()
        self.net = two_layers()

    def forward(self, x, y):
        z = self.net(x)
        return {"loss": F.cross_entropy(z - z.mean(0), y)}


def texts(model, **settings):
    return SimpleInfluence(model, sentences(40), Reader(), progress=False, **settings)


def of_packed(**settings):
    generator = torch.Generator().manual_seed(0)
    data = [{"ids": torch.randint(9, (5,), generator=generator), "length": 1 + i % 5, "y": i % 2} for i in range(23)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SimpleInfluence.from_dataset(Packed(), data, progress=False, **settings)


def padded(rows):
    x = nn.utils.rnn.pad_sequence([x for x, _ in rows], batch_first=True)
    return {"x": x, "y": torch.stack([y for _, y in rows])}


class Ragged(nn.Module):
    """Takes sequences that the user's function pads with zeros, which have no effect."""

    def __init__(self):
        super().__init__()
        self.net, self.out = nn.Linear(1, 3, bias=False).double(), nn.Linear(3, 2).double()

    def forward(self, x, y):
        return {"loss": F.cross_entropy(self.out(self.net(x.unsqueeze(-1)).tanh().sum(1)), y)}


def ragged(**settings):
    data = [(torch.randn(1 + i % 7).double(), torch.tensor(i % 2)) for i in range(30)]
    return SimpleInfluence.from_dataset(Ragged(), data, collate_fn=padded, progress=False, **settings)


TOGETHER = {
    "alike": lambda **kw: SimpleInfluence.from_dataset(
        two_layers(), pairs(30), loss_fn=F.cross_entropy, progress=False, **kw
    ),
    "texts": lambda **kw: texts(BagOfWords(), **kw),
    "sparse embedding": lambda **kw: texts(BagOfWords(sparse=True), **kw),
    "packed": of_packed,
    "the user's padding": ragged,
}
ALONE = {
    "padding counts": lambda **kw: texts(Unmasked(), **kw),
    "rows depend on each other": lambda **kw: SimpleInfluence.from_dataset(
        Normalised(), [{"x": x, "y": y} for x, y in pairs(12)], progress=False, **kw
    ),
    "losses are not known": lambda **kw: SimpleInfluence.from_dataset(
        two_layers(), pairs(12), loss_fn=lambda z, y: -z.log_softmax(1)[torch.arange(len(y)), y].mean(), **kw
    ),
}


@pytest.fixture(autouse=True)
def _rows_are_preferred(monkeypatch):
    """Whatever is quicker for so few."""
    monkeypatch.setattr(strategies, "by_gradients", lambda *_: False)


def found(influence, chosen=None, **arguments):
    """Scores of three random vectors, in order of index; by gradients of batches of one; how many were in a batch."""
    sizes = []
    with influence._session() as session:
        ihvps = tree.normal_like(
            {k: p.expand(3, *p.shape) for k, p in session.model.params.items()},
            generator=torch.Generator().manual_seed(1),
        )
        got = torch.full((3, len(influence._train)), torch.nan, dtype=torch.float64)
        for indices, some in scores(session, influence._train, ihvps, chosen=chosen, **arguments):
            got[:, indices] = some
            sizes.append(len(indices))
        alone = [session.loss_and_gradient("training", influence._train, i)[1] for i in range(len(influence._train))]
        refused = bool(session.known.get("instances go alone"))
    expected = torch.stack([torch.stack([tree.vdot(g, tree.map(lambda t, k=k: t[k], ihvps)) for g in alone])
                            for k in range(3)])  # fmt: skip
    return got, expected, sizes, refused


@pytest.mark.parametrize("case", TOGETHER)
def test_scores_in_company_are_inner_products_of_gradients(case):
    got, expected, sizes, refused = found(TOGETHER[case]())
    torch.testing.assert_close(got, expected, **EXACT)
    assert sizes == [got.shape[1]]  # all at once
    assert not refused


@pytest.mark.parametrize("case", ALONE)
def test_where_company_matters_each_instance_is_scored_alone(case):
    got, expected, _, refused = found(ALONE[case]())
    torch.testing.assert_close(got, expected, **EXACT)
    assert refused


def test_a_few_at_a_time_and_some_of_them():
    got, expected, sizes, _ = found(texts(BagOfWords(), score_batch_size=7), chosen=range(3, 20))
    torch.testing.assert_close(got[:, 3:20], expected[:, 3:20], **EXACT)
    assert got[:, :3].isnan().all()
    assert sizes == [7, 7, 3]


def test_windows_are_looked_at_one_by_one(monkeypatch):
    monkeypatch.setattr(scored, "WINDOW", 16)
    got, expected, sizes, _ = found(texts(BagOfWords()))
    torch.testing.assert_close(got, expected, **EXACT)
    assert sizes == [16, 16, 8]


def test_many_vectors_of_long_sequences_go_by_gradients(monkeypatch):
    monkeypatch.setattr(strategies, "by_gradients", lambda *_: True)
    got, expected, sizes, refused = found(texts(BagOfWords()))
    torch.testing.assert_close(got, expected, **EXACT)
    assert len(sizes) > 1  # by length
    assert not refused


def test_where_gradients_are_taken_one_by_one_texts_go_together(monkeypatch):
    monkeypatch.setattr(strategies, "by_gradients", lambda *_: True)
    got, expected, sizes, refused = found(of_packed())
    torch.testing.assert_close(got, expected, **EXACT)
    assert sizes == [23]
    assert not refused


def of_small_batches_only(monkeypatch):
    plain = strategies.row_scores

    def small(model, ihvps, batch, count, **asked):
        if count > 12:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(model, ihvps, batch, count, **asked)

    monkeypatch.setattr(strategies, "row_scores", small)


def test_out_of_memory_halves_the_batch(monkeypatch, caplog):
    of_small_batches_only(monkeypatch)
    got, expected, sizes, _ = found(texts(BagOfWords()))
    torch.testing.assert_close(got, expected, **EXACT)
    assert sizes == [10, 10, 10, 10]
    assert "Out of memory" in caplog.text


def test_an_instance_whose_score_is_not_finite_is_named():
    data = pairs(12)
    data[5] = (data[5][0] * torch.nan, data[5][1])
    influence = SimpleInfluence.from_dataset(two_layers(), data, loss_fn=F.cross_entropy, progress=False)
    with influence._session() as session:
        ihvps = tree.map(lambda p: torch.ones(1, *p.shape, dtype=p.dtype), session.model.params)
        with pytest.raises(ValueError, match="Training instance 5: its score is not finite"):
            list(scores(session, influence._train, ihvps))


def both(influence, count, **session_settings):
    """The mean Hessian times the first of three vectors, and all scores, if both are found in one pass."""
    with influence._session() as session:
        session = replace(session, **{"will_score": True, **session_settings})
        train, params = influence._train, session.model.params
        ihvps = tree.normal_like(
            {k: p.expand(3, *p.shape) for k, p in params.items()}, generator=torch.Generator().manual_seed(1)
        )
        products = scored.with_products(session, train, ihvps, count)
        if products is None:
            assert scored.found_before(session, ihvps) is None
            return None
        expected = tree.map(lambda t: torch.zeros_like(t[:count]), ihvps)
        for i in range(len(train)):
            batch = session.batch(train, [i])
            for k in range(count):
                vector = tree.map(lambda t, k=k: t[k], ihvps)
                of_one = lissa.hvp(session.model.loss_fn, params, batch, vector, mode="double-backward")
                for name, t in of_one.items():
                    expected[name][k] += t / len(train)
        known = scored.found_before(session, ihvps)
        assert known is not None
        assert scored.found_before(session, dict(ihvps)) is None  # others, for all that is known
        some = scored.scores(session, train, ihvps, chosen=range(2))
        got = scored.columns(some, range(2)), scored.columns(scored.scores(session, train, ihvps), range(len(train)))
        assert scored.found_before(session, ihvps) is None  # nothing is held any longer than it is of use
        again = scored.columns(scored.scores(session, train, ihvps), range(len(train)))
        of_some = {i: float(session.loss_and_gradient("training", train, i)[0]) for i in (3, 1, 8)}
        assert losses(session, train, [3, 1, 8]) == pytest.approx(of_some, rel=1e-10)
    return products, expected, got, again


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("case", TOGETHER)
def test_products_and_scores_in_one_pass(case, count):
    products, expected, (some, scores), again = both(TOGETHER[case](), count)
    torch.testing.assert_close(products, expected, **EXACT)
    torch.testing.assert_close(scores, again, **EXACT)
    torch.testing.assert_close(some, again[:, :2], **EXACT)


@pytest.mark.parametrize("settings", [{"score_batch_size": 7}, {}])
def test_products_and_scores_in_several_batches(settings, monkeypatch):
    monkeypatch.setattr(scored, "WINDOW", 16)
    of_small_batches_only(monkeypatch)
    products, expected, (_, scores), again = both(texts(BagOfWords(), **settings), 2)
    torch.testing.assert_close(products, expected, **EXACT)
    torch.testing.assert_close(scores, again, **EXACT)


@pytest.mark.parametrize("case", ALONE)
def test_where_company_matters_there_is_no_pass_for_both(case):
    assert both(ALONE[case](), 1) is None


def test_there_is_no_pass_for_both_where_scores_are_not_wanted_or_too_many(monkeypatch):
    assert both(texts(BagOfWords()), 1, will_score=False) is None
    monkeypatch.setattr(scored, "MOST_FOUND", 3 * 40 - 1)
    assert both(texts(BagOfWords()), 1) is None


@pytest.mark.filterwarnings("ignore::bridge.diagnostics.InfluenceWarning")
@pytest.mark.parametrize(
    ("settings", "sampled"),
    [({"ridge": 0.5, "scale": 5.0, "recursion_depth": 50}, []), ({}, [0])],
    ids=["solved", "plain gradients"],
)
def test_a_call_goes_over_the_training_data_once_for_residuals_and_scores(settings, sampled, monkeypatch):
    rows, plain = [], strategies.row_scores
    monkeypatch.setattr(
        strategies, "row_scores", lambda *args, **asked: rows.append((args[3], asked)) or plain(*args, **asked)
    )

    def called():
        influence = texts(BagOfWords(), measure_residual=True, **settings)
        del rows[:]
        return influence.scores([influence._train[i] for i in range(4)]), influence.diagnostics

    scores, diagnostics = called()
    assert [asked["products"] for count, asked in rows if count == 40] == [4, *sampled]  # in one pass
    assert diagnostics.correlation_with_plain.isnan().all() == (not sampled)
    monkeypatch.setattr(scored, "MOST_FOUND", 0)
    scores_apart, diagnostics_apart = called()
    assert [asked["products"] for count, asked in rows if count == 40] == [*sampled, 0]
    torch.testing.assert_close(scores, scores_apart, **EXACT)
    for name in ("relative_residual", "correlation_with_plain"):
        one, other = getattr(diagnostics, name), getattr(diagnostics_apart, name)
        torch.testing.assert_close(one, other, equal_nan=True, **EXACT)


def test_what_has_diverged_is_not_scored():
    influence = texts(BagOfWords(), ridge=0.001, scale=0.001, recursion_depth=200)
    with pytest.raises(lissa.SolverError, match="DIVERGED"):
        influence.scores([influence._train[0]])


def losses_of(influence, chosen):
    """By index; those of instances alone; how many times the model was called for the former."""
    calls = []
    with influence._session() as session:
        loss_fn = session.model.loss_fn
        counted = session.model._replace(loss_fn=lambda p, b: calls.append(1) or loss_fn(p, b))
        got = losses(replace(session, model=counted), influence._train, chosen)
        expected = {i: float(session.loss_and_gradient("training", influence._train, i)[0]) for i in chosen}
    return got, expected, len(calls)


@pytest.mark.parametrize("case", [*TOGETHER, *ALONE])
def test_losses_are_those_of_instances_alone(case):
    influence = {**TOGETHER, **ALONE}[case]()
    got, expected, calls = losses_of(influence, list(range(10)))
    assert got == pytest.approx(expected, rel=1e-12)
    if case in ("texts", "sparse embedding", "packed", "the user's padding"):
        assert calls == 5  # the longest for its work, both ends alone, the two together, and all


def test_a_few_losses_are_computed_alone():
    got, expected, calls = losses_of(of_packed(), [3, 11, 6])
    assert got == pytest.approx(expected, rel=1e-12)
    assert calls >= 3


def test_an_instance_whose_loss_is_not_finite_is_named():
    data = [(torch.ones(1 + i % 3).double() * (torch.nan if i == 5 else 1), torch.tensor(i % 2)) for i in range(12)]
    influence = SimpleInfluence.from_dataset(Ragged(), data, collate_fn=padded, progress=False)
    with influence._session() as session, pytest.raises(ValueError, match="Training instance 5: its loss is not fin"):
        losses(session, influence._train, range(12))
