import math
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bridge import InfluenceWarning, SimpleInfluence
from lissa import SolverError
from tests.bridge.fakes import BagOfWords, Reader, Watch, linear, pairs, sentences, text_instance, two_layers
from tests.oracles import dense_gradients, dense_hessian, flatten

# Test problems are small and solved roughly on purpose; the tests that are about warnings look at them.
pytestmark = pytest.mark.filterwarnings("ignore::bridge.diagnostics.InfluenceWarning")

# Sums of at most a few hundred products in float64: rounding stays far below this.
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def interpreter(model, data, **kwargs):
    settings = {"loss_fn": F.cross_entropy, "ridge": 0.5, "scale": 5.0, "recursion_depth": 20, "progress": False}
    return SimpleInfluence.from_dataset(model, data, **{**settings, **kwargs})


def stacked(data):
    x, y = zip(*data, strict=True)
    return torch.stack(x), torch.stack(y)


def parameters(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def linear_losses(params, batch):
    x, y = batch
    return F.cross_entropy(x @ params["weight"].T + params["bias"], y, reduction="none")


def linear_mean_loss(params, batch):
    return linear_losses(params, batch).mean()


# ------------------------------------------------------------------ scores


def test_scores_are_gradients_times_the_solution():
    model, data = linear(), pairs(30)
    params = parameters(model)
    influence = interpreter(model, data, recursion_depth=300, lissa_batch_size=30)
    tests = pairs(4, seed=1)

    H = dense_hessian(linear_mean_loss, params, stacked(data))
    train, test = (dense_gradients(linear_losses, params, stacked(rows)) for rows in (data, tests))
    # One batch of all the data: the recursion contracts by 1 - ridge/scale = 0.9 a step, so 300 steps leave 2e-14.
    expected = test @ torch.linalg.solve(H + 0.5 * torch.eye(len(H), dtype=H.dtype), train.T)
    torch.testing.assert_close(influence.scores(tests), expected, **EXACT)
    ihvps = influence.inverse_hvps(tests)
    by_hand = torch.cat([ihvps["weight"].reshape(4, -1), ihvps["bias"]], 1)
    torch.testing.assert_close(by_hand @ train.T, expected, **EXACT)


def test_self_influence_is_the_score_of_an_example_on_itself():
    model, data = linear(), pairs(30)
    settings = {"recursion_depth": 50, "lissa_batch_size": 7}
    scores = interpreter(model, data, **settings).scores(data)
    torch.testing.assert_close(interpreter(model, data, **settings).self_influence(), scores.diagonal(), **EXACT)


def test_damping_is_allennlps_and_ridge_is_the_hessians():
    model, data, tests = linear(), pairs(30), pairs(2, seed=1)
    settings = {"scale": 8.0, "recursion_depth": 40}
    by_ridge = interpreter(model, data, ridge=0.4, **settings).scores(tests)
    by_damping = interpreter(model, data, ridge=None, damping=0.05, **settings).scores(tests)
    torch.testing.assert_close(by_ridge, by_damping, **EXACT)


def test_scores_match_leave_one_out_refits():
    """Koh & Liang's claim: without example i the test loss is higher by score_i / n."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.tensor(digits.data, dtype=torch.float64).reshape(-1, 8, 8) / 16
    x = F.avg_pool2d(pixels.unsqueeze(1), 2).reshape(-1, 16)  # 4 x 4 pixels keep the refits fast
    y = torch.tensor(digits.target)
    n, l2 = 1000, 0.1
    P = 170

    def pieces(theta, keep):
        """Gradient and Hessian of the regularised mean loss over the examples kept, n in the denominator."""
        inputs = torch.cat([x[:n][keep], torch.ones(int(keep.sum()), 1, dtype=torch.float64)], 1)
        W = torch.cat([theta[:160].reshape(10, 16), theta[160:].unsqueeze(1)], 1)
        p = (inputs @ W.T).softmax(1)
        G = (p - F.one_hot(y[:n][keep], 10)).T @ inputs / n
        D = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
        H = torch.einsum("nab,ni,nj->aibj", D, inputs, inputs) / n
        order = torch.cat([torch.arange(170).reshape(10, 17)[:, :16].reshape(-1), torch.arange(16, 170, 17)])
        eye = torch.eye(P, dtype=torch.float64)
        return G.reshape(-1)[order] + l2 * theta, H.reshape(P, P)[order][:, order] + l2 * eye

    def fit(theta, keep):
        while True:
            gradient, hessian = pieces(theta, keep)
            if gradient.norm() <= 1e-10:
                return theta
            theta = theta - torch.linalg.solve(hessian, gradient)

    everything = torch.ones(n, dtype=torch.bool)
    theta = fit(torch.zeros(P, dtype=torch.float64), everything)
    model = nn.Linear(16, 10, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(theta[:160].reshape(10, 16))
        model.bias.copy_(theta[160:])

    test = n + 5
    # One batch of all the data: no noise; it contracts by 1 - ridge/scale = 0.95 a step.
    influence = interpreter(
        model, list(zip(x[:n], y[:n], strict=True)), ridge=l2, scale=2.0, recursion_depth=500, lissa_batch_size=n
    )
    scores = influence.scores([(x[test], y[test])])[0]
    assert float(influence.diagnostics.relative_residual.max()) < 1e-8

    def test_loss(theta):
        params = {"weight": theta[:160].reshape(10, 16), "bias": theta[160:]}
        return linear_mean_loss(params, (x[test : test + 1], y[test : test + 1]))

    chosen = torch.cat([scores.topk(20).indices, scores.topk(20, largest=False).indices, torch.arange(0, n, 50)])
    changes = []
    for i in chosen.tolist():
        keep = everything.clone()
        keep[i] = False
        changes.append(test_loss(fit(theta, keep)) - test_loss(theta))
    changes, predicted = torch.stack(changes), scores[chosen] / n

    pearson = torch.corrcoef(torch.stack([predicted, changes]))[0, 1]
    slope = (predicted @ changes) / (predicted @ predicted)
    assert pearson >= 0.999
    assert abs(slope - 1) <= 0.05


def test_scores_stay_in_the_dtype_of_the_model():
    for dtype in (torch.float32, torch.float64):
        assert interpreter(linear(dtype=dtype), pairs(10, dtype=dtype)).scores(pairs(1, dtype=dtype)).dtype == dtype


def test_two_scores_that_differ_below_float32_are_ranked_in_float64():
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, x):
            return {"loss": (self.w * x).mean() + (self.w**2).mean()}

    data = [{"x": torch.tensor(v, dtype=torch.float64)} for v in (1.0, 1.0 + 1e-12, 1.0 - 1e-12)]
    output = SimpleInfluence.from_dataset(Weighted(), data, progress=False, ridge=1.0, scale=5.0).interpret(data[0])
    assert [float(influence.instance["x"]) for influence in output.top_k] == [1.0 + 1e-12, 1.0, 1.0 - 1e-12]


# ------------------------------------------------------------------ LiSSA's batches


@pytest.mark.parametrize(("depth", "expected"), [(0.25, 1), (0.5, 3), (1.0, 6), (2.5, 15), (0.1, 0), (7, 7), (1, 1)])
def test_depth_is_a_fraction_of_the_batches_or_a_number_of_steps(depth, expected):
    influence = interpreter(linear(), pairs(23), lissa_batch_size=4, recursion_depth=depth)
    influence.interpret(pairs(1)[0])
    assert influence.diagnostics.steps == expected


def batches_of(influence):
    """The index batches of the next solve."""
    return influence._draw(influence.settings.steps)


def test_passes_are_shuffled_and_ragged_and_go_on_from_run_to_run():
    influence = interpreter(linear(), pairs(10), lissa_batch_size=4, recursion_depth=2, num_samples=3)
    runs = batches_of(influence) + batches_of(influence)
    batches = [batch for run in runs for batch in run]
    assert [len(batch) for batch in batches] == [4, 4, 2] * 4
    passes = [[i for batch in batches[start : start + 3] for i in batch] for start in range(0, 12, 3)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert len({tuple(one) for one in passes}) == 4


def test_the_ragged_batch_has_the_weight_of_a_full_one():
    """Scores equal AllenNLP's recursion on the drawn batches, each batch's mean loss counting once."""
    model, data, test = linear(), pairs(10), pairs(1, seed=1)
    settings = {"lissa_batch_size": 4, "recursion_depth": 5, "num_samples": 2, "ridge": None, "damping": 0.02}
    drawn = batches_of(interpreter(model, data, **settings))
    params = parameters(model)
    v = dense_gradients(linear_losses, params, stacked(test))[0]
    total = torch.zeros_like(v)
    for run in drawn:
        c = v
        for batch in run:
            H = dense_hessian(linear_mean_loss, params, stacked([data[i] for i in batch]))
            c = v + (1 - 0.02) * c - H @ c / 5.0
        total += c / 5.0 / 2
    expected = dense_gradients(linear_losses, params, stacked(data)) @ total
    torch.testing.assert_close(interpreter(model, data, **settings).scores(test)[0], expected, **EXACT)


def test_the_seed_fixes_the_scores():
    def scores(seed):
        return interpreter(linear(), pairs(30), seed=seed).scores(pairs(2, seed=1))

    assert torch.equal(scores(1), scores(1))
    assert not torch.equal(scores(1), scores(2))


def test_the_order_of_the_test_instances_has_no_effect():
    tests = pairs(5, seed=1)
    forward = interpreter(linear(), pairs(30)).scores(tests)
    backward = interpreter(linear(), pairs(30)).scores(tests[::-1])
    torch.testing.assert_close(forward, backward.flip(0), **EXACT)
    alone = interpreter(linear(), pairs(30)).scores(tests[3:4])
    torch.testing.assert_close(forward[3:4], alone, **EXACT)


def test_groups_of_test_instances_share_the_batches(monkeypatch):
    tests = pairs(5, seed=1)
    together = interpreter(linear(), pairs(30)).scores(tests)
    monkeypatch.setattr("bridge.strategies.STACK_LIMIT", 2 * 15)  # two vectors of 15 parameters at a time
    influence = interpreter(linear(), pairs(30))
    torch.testing.assert_close(influence.scores(tests), together, **EXACT)
    assert len(influence.diagnostics.status) == 5
    by_twos = interpreter(linear(), pairs(30)).self_influence()
    monkeypatch.undo()
    torch.testing.assert_close(by_twos, interpreter(linear(), pairs(30)).self_influence(), **EXACT)


# ------------------------------------------------------------------ diagnostics


def test_default_settings_warn_with_the_numbers():
    influence = SimpleInfluence.from_dataset(linear(), pairs(100), loss_fn=F.cross_entropy, progress=False)
    with pytest.warns(InfluenceWarning, match="gradient dot products") as caught:
        influence.interpret(pairs(1, seed=1)[0])
    text = str(caught[0].message)
    assert "damping * scale = 30" in text
    assert "ridge" in text
    assert influence.diagnostics.steps == 3
    assert float(influence.diagnostics.cosine_with_gradient) > 0.999


def test_zero_steps_are_said():
    influence = SimpleInfluence.from_dataset(linear(), pairs(24), loss_fn=F.cross_entropy, progress=False)
    with pytest.warns(InfluenceWarning, match="No LiSSA step was taken.*3 batches.*24 examples in batches of 8"):
        influence.interpret(pairs(1, seed=1)[0])


def test_a_solved_system_is_not_warned_of_and_described():
    influence = interpreter(linear(), pairs(30), recursion_depth=200, lissa_batch_size=30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        influence.interpret_instances(pairs(2, seed=1))
    words = influence.diagnostics.in_words()
    assert "effective damping of 0.5" in words
    assert "200 LiSSA steps of 30 of 30" in words
    assert "they are solved" in words


def test_the_residual_is_that_of_the_full_data():
    model, data, tests = linear(), pairs(30), pairs(3, seed=1)
    influence = interpreter(model, data, score_batch_size=7)
    ihvps = influence.inverse_hvps(tests)
    x = torch.cat([ihvps["weight"].reshape(3, -1), ihvps["bias"]], 1)
    params = parameters(model)
    H = dense_hessian(linear_mean_loss, params, stacked(data))
    v = dense_gradients(linear_losses, params, stacked(tests))
    residual = (v - x @ (H + 0.5 * torch.eye(len(H), dtype=H.dtype))).norm(dim=1) / v.norm(dim=1)
    torch.testing.assert_close(influence.diagnostics.relative_residual, residual, rtol=1e-8, atol=1e-12)
    cosine = F.cosine_similarity(x, v)
    torch.testing.assert_close(influence.diagnostics.cosine_with_gradient, cosine, **EXACT)


def test_the_residual_need_not_be_measured():
    influence = interpreter(linear(), pairs(30), measure_residual=False)
    influence.interpret(pairs(1, seed=1)[0])
    assert math.isnan(float(influence.diagnostics.relative_residual))
    assert "esidual" not in influence.diagnostics.in_words()


# ------------------------------------------------------------------ failures


def test_too_small_a_scale_is_an_error_that_says_what_to_change():
    influence = interpreter(linear(), pairs(30), ridge=0.001, scale=0.01, recursion_depth=200)
    with pytest.raises(SolverError, match=r"(?s)DIVERGED.*raise `scale` above 0.01.*ridge"):
        influence.interpret(pairs(1, seed=1)[0])


def test_nan_in_a_training_instance_is_named():
    data = pairs(30)
    data[17] = (data[17][0] * math.nan, data[17][1])
    influence = interpreter(linear(), data, recursion_depth=100)
    for call in (lambda: influence.interpret(pairs(1, seed=1)[0]), influence.self_influence):
        with pytest.raises(ValueError, match=r"Training instance 17: its \w+ is not finite"):
            call()


def test_nan_in_a_training_instance_that_lissa_did_not_meet_is_named():
    data = pairs(30)
    influence = interpreter(linear(), data, recursion_depth=1, measure_residual=False, lissa_batch_size=1)
    unmet = next(
        i
        for i in range(1, 30)
        if i not in batches_of(interpreter(linear(), data, lissa_batch_size=1, recursion_depth=1))[0][0]
    )
    data[unmet] = (data[unmet][0] * math.nan, data[unmet][1])
    with pytest.raises(ValueError, match=f"Training instance {unmet}: its score is not finite"):
        influence.interpret(pairs(1, seed=1)[0])


def test_nan_in_a_test_instance_is_named():
    tests = pairs(3, seed=1)
    tests[1] = (tests[1][0] * math.nan, tests[1][1])
    with pytest.raises(ValueError, match="Test instance 1: its loss is not finite"):
        interpreter(linear(), pairs(30)).interpret_instances(tests)


# ------------------------------------------------------------------ parameters


class Sometimes(nn.Module):
    """`odd` is used by instances with odd number alone, `idle` by none, `shift` linearly by all."""

    def __init__(self):
        super().__init__()
        self.main = linear()
        self.odd = linear(seed=1)
        self.idle = linear(seed=2)
        self.shift = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x, y, number):
        logits = self.main(x)
        if bool((number % 2 == 1).any()):
            logits = logits + self.odd(x) * (number % 2).unsqueeze(1)
        return {"loss": F.cross_entropy(logits, y) + self.shift * x[:, 0].mean()}


def numbered(n=12, seed=0):
    return [{"x": x, "y": y, "number": i} for i, (x, y) in enumerate(pairs(n, seed=seed))]


@pytest.mark.parametrize("lissa_batch_size", [1, 5])
def test_parameters_that_some_instance_uses_count_for_all(lissa_batch_size):
    influence = SimpleInfluence.from_dataset(
        Sometimes(),
        numbered(),
        ridge=0.5,
        scale=9.0,
        recursion_depth=10,
        progress=False,
        lissa_batch_size=lissa_batch_size,
    )
    assert influence.used_param_names == ["shift", "main.weight", "main.bias", "odd.weight", "odd.bias"]
    assert [id(p) for p in influence.used_params] == [
        id(dict(influence.model.named_parameters())[name]) for name in influence.used_param_names
    ]
    train = influence.train_instances
    assert float(train[0].grads[3].norm()) == 0.0
    assert float(train[1].grads[3].norm()) > 0.0
    # By hand: scores are the gradients of the instances times the solution, the one branch that vmap refuses included.
    tests = numbered(2, seed=1)
    ihvp = influence.inverse_hvps(tests)
    again = SimpleInfluence.from_dataset(
        Sometimes(),
        numbered(),
        ridge=0.5,
        scale=9.0,
        recursion_depth=10,
        progress=False,
        lissa_batch_size=lissa_batch_size,
    )
    scores = again.scores(tests)
    G = torch.stack([torch.cat([g.reshape(-1) for g in instance.grads]) for instance in train])
    X = torch.cat([ihvp[name].reshape(2, -1) for name in influence.used_param_names], 1)
    torch.testing.assert_close(scores, X @ G.T, **EXACT)


def test_a_parameter_the_loss_is_linear_in_has_a_zero_hessian_row():
    influence = SimpleInfluence.from_dataset(
        Sometimes(), numbered(), ridge=2.0, scale=9.0, recursion_depth=200, progress=False
    )
    tests = numbered(1, seed=1)
    # With a zero row, (0 + ridge) x = v in that entry: x = v / ridge.
    x = influence.inverse_hvps(tests)["shift"]
    torch.testing.assert_close(x, tests[0]["x"][:1] / 2.0, **EXACT)


def test_frozen_parameters_are_matched_at_the_start_of_their_names():
    class Projections(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = linear()
            self.proj_out = linear(seed=1)
            self.my_proj = linear(seed=2)

        def forward(self, x, y):
            return {"loss": F.cross_entropy(self.proj(x) + self.proj_out(x) + self.my_proj(x), y)}

    data = [{"x": x, "y": y} for x, y in pairs(12)]
    model = Projections()
    model.my_proj.bias.requires_grad_(False)
    watch = Watch(model)
    influence = SimpleInfluence.from_dataset(model, data, params_to_freeze=["proj"], progress=False)
    assert influence.used_param_names == ["my_proj.weight"]
    assert watch.changes() == []


def test_tied_parameters_count_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode = nn.Linear(4, 4, bias=False, dtype=torch.float64)
            self.decode = nn.Linear(4, 4, bias=False, dtype=torch.float64)
            self.decode.weight = self.encode.weight

        def forward(self, x):
            return self.decode(torch.tanh(self.encode(x)))

    model, data, tests = Tied(), pairs(20, classes=4), pairs(2, classes=4, seed=1)
    influence = interpreter(model, data, ridge=3.0, scale=8.0, recursion_depth=300, lissa_batch_size=20)
    assert influence.used_param_names == ["encode.weight"]

    def losses(params, batch):
        x, y = batch
        return F.cross_entropy(torch.tanh(x @ params["w"].T) @ params["w"].T, y, reduction="none")

    params = {"w": model.encode.weight.detach()}
    H = dense_hessian(lambda p, b: losses(p, b).mean(), params, stacked(data))
    train, test = (dense_gradients(losses, params, stacked(rows)) for rows in (data, tests))
    expected = test @ torch.linalg.solve(H + 3.0 * torch.eye(16, dtype=H.dtype), train.T)
    torch.testing.assert_close(influence.scores(tests), expected, **EXACT)


# ------------------------------------------------------------------ models that need care


def test_scores_are_taken_in_eval_mode():
    """Dropout is off, and BatchNorm takes batches of one; the numbers are those of the layers without noise."""

    def noisy(net):
        return nn.Sequential(
            nn.Dropout(0.5), nn.BatchNorm1d(4, affine=False, eps=1e-12, dtype=torch.float64), net
        ).train()

    data, tests = pairs(20), pairs(2, seed=1)
    expected = interpreter(linear(), data).scores(tests)
    torch.testing.assert_close(interpreter(noisy(linear()), data).scores(tests), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("sparse", [False, True])
def test_instances_of_different_lengths_sparse_embeddings_and_metadata(sparse):
    """Text goes through padding in LiSSA's batches and stays as long as it is when scored."""
    rows = sentences(20)
    influence = SimpleInfluence(
        BagOfWords(sparse=sparse),
        rows,
        Reader(),
        ridge=0.5,
        scale=5.0,
        recursion_depth=400,
        lissa_batch_size=20,
        progress=False,
    )
    model = influence.model
    test = text_instance("very fine film", 1)

    ids = [[model.vocab.index[w] for w in text.split()] for text, _ in rows]

    def mean_loss(params, _):
        means = torch.stack([params["embed.weight"][i].mean(0) for i in ids])
        labels = torch.tensor([label for _, label in rows])
        return F.cross_entropy(means @ params["out.weight"].T + params["out.bias"], labels)

    params = parameters(model)
    H = dense_hessian(mean_loss, params, None)
    train = torch.stack([torch.cat([g.reshape(-1) for g in i.grads]) for i in influence.train_instances])
    # The sum of the instances' gradients is the gradient of the mean loss: the instances are what the loss says.
    gradient = torch.func.grad(lambda p: mean_loss(p, None))(params)
    torch.testing.assert_close(train.mean(0), flatten(gradient), **EXACT)
    ihvp = influence.inverse_hvps([test])
    v = torch.cat([g.reshape(-1) for g in _gradient(model, test)])
    x = torch.linalg.solve(H + 0.5 * torch.eye(len(H), dtype=H.dtype), v)
    torch.testing.assert_close(torch.cat([ihvp[name].reshape(-1) for name in params]), x, **EXACT)
    again = SimpleInfluence(
        model, rows, Reader(), ridge=0.5, scale=5.0, recursion_depth=400, lissa_batch_size=20, progress=False
    )
    torch.testing.assert_close(again.scores([test])[0], train @ x, **EXACT)


def _gradient(model, instance):
    dense = BagOfWords()
    dense.load_state_dict(model.state_dict())
    batch = {
        name: field.batch_tensors([field.as_tensor(field.get_padding_lengths())])
        for name, field in instance.fields.items()
    }
    return torch.autograd.grad(dense(**batch)["loss"], list(dense.parameters()))


class Counting(nn.Module):
    """Counts with `.item()`, keeps its last logits, and has a buffer that it writes to: nothing vmap would take."""

    def __init__(self):
        super().__init__()
        self.net = two_layers()
        self.correct, self.calls, self.last = 0, [], None
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x, y):
        logits = self.net(x)
        self.correct += (logits.argmax(1) == y).sum().item()
        self.calls.append(len(x))
        self.last = logits
        self.seen += len(x)
        return {"loss": F.cross_entropy(logits, y)}


