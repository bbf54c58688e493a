import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lissa
from bridge.functional import dense_embeddings, evaluation, example_losses, functional, loss_and_gradient, unused
from bridge.products import product_of_each
from tests.bridge.fakes import Watch, linear, pairs


def whole(data):
    x, y = zip(*data, strict=True)
    return torch.stack(x), torch.stack(y)


def names(model):
    return [name for name, _ in model.named_parameters()]


def test_the_loss_is_a_function_of_the_parameters_given():
    model, batch = linear(), whole(pairs(5))
    with evaluation(model) as module:
        fn = functional(module, names(model), output_loss=F.cross_entropy)
    half = {name: p / 2 for name, p in fn.params.items()}
    expected = F.cross_entropy(batch[0] @ half["weight"].T + half["bias"], batch[1])
    torch.testing.assert_close(fn.loss_fn(half, batch), expected)


def test_parameters_that_are_not_named_are_constants():
    model, batch = linear(), whole(pairs(5))
    with evaluation(model) as module:
        fn = functional(module, ["bias"], output_loss=F.cross_entropy)
        assert list(fn.params) == ["bias"]
        gradient = torch.func.grad(fn.loss_fn)(fn.params, batch)
    expected = torch.autograd.grad(F.cross_entropy(model(batch[0]), batch[1]), [model.bias])
    torch.testing.assert_close(gradient["bias"], expected[0])


@pytest.mark.parametrize("inputs", ["tensor", "mapping"])
def test_a_pair_is_input_and_label(inputs):
    model, (x, y) = linear(), whole(pairs(5))
    given = x if inputs == "tensor" else {"input": x}
    with evaluation(model) as module:
        fn = functional(module, names(model), output_loss=F.cross_entropy)
        torch.testing.assert_close(fn.loss_fn(fn.params, (given, y)), F.cross_entropy(model(x), y).detach())


def test_an_output_may_be_an_object_with_a_loss():
    class Output:
        def __init__(self, loss):
            self.loss = loss

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return Output((self.w * x).mean().reshape(1, 1))  # one number, of any shape

    with evaluation(Model()) as module:
        fn = functional(module, ["w"])
        assert fn.loss_fn(fn.params, {"x": torch.tensor([1.0, 3.0])}).item() == 2.0


def test_the_losses_of_examples_are_those_of_batches_of_one():
    model, data = linear(), pairs(5)
    with evaluation(model) as module:
        fn = functional(module, names(model), output_loss=F.cross_entropy)
        stack = tuple(t.unsqueeze(1) for t in whole(data))
        got = example_losses(fn.loss_fn)(fn.params, stack)
    expected = [fn.loss_fn(fn.params, (x.unsqueeze(0), y.unsqueeze(0))) for x, y in data]
    torch.testing.assert_close(got, torch.stack(expected))


def test_gradients_are_zero_where_the_loss_does_not_look():
    params = {"used": torch.ones(2), "unused": torch.ones(3)}
    loss, gradient = loss_and_gradient(lambda p, b: (p["used"] ** 2).sum(), params, None)
    assert loss.item() == 2.0
    assert gradient["used"].tolist() == [2.0, 2.0]
    assert gradient["unused"].tolist() == [0.0, 0.0, 0.0]
    assert not any(t.requires_grad for t in (loss, *gradient.values(), *params.values()))
    constant = loss_and_gradient(lambda p, b: torch.ones(()), params, None)[1]
    assert constant["used"].tolist() == [0.0, 0.0]


def test_unused_parameters_are_found():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))

        def forward(self, which):
            return {"loss": self.a if which == "a" else self.b}

    with evaluation(Two()) as module:
        fn = functional(module, ["a", "b"])
        assert list(unused(fn, fn.params, {"which": "a"})) == ["b"]
        assert list(unused(fn, {"b": fn.params["b"]}, {"which": "a"})) == ["b"]


# ------------------------------------------------------------------ the stand-in


def test_the_stand_in_is_in_eval_mode_dense_and_shares_the_parameters():
    model = nn.Sequential(nn.Embedding(3, 2, sparse=True), nn.Dropout(0.5))
    watch = Watch(model)
    with evaluation(model) as module:
        assert not any(m.training for m in module.modules())
        assert module[0].sparse is False
        assert module[0].weight is model[0].weight
        assert watch.changes() == ["fast path"]  # of the model itself nothing, not even meanwhile
    assert watch.changes() == []
    with evaluation(model, training=True) as module:
        assert all(m.training for m in module.modules())


