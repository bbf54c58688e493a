from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from lissa import checks, hvp, influence, influence_scores, lstm_layer, per_example_gradients, scoring_plan, tree
from lissa.influence import scores_of_row_losses
from lissa.scoring import MACHINES, plan_scoring
from tests.oracles import dense_gradients, dense_hessian, flatten, unflatten
from tests.problems import recurrent


def example_losses(params, batch):
    """A tanh network with a linear unit that the loss of its first input alone uses."""
    x, y = batch
    hidden = torch.tanh(x @ params["w1"] + params["b1"])
    return F.cross_entropy(hidden @ params["w2"], y, reduction="none") + params["c"] * x[:, 0]


def problem(n=7, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w1": (4, 5), "b1": (5,), "w2": (5, 3), "c": ()}
    params = tree.normal_like({k: torch.empty(s, dtype=dtype) for k, s in shapes.items()}, generator=generator)
    x = torch.randn(n, 4, generator=generator, dtype=dtype)
    y = torch.randint(3, (n,), generator=generator)
    return params, (x, y), generator


def stacked_vectors(params, k, generator):
    return tree.normal_like(tree.map(lambda p: p.expand(k, *p.shape), params), generator=generator)


METHODS = ("auto", "jvp", "per-example-gradients", "double-vjp")

# Scores are sums of P products in float64: rounding is about P u |g| |x|, far below this.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_scores_are_gradients_times_ihvp(method, chunk_size):
    params, batch, generator = problem()
    ihvp = tree.normal_like(params, generator=generator)
    expected = dense_gradients(example_losses, params, batch) @ flatten(ihvp)

    scores = influence_scores(example_losses, params, ihvp, batch, method=method, chunk_size=chunk_size)
    assert scores.shape == (7,)
    torch.testing.assert_close(scores, expected, **CLOSE)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", [1, 3, 20])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_k_vectors_give_k_rows(method, k, chunk_size):
    params, batch, generator = problem()
    ihvps = stacked_vectors(params, k, generator)
    expected = torch.stack([
        dense_gradients(example_losses, params, batch) @ flatten(tree.map(lambda t, i=i: t[i], ihvps)) for i in range(k)
    ])  # fmt: skip

    scores = influence_scores(example_losses, params, ihvps, batch, method=method, chunk_size=chunk_size)
    assert scores.shape == (k, 7)
    torch.testing.assert_close(scores, expected, **CLOSE)


@given(n=st.integers(1, 6), k=st.integers(1, 4), seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_the_methods_agree(n, k, seed):
    params, batch, generator = problem(n, seed)
    ihvps = stacked_vectors(params, k, generator)
    by_jvp, by_gradients, by_double_vjp = (
        influence_scores(example_losses, params, ihvps, batch, method=method) for method in METHODS[1:]
    )
    torch.testing.assert_close(by_jvp, by_gradients, **CLOSE)
    torch.testing.assert_close(by_jvp, by_double_vjp, **CLOSE)


def test_scores_do_not_depend_on_the_order_or_the_cut_of_the_examples():
    params, (x, y), generator = problem(9)
    ihvp = tree.normal_like(params, generator=generator)
    scores = influence_scores(example_losses, params, ihvp, (x, y))
    order = torch.randperm(9, generator=generator)

    torch.testing.assert_close(influence_scores(example_losses, params, ihvp, (x[order], y[order])), scores[order])
    parts = [influence_scores(example_losses, params, ihvp, (x[i], y[i])) for i in torch.arange(9).split(4)]
    torch.testing.assert_close(torch.cat(parts), scores)


def test_auto_scores_a_batch_without_rows():
    """A batch is any object: where it cannot be cut into examples, `auto` needs no cut."""
    params, (x, y), generator = problem()
    ihvps = stacked_vectors(params, 20, generator)

    class Custom:
        inputs, labels = x, y

    scores = influence_scores(lambda p, b: example_losses(p, (b.inputs, b.labels)), params, ihvps, Custom())
    torch.testing.assert_close(scores, influence_scores(example_losses, params, ihvps, (x, y)), **CLOSE)


def test_per_example_gradients_are_the_rows_of_the_jacobian():
    params, batch, _ = problem()
    gradients = per_example_gradients(example_losses, params, batch, chunk_size=2)
    assert {k: tuple(g.shape) for k, g in gradients.items()} == {k: (7, *p.shape) for k, p in params.items()}
    flat = torch.cat([g.reshape(7, -1) for g in gradients.values()], dim=1)
    torch.testing.assert_close(flat, dense_gradients(example_losses, params, batch), **CLOSE)


def test_scores_compose_with_vmap_and_jvp():
    params, batch, generator = problem()
    ihvps = stacked_vectors(params, 3, generator)
    expected = influence_scores(example_losses, params, ihvps, batch)

    by_vmap = torch.vmap(lambda ihvp: influence_scores(example_losses, params, ihvp, batch))(ihvps)
    torch.testing.assert_close(by_vmap, expected, **CLOSE)

    # The score is linear in the ihvp, so its derivative along a vector is the score of that vector.
    one, other = (tree.map(lambda t, i=i: t[i], ihvps) for i in (0, 1))
    _, derivative = torch.func.jvp(lambda ihvp: influence_scores(example_losses, params, ihvp, batch), (one,), (other,))
    torch.testing.assert_close(derivative, expected[1], **CLOSE)


@pytest.mark.parametrize("method", ["jvp", "per-example-gradients"])
def test_scores_compile_to_one_graph(method):
    params, batch, generator = problem()
    ihvp = tree.normal_like(params, generator=generator)
    score = partial(influence_scores, example_losses, method=method)
    compiled = torch.compile(score, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(params, ihvp, batch), score(params, ihvp, batch), **CLOSE)


def test_the_gradient_of_a_score_in_a_training_input_is_a_difference_quotient():
    """Koh & Liang's perturbation influence: how the score of example i moves with its own input."""
    params, (x, y), generator = problem()
    ihvp = tree.normal_like(params, generator=generator)
    direction = torch.randn(x.shape, generator=generator, dtype=x.dtype)

    def total_score(x):
        return influence_scores(example_losses, params, ihvp, (x, y)).sum()

    derivative = (torch.func.grad(total_score)(x) * direction).sum()
    e = 1e-5
    quotient = (total_score(x + e * direction) - total_score(x - e * direction)) / (2 * e)
    # A central difference is off by e^2/6 times the third derivative (order 100 here) and by u |score| / e ~ 1e-10.
    assert abs(derivative - quotient) < 1e-7


def test_sign_and_size_predict_removal_in_closed_form():
    """Ridge regression: one Newton step from the full fit is the leave-one-out fit of the linearised problem.

    Removing example i changes the mean loss to L - loss_i / n, so the parameters move by (H - H_i / n)^-1 grad_i / n
    and the test loss by about + score_i / n: to first order in 1 / n.
    """
    generator = torch.Generator().manual_seed(0)
    n, ridge = 2000, 0.1
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    y = x @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + torch.randn(n, generator=generator).double()
    x_test, y_test = torch.tensor([[0.5, 1.0, -1.0]], dtype=torch.float64), torch.tensor([3.0], dtype=torch.float64)

    def losses(params, batch):
        return (batch[0] @ params["w"] - batch[1]).square() / 2

    def fit(rows):
        A = x[rows].mT @ x[rows] / n + ridge * torch.eye(3, dtype=torch.float64)
        return {"w": torch.linalg.solve(A, x[rows].mT @ y[rows] / n)}

    everyone = torch.arange(n)
    params = fit(everyone)
    H = dense_hessian(lambda p, b: losses(p, b).mean(), params, (x, y)) + ridge * torch.eye(3, dtype=torch.float64)
    grad_test = torch.func.grad(lambda p: losses(p, (x_test, y_test)).mean())(params)
    ihvp = unflatten(torch.linalg.solve(H, flatten(grad_test)), params)
    scores = influence_scores(losses, params, ihvp, (x, y))

    largest = scores.abs().topk(20).indices
    changes = torch.stack([
        (losses(fit(everyone[everyone != i]), (x_test, y_test)) - losses(params, (x_test, y_test))).squeeze()
        for i in largest
    ])  # fmt: skip
    # The neglected terms are of relative order leverage_i = x_i H^-1 x_i / n, at most 12 / 2000 here.
    torch.testing.assert_close(scores[largest] / n, changes, rtol=0.03, atol=0)


def test_hvp_and_scores_agree_with_the_dense_solution():
    """The whole line: dense ihvp of the damped Hessian, then scores, equals one matrix expression."""
    params, batch, _ = problem()
    G = dense_gradients(example_losses, params, batch)

    def loss_fn(p, b):
        return example_losses(p, b).mean()

    H = dense_hessian(loss_fn, params, batch)
    damped = H + (1 - torch.linalg.eigvalsh(H).min()) * torch.eye(len(H), dtype=H.dtype)
    ihvp = unflatten(torch.linalg.solve(damped, G[0]), params)
    back = flatten(hvp(loss_fn, params, batch, ihvp)) + (damped - H) @ flatten(ihvp)

    torch.testing.assert_close(back, G[0], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(
        influence_scores(example_losses, params, ihvp, batch), G @ torch.linalg.solve(damped, G[0]), **CLOSE
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS[1:])
def test_scores_keep_the_dtype(dtype, method):
    params, batch, generator = problem(dtype=dtype)
    ihvp = tree.normal_like(params, generator=generator)
    assert influence_scores(example_losses, params, ihvp, batch, method=method).dtype == dtype


@pytest.mark.parametrize("method", METHODS[1:])
def test_the_key_order_of_the_ihvp_does_not_matter(method):
    params, batch, generator = problem()
    ihvp = tree.normal_like(params, generator=generator)
    reordered = {k: ihvp[k] for k in reversed(ihvp)}
    scores = influence_scores(example_losses, params, reordered, batch, method=method)
    assert torch.equal(scores, influence_scores(example_losses, params, ihvp, batch, method=method))


def test_nothing_of_the_callers_is_changed():
    params, batch, generator = problem()
    ihvp = tree.normal_like(params, generator=generator)
    params["w1"].requires_grad_()
    before = {k: p.clone() for k, p in params.items()}
    rng = torch.get_rng_state()
    for method in METHODS:
        influence_scores(example_losses, params, ihvp, batch, method=method)

    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(before[k], params[k]) and params[k].grad is None for k in params)
    assert [k for k in params if params[k].requires_grad] == ["w1"]


def prefer(monkeypatch, method):
    """Makes `method` the cheapest wherever the plan may choose it."""

    def plan(work, *, examples, methods=METHODS[1:], **kwargs):
        found = plan_scoring(work, examples=examples, methods=methods, **kwargs)
        return found._replace(method=method) if method in methods else found

    monkeypatch.setattr(influence, "plan_scoring", plan)


def test_where_something_requires_grad_auto_gives_scores_that_can_be_differentiated(monkeypatch):
    prefer(monkeypatch, "double-vjp")
    params, (x, y), generator = problem()
    ihvp = tree.normal_like(params, generator=generator)

    def needing_grad(parts):
        return tree.map(lambda t: t.clone().requires_grad_(), parts)

    (w,) = needing_grad({"w": x[0]}).values()
    calls = {
        "nothing": (example_losses, params, ihvp, (x, y)),
        "params": (example_losses, needing_grad(params), ihvp, (x, y)),
        "ihvp": (example_losses, params, needing_grad(ihvp), (x, y)),
        "batch": (example_losses, params, ihvp, (x.clone().requires_grad_(), y)),
        "loss": (lambda p, b: example_losses(p, (b[0] * w, b[1])), params, ihvp, (x, y)),
    }
    differentiable = {name: influence_scores(*call).requires_grad for name, call in calls.items()}
    assert differentiable == {"nothing": False, "params": True, "ihvp": True, "batch": True, "loss": True}
    with torch.no_grad():
        planned = {name: scoring_plan(f, p, b, 1).method for name, (f, p, _, b) in calls.items()}
    assert set(planned.values()) == {"double-vjp"}


def test_inside_a_transform_auto_leaves_double_vjp_out(monkeypatch):
    prefer(monkeypatch, "double-vjp")
    params, (x, y), generator = problem()
    ihvps = stacked_vectors(params, 3, generator)
    score = partial(influence_scores, example_losses, params)
    expected = score(ihvps, (x, y), method="jvp")

    torch.testing.assert_close(torch.vmap(lambda v: score(v, (x, y)))(ihvps), expected, **CLOSE)
    jacobian = torch.func.jacrev(lambda x: score(ihvps, (x, y)))(x)
    by_gradients = torch.func.jacrev(lambda x: score(ihvps, (x, y), method="per-example-gradients"))(x)
    torch.testing.assert_close(jacobian, by_gradients, **CLOSE)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        tangent = forward_ad.unpack_dual(score(ihvps, (dual, y))).tangent
    torch.testing.assert_close(tangent, jacobian.sum((-2, -1)), **CLOSE)
    compiled = torch.compile(lambda v: score(v, (x, y)), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ihvps), expected, **CLOSE)
    if checks.differentiates_in_inference():
        with torch.inference_mode():
            torch.testing.assert_close(score(ihvps, (x, y)), expected, **CLOSE)
            torch.testing.assert_close(score(ihvps, (x + 0, y)), expected, **CLOSE)


def test_inside_a_dual_level_auto_leaves_jvp_out(monkeypatch):
    prefer(monkeypatch, "jvp")
    params, (x, y), generator = problem()
    ihvps = stacked_vectors(params, 3, generator)
    expected = influence_scores(example_losses, params, ihvps, (x, y), method="jvp")
    assert scoring_plan(example_losses, params, (x, y), 3).method == "jvp"
    with forward_ad.dual_level():
        assert scoring_plan(example_losses, params, (x, y), 3).method != "jvp"
        torch.testing.assert_close(influence_scores(example_losses, params, ihvps, (x, y)), expected, **CLOSE)


def test_a_loss_without_a_second_derivative_is_scored_another_way(monkeypatch):
    prefer(monkeypatch, "double-vjp")
    table = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = torch.tensor([[0, 1], [5, 2], [3, 3]])

    class Square(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x**2

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(inputs[0])
            ctx.save_for_forward(inputs[0])

        @staticmethod
        @once_differentiable
        def backward(ctx, grad):
            return 2 * grad * ctx.saved_tensors[0]

        @staticmethod
        def jvp(ctx, tangent):
            return 2 * tangent * ctx.saved_tensors[0]

    def losses(params, rows):
        return Square.apply(params["table"][rows]).sum((1, 2))

    with pytest.raises(RuntimeError, match="once_differentiable"):
        influence_scores(losses, {"table": table}, {"table": table}, rows, method="double-vjp")
    scores = influence_scores(losses, {"table": table}, {"table": table}, rows)
    torch.testing.assert_close(scores, 2 * losses({"table": table}, rows), **CLOSE)


def test_double_vjp_says_where_it_cannot_run():
    params, batch, generator = problem()
    ihvps = stacked_vectors(params, 2, generator)
    score = partial(influence_scores, example_losses, params, batch=batch, method="double-vjp")
    refusal = r"influence_scores\(method='double-vjp'\)"
    with pytest.raises(NotImplementedError, match=refusal):
        torch.vmap(lambda ihvp: score(ihvp=ihvp))(ihvps)
    with pytest.raises(NotImplementedError, match=refusal), forward_ad.dual_level():
        score(ihvp=ihvps)
    with pytest.raises(RuntimeError, match=r"inference.mode"), torch.inference_mode():
        score(ihvp=ihvps)
    assert not score(ihvp=tree.map(lambda t: t.clone().requires_grad_(), ihvps)).requires_grad


def test_double_vjp_scores_a_batch_without_rows_and_interacting_examples_in_one_piece():
    """Each score is the derivative of the example's own loss, whatever else that loss depends on."""
    params, (x, y), generator = problem()
    ihvps = stacked_vectors(params, 2, generator)

    class Custom:
        inputs, labels = x, y

    def centred(params, batch):
        losses = example_losses(params, (batch.inputs, batch.labels))
        return losses - losses.mean()

    by_jvp, by_double_vjp = (
        influence_scores(centred, params, ihvps, Custom(), method=method) for method in ("jvp", "double-vjp")
    )
    torch.testing.assert_close(by_double_vjp, by_jvp, **CLOSE)
    with pytest.raises(ValueError, match="share a first dimension"):
        influence_scores(centred, params, ihvps, Custom(), method="double-vjp", chunk_size=2)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_double_vjp_scores_packed_sequences(chunk_size):
    problem_ = recurrent(seed=0, kind=torch.nn.LSTM, packed=True)
    ihvp = tree.normal_like(problem_.params, generator=torch.Generator().manual_seed(1))
    scores = influence_scores(
        problem_.example_loss_fn, problem_.params, ihvp, problem_.batch, method="double-vjp", chunk_size=chunk_size
    )
    one_by_one = sum_of_products_one_by_one(problem_, ihvp)
    torch.testing.assert_close(scores, one_by_one, **CLOSE)


@pytest.mark.parametrize("sparse", [False, True])
def test_double_vjp_scores_looked_up_rows(sparse):
    generator = torch.Generator().manual_seed(0)
    params = {"table": torch.randn(6, 3, generator=generator, dtype=torch.float64)}
    ihvps = stacked_vectors(params, 4, generator)

    def losses(params, rows, sparse=False):
        return F.embedding(rows, params["table"], sparse=sparse).sum(1).square().sum(1)

    rows = torch.tensor([[0, 1], [5, 2], [3, 3]])
    gradients = dense_gradients(losses, params, rows)
    scores = influence_scores(partial(losses, sparse=sparse), params, ihvps, rows, method="double-vjp")
    torch.testing.assert_close(scores, ihvps["table"].flatten(1) @ gradients.mT, **CLOSE)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_losses_of_batches_of_one_are_scored_by_each_method(method, chunk_size, monkeypatch):
    """Of a mean loss alone, the losses of examples are those of batches of one, by vmap."""
    prefer(monkeypatch, "double-vjp")
    params, (x, y), generator = problem()
    ihvps = stacked_vectors(params, 3, generator)

    def of_rows(params, stack):
        return torch.vmap(lambda row: example_losses(params, row).mean())(stack)

    scores = influence_scores(
        of_rows, params, ihvps, (x.unsqueeze(1), y.unsqueeze(1)), method=method, chunk_size=chunk_size
    )
    expected = influence_scores(example_losses, params, ihvps, (x, y), method="jvp")
    torch.testing.assert_close(scores, expected, **CLOSE)


@pytest.mark.parametrize(("k", "products"), [(0, 0), (1, 0), (1, 1), (3, 0), (3, 1), (3, 3)])
def test_scores_of_row_losses_are_gradients_times_vectors_and_products_those_of_the_sum(k, products):
    params, batch, generator = problem()
    ihvps = stacked_vectors(params, k, generator)
    with torch.no_grad():
        losses, scores, found = scores_of_row_losses(
            partial_of(example_losses, batch), params, ihvps, products=products
        )
    assert not scores.requires_grad
    torch.testing.assert_close(losses, example_losses(params, batch), **CLOSE)
    gradients = dense_gradients(example_losses, params, batch)
    expected = [gradients @ flatten(tree.map(lambda t, i=i: t[i], ihvps)) for i in range(k)]
    torch.testing.assert_close(scores, torch.stack(expected) if k else scores.new_zeros(0, 7), **CLOSE)
    agrees_with_hvp(found, example_losses, params, batch, tree.map(lambda t: t[:products], ihvps))


@pytest.mark.parametrize("products", [0, 1, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_packed_sequences_are_scored_together_as_one_by_one(packed, products):
    problem_ = recurrent(seed=0, kind=torch.nn.LSTM, packed=packed)
    ihvps = stacked_vectors(problem_.params, 3, torch.Generator().manual_seed(1))
    losses = partial_of(problem_.example_loss_fn, problem_.batch)
    _, scores, found = scores_of_row_losses(losses, problem_.params, ihvps, products=products)
    expected = [sum_of_products_one_by_one(problem_, tree.map(lambda t, k=k: t[k], ihvps)) for k in range(3)]
    torch.testing.assert_close(scores, torch.stack(expected), **CLOSE)
    multiplied = tree.map(lambda t: t[:products], ihvps)
    agrees_with_hvp(found, problem_.example_loss_fn, problem_.params, problem_.batch, multiplied)


@pytest.mark.parametrize(("node", "chunks"), [(0.0, []), (1.0, [341, 341])])
def test_scores_of_lookups_one_vector_at_a_time_or_together(node, chunks, monkeypatch):
    monkeypatch.setitem(MACHINES, "cpu", MACHINES["cpu"]._replace(node=node))  # seconds for a node of a pass
    pulls, plain = [], torch.vmap
    monkeypatch.setattr(
        torch, "vmap", lambda *args, **kwargs: pulls.append(kwargs["chunk_size"]) or plain(*args, **kwargs)
    )
    generator = torch.Generator().manual_seed(0)
    params = {"table": torch.randn(6, 3, generator=generator, dtype=torch.float64)}
    ihvps = stacked_vectors(params, 4, generator)
    rows = torch.tensor([[0, 1], [5, 2], [3, 3]])

    def losses(params):
        return F.embedding(rows, params["table"]).sum(1).tanh().square().sum(1)

    _, scores, products = scores_of_row_losses(losses, params, ihvps, products=2)
    gradients = torch.autograd.functional.jacobian(lambda t: losses({"table": t}), params["table"]).flatten(1)
    torch.testing.assert_close(scores, ihvps["table"].flatten(1) @ gradients.mT, **CLOSE)
    H = torch.autograd.functional.hessian(lambda t: losses({"table": t}).sum(), params["table"]).reshape(18, 18)
    torch.testing.assert_close(products["table"].flatten(1), ihvps["table"][:2].flatten(1) @ H, **CLOSE)
    assert pulls == chunks


def test_of_vectors_that_are_scored_alone_an_lstm_is_not_differentiated_for_products(monkeypatch):
    problem_ = recurrent(seed=0, kind=torch.nn.LSTM, packed=True)
    ihvps = stacked_vectors(problem_.params, 3, torch.Generator().manual_seed(1))
    multiplied, curvature = [], lstm_layer._curvature
    monkeypatch.setattr(
        lstm_layer, "_curvature", lambda v_x, *rest: multiplied.append(v_x.shape[1]) or curvature(v_x, *rest)
    )
    scores_of_row_losses(partial_of(problem_.example_loss_fn, problem_.batch), problem_.params, ihvps, products=2)
    assert multiplied == [2]
    gradients, backward = [], lstm_layer.Layer.backward
    counted = staticmethod(lambda *args: gradients.append(torch.is_grad_enabled()) or backward(*args))
    monkeypatch.setattr(lstm_layer.Layer, "backward", counted)
    scores_of_row_losses(partial_of(problem_.example_loss_fn, problem_.batch), problem_.params, ihvps, products=3)
    assert sum(gradients) == 1  # where all are multiplied, one graph does


def partial_of(example_loss_fn, batch):
    return lambda params: example_loss_fn(params, batch)


def agrees_with_hvp(products, example_loss_fn, params, batch, vectors):
    """Of the sum of the losses, by two backward passes a vector."""
    for key in params:
        assert products[key].shape == vectors[key].shape
    for k in range(len(next(iter(vectors.values())))):
        vector = tree.map(lambda t, k=k: t[k], vectors)
        expected = hvp(lambda p, b: example_loss_fn(p, b).sum(), params, batch, vector, mode="double-backward")
        for key, t in expected.items():
            torch.testing.assert_close(products[key][k], t, **CLOSE)


def sum_of_products_one_by_one(problem_, ihvp):
    """Each example's gradient by a backward pass of its own, times the vector."""
    leaves = tree.map(lambda p: p.clone().requires_grad_(), problem_.params)
    losses = problem_.example_loss_fn(leaves, problem_.batch)
    gradients = [
        torch.autograd.grad(loss, list(leaves.values()), retain_graph=True, materialize_grads=True) for loss in losses
    ]
    return torch.stack([sum((g * x).sum() for g, x in zip(each, ihvp.values(), strict=True)) for each in gradients])


def test_losses_that_are_constants_have_no_influence():
    found = scores_of_row_losses(
        lambda params: torch.ones(3), {"w": torch.ones(2)}, {"w": torch.ones(4, 2)}, products=1
    )
    assert found.scores.tolist() == [[0.0] * 3] * 4
    assert found.products["w"].tolist() == [[0.0] * 2]