def test_a_model_that_vmap_refuses_is_scored_one_by_one(caplog):
    data, tests = pairs(20), pairs(3, seed=1)
    expected = interpreter(two_layers(), data).scores(tests)
    model = Counting()
    watch = Watch(model)
    influence = SimpleInfluence.from_dataset(
        model, [{"x": x, "y": y} for x, y in data], ridge=0.5, scale=5.0, recursion_depth=20, progress=False
    )
    as_dicts = [{"x": x, "y": y} for x, y in tests]
    torch.testing.assert_close(influence.scores(as_dicts), expected, **EXACT)
    assert watch.changes() == []
    assert (model.correct, model.calls, model.last) == (0, [], None)
    slower = [record for record in caplog.records if "slower way" in record.message]
    assert len(slower) == len({record.message for record in slower}) >= 1


def test_packed_sequences():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(9, 3, dtype=torch.float64)
            self.rnn = nn.LSTM(3, 4, batch_first=True, dtype=torch.float64)
            self.out = nn.Linear(4, 2, dtype=torch.float64)

        def forward(self, ids, length, y):
            packed = nn.utils.rnn.pack_padded_sequence(self.embed(ids), length, batch_first=True, enforce_sorted=False)
            return {"loss": F.cross_entropy(self.out(self.rnn(packed)[1][0][-1]), y)}

    generator = torch.Generator().manual_seed(0)
    data = [
        {"ids": torch.randint(9, (5,), generator=generator), "length": 1 + i % 5, "y": i % 2} for i in range(10)
    ]  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Packed()
    influence = SimpleInfluence.from_dataset(
        model, data, ridge=1.0, scale=5.0, recursion_depth=200, lissa_batch_size=10, progress=False
    )
    tests = data[:2]
    scores = influence.scores(tests)
    train = influence.train_instances
    G = torch.stack([torch.cat([g.reshape(-1) for g in instance.grads]) for instance in train])

    # A dense Hessian of the mean loss by differences of gradients, on the model itself in eval mode.
    model.eval()
    whole = {name: torch.stack([torch.as_tensor(row[name]) for row in data]) for name in data[0]}
    params = list(model.parameters())
    gradient = torch.autograd.grad(model(**whole)["loss"], params, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])
    H = torch.stack(
        [torch.cat([h.reshape(-1) for h in torch.autograd.grad(f, params, retain_graph=True)]) for f in flat]
    )
    expected = G[:2] @ torch.linalg.solve(H + torch.eye(len(H), dtype=H.dtype), G.T)
    torch.testing.assert_close(scores, expected, **EXACT)