class Stateful(nn.Module):
    """Writes to a buffer, a list, a plain tensor and a number on each call."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))
        self.register_buffer("count", torch.zeros(()))
        self.losses, self.total, self.calls = [], torch.zeros(()), 0

    def forward(self, x):
        loss = (self.w * x).mean()
        self.count += 1
        self.losses.append(loss)
        self.total += loss.detach()
        self.calls += 1
        return {"loss": loss}


def test_state_that_a_forward_pass_writes_is_neither_the_callers_nor_kept():
    model = Stateful()
    with evaluation(model) as module:
        fn = functional(module, ["w"])
        for _ in range(3):
            torch.func.grad(fn.loss_fn)(fn.params, {"x": torch.ones(2)})
        assert (module.losses, module.calls, module.total.item()) == ([], 0, 0.0)
    assert (model.losses, model.calls, model.total.item(), model.count.item()) == ([], 0, 0.0, 0.0)


def test_a_model_that_cannot_be_copied_gets_its_flags_back(caplog):
    class Uncopyable(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Embedding(3, 2, sparse=True)
            self.inner.eval()

        def __deepcopy__(self, memo):
            raise copy.Error("held elsewhere")

    model = Uncopyable()
    watch = Watch(model)
    with pytest.raises(RuntimeError, match="inside"), evaluation(model) as module:  # noqa: PT012
        assert module is model
        assert not model.training
        raise RuntimeError("inside")
    assert watch.changes() == []
    assert any("cannot be copied" in record.message for record in caplog.records)


def test_a_weight_computed_before_the_forward_pass_stays_the_callers():
    model = nn.utils.parametrizations.weight_norm(linear())
    expected = F.cross_entropy(model(whole(pairs(5))[0]), whole(pairs(5))[1]).detach()
    watch = Watch(model)
    with evaluation(model) as module:
        fn = functional(module, names(model), output_loss=F.cross_entropy)
        torch.testing.assert_close(fn.loss_fn(fn.params, whole(pairs(5))), expected)
        torch.func.grad(fn.loss_fn)(fn.params, whole(pairs(5)))
    assert watch.changes() == []


def test_dense_embeddings_puts_the_flag_back_after_an_error():
    model = nn.Embedding(3, 2, sparse=True)
    with pytest.raises(RuntimeError, match="inside"), dense_embeddings(model):  # noqa: PT012
        assert model.sparse is False
        raise RuntimeError("inside")
    assert model.sparse is True
    assert model.training is True


class Counter:
    """A metric as AllenNLP has them: it branches on the data, and keeps what it was given."""

    def __init__(self):
        self.seen = []

    def __call__(self, outputs, labels):
        if bool((outputs > 0).any()):
            self.seen.append(outputs)

    def get_metric(self, reset=False):
        return len(self.seen)

    def reset(self):
        self.seen = []


@pytest.mark.parametrize("kept_in", [lambda m: m, lambda m: {"accuracy": m}, lambda m: [m]], ids=["", "dict", "list"])
def test_metrics_neither_count_nor_stand_in_the_way_of_vmap(kept_in):
    class Scored(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            for metric in [self.m] if callable(self.m) else self.m.values() if isinstance(self.m, dict) else self.m:
                metric(y, x)
                assert metric.get_metric() == 0
            return {"loss": y.square().mean()}

    model, metric = Scored(2, 1), Counter()
    model.m = kept_in(metric)
    with evaluation(model) as module:
        fn = functional(module, ["weight", "bias"])
        stack = {"x": torch.tensor([[[1.0, 2.0]], [[3.0, -1.0]]])}
        losses = example_losses(fn.loss_fn)(fn.params, stack)
    with torch.no_grad():
        assert losses.tolist() == pytest.approx([float(model.weight @ x[0] + model.bias) ** 2 for x in stack["x"]])
    assert metric.seen == []
    assert model.m is metric or metric in (model.m.values() if isinstance(model.m, dict) else model.m)


class Beside(nn.Module):
    """Has a list, which is state, and in it a module whose parameters are nobody else's."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.hidden = [nn.Linear(3, 1).requires_grad_(False)]

    def forward(self, x):
        return self.layer(x).tanh() * self.hidden[0](x).detach()


def test_a_module_that_hides_another_can_be_recorded(caplog):
    torch.manual_seed(0)
    module = Beside()
    model = functional(module, ["layer.weight", "layer.bias"], output_loss=F.mse_loss)
    batch, vectors = (
        (torch.randn(5, 3), torch.randn(5, 1)),
        {k: torch.randn(2, *p.shape) for k, p in model.params.items()},
    )
    recorded = lissa.traced(partial(product_of_each, model.loss_fn, model.params))
    with caplog.at_level("INFO"):
        recorded(batch, vectors)
        got = recorded(batch, vectors)
    assert not caplog.messages
    torch.testing.assert_close(got, lissa.stacked_hvp(model.loss_fn, model.params, batch, vectors))