@pytest.mark.parametrize("kind", ["layer", "sdpa"])
def test_attention(kind):
    """Kernels that cannot be differentiated twice, or forward, are switched without the user's doing."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            if kind == "layer":
                self.mix = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dtype=torch.float64)
            else:
                self.qkv = nn.Linear(4, 12, dtype=torch.float64)
            self.out = nn.Linear(4, 3, dtype=torch.float64)

        def forward(self, x):
            if kind == "layer":
                mixed = self.mix(x)
            else:
                q, k, v = self.qkv(x).reshape(len(x), -1, 3, 2, 2).permute(2, 0, 3, 1, 4)
                mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return self.out(mixed).mean(1)

    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(5, 4, generator=generator, dtype=torch.float64), torch.tensor(i % 3)) for i in range(9)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Attention()
    influence = interpreter(model, data, ridge=5.0, scale=12.0, recursion_depth=300, lissa_batch_size=9)
    scores = influence.scores(data[:2])
    G = torch.stack([torch.cat([g.reshape(-1) for g in i.grads]) for i in influence.train_instances])
    # H is symmetric and H + ridge regular: the solution's residual, by a difference of gradients along x, is zero.
    x = torch.cat([t.reshape(2, -1) for t in influence.inverse_hvps(data[:2]).values()], 1)
    torch.testing.assert_close(scores, x @ G.T, rtol=1e-8, atol=1e-10)
    assert float(influence.diagnostics.relative_residual.max()) < 1e-8


# ------------------------------------------------------------------ AllenNLP's numbers


def test_compat_uses_pythons_global_order():
    influence = interpreter(linear(), pairs(10), compat="allennlp", lissa_batch_size=4, recursion_depth=7)
    random.seed(5)
    drawn = [i for batch in batches_of(influence)[0] for i in batch]
    random.seed(5)
    order = list(range(10))
    expected = []
    for _ in range(3):
        random.shuffle(order)
        expected += order
    assert drawn == expected[: len(drawn)]
    assert len(drawn) == 10 + 10 + 4


def test_compat_solves_for_one_test_instance_after_the_other():
    """Each draws its own batches from passes that go on, so a call of two is two calls of one."""
    tests = pairs(2, seed=1)
    random.seed(5)
    together = interpreter(linear(), pairs(10), compat="allennlp", lissa_batch_size=4).scores(tests)
    random.seed(5)
    influence = interpreter(linear(), pairs(10), compat="allennlp", lissa_batch_size=4)
    torch.testing.assert_close(together, torch.cat([influence.scores([test]) for test in tests]), rtol=0, atol=0)
    first, second = influence.scores(tests[:1]), influence.scores(tests[:1])
    assert not torch.equal(first, second)


def test_compat_takes_train_gradients_in_train_mode_and_rounds_scores():
    model = nn.Sequential(nn.Dropout(0.5), linear())
    data = pairs(10)
    influence = interpreter(model, data, compat="allennlp")
    torch.manual_seed(3)
    grads = [instance.grads for instance in influence.train_instances]
    torch.manual_seed(3)
    model.train()
    for (x, y), got in zip(data, grads, strict=True):
        expected = torch.autograd.grad(F.cross_entropy(model(x.unsqueeze(0)), y.unsqueeze(0)), list(model.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert influence.scores(data[:1]).dtype == torch.float32


def test_inference_mode_changes_nothing():
    """In torch 2.11 and before, torch.func takes derivatives for zero in it."""
    data, tests = pairs(20), pairs(2, seed=1)
    for model in (linear(), two_layers()):
        expected = interpreter(model, data).scores(tests)
        with torch.inference_mode():
            torch.testing.assert_close(interpreter(model, data).scores(tests), expected, **EXACT)
