import pytest
import torch
import torch.nn.functional as F

import lissa
from bridge import products
from bridge.functional import Functional
from lissa.stacked import StackedHvp

X = torch.tensor([[1.0, -1.0], [0.5, 2.0], [3.0, 1.0]], dtype=torch.float64)
W = torch.tensor([1.0, 2.0], dtype=torch.float64)


def model():
    """`loss_i = sum((w x_i)^3) + b`, batches of one."""

    def loss_fn(params, batch):
        (x,) = batch
        return ((params["w"] * x) ** 3).sum(-1).mean() + params["b"]

    params = {"w": W.clone(), "b": torch.tensor(0.5, dtype=torch.float64)}
    return Functional(params, loss_fn, torch.device("cpu"), None, None)


@pytest.mark.parametrize("refuses", [False, True])
def test_for_each_vector_hands_every_vector_the_same_things(refuses):
    def fn(v, things):
        if refuses:
            v["x"].sum().item()
        return {"x": v["x"] + sum(things)}

    run = products.for_each_vector("sums", fn)
    got = run({"x": torch.tensor([[1.0], [2.0]])}, lambda: iter([10, 20]))
    assert got["x"].tolist() == [[31.0], [32.0]]


@pytest.mark.parametrize("cache", [2**23, 1])
def test_inverse_products_do_not_depend_on_how_many_are_taken_at_a_time(cache, monkeypatch):
    monkeypatch.setattr(products, "CACHE_BYTES", cache)
    vectors = {"w": torch.eye(2, dtype=torch.float64), "b": torch.tensor([0.0, 1.0], dtype=torch.float64)}
    made = []

    def batches():
        made.append(1)
        return [(X,)] * 200

    solution = products.inverse_products(model(), 1.0, 60.0)(vectors, batches)
    H = torch.diag(torch.cat([(6 * W * X**3).mean(0), torch.zeros(1, dtype=torch.float64)])) + torch.eye(3)
    v = torch.cat([vectors["w"], vectors["b"].unsqueeze(1)], 1)
    got = torch.cat([solution.value["w"], solution.value["b"].unsqueeze(1)], 1)
    expected = torch.stack([lissa_closed_form(H, row, 60.0, 200) for row in v])
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    assert len(made) == 1
    assert solution.steps.tolist() == [200, 200]


def lissa_closed_form(A, v, scale, steps):
    """`h_T / scale` of `h <- v + (I - A / scale) h` from `h_0 = v`."""
    M, h = torch.eye(len(A), dtype=A.dtype) - A / scale, v
    for _ in range(steps):
        h = v + M @ h
    return h / scale


@pytest.mark.parametrize("steps_alike", [0, products.MANY_STEPS])
def test_recorded_and_plain_products_solve_the_same(steps_alike, monkeypatch):
    monkeypatch.setattr(products, "CACHE_BYTES", 2 * 6 * 8)  # two vectors at a time
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 6, generator=generator, dtype=torch.float64)

    def loss_fn(params, x):
        return (x @ params["w"]).cosh().log().mean()

    params = {"w": torch.randn(6, generator=generator, dtype=torch.float64)}
    model = Functional(params, loss_fn, torch.device("cpu"), loss_fn, loss_fn)
    solve = products.inverse_products(model, 0.1, 20.0, steps_alike=steps_alike)
    vectors = {"w": torch.randn(5, 6, generator=generator, dtype=torch.float64)}
    got = solve(vectors, lambda: [x[i : i + 4] for i in range(0, 12, 4)] * 3)

    h = vectors["w"].clone()
    for i in [0, 4, 8] * 3:
        H = torch.func.hessian(lambda w, i=i: loss_fn({"w": w}, x[i : i + 4]))(params["w"])
        h = vectors["w"] + h - (h @ H + 0.1 * h) / 20.0
    torch.testing.assert_close(got.value["w"], h / 20.0, rtol=1e-12, atol=0)
    assert got.residual_norm.shape == (5,)


def with_table(rows=60, width=8):
    """A bag of embeddings, of which a batch is words and labels; one word is a row of a batch."""
    generator = torch.Generator().manual_seed(0)
    table, w = (torch.randn(rows, width, generator=generator, dtype=torch.float64) for _ in range(2))
    words = torch.randint(rows, (40, 3), generator=generator)

    def loss_fn(params, words):
        return (F.embedding(words, params["table"]).mean(1) @ params["w"]).tanh().exp().mean()

    params = {"table": table, "w": w[0]}
    vectors = {k: torch.randn(5, *p.shape, generator=generator, dtype=torch.float64) for k, p in params.items()}
    batches = [words[i : i + 4] for i in range(0, 40, 4)]
    return Functional(params, loss_fn, torch.device("cpu"), loss_fn, loss_fn), vectors, batches


@pytest.mark.parametrize(
    ("least", "steps_alike", "in_outputs"),
    [(5 * 480, 0, True), (5 * 480 + 1, 0, False), (5 * 480, products.MANY_STEPS, False)],
    ids=["much", "too little", "too little to go without a recording"],
)
def test_much_that_batches_see_through_input_layers_is_solved_for_in_outputs(
    least, steps_alike, in_outputs, monkeypatch
):
    model, vectors, batches = with_table()
    monkeypatch.setattr(products, "MUCH_IN_OUTPUTS", least)
    monkeypatch.setattr(products, "IN_OUTPUTS_AT_ONCE", 2)
    calls = []

    def counted(*args, **settings):
        calls.append((settings["at_once"], settings["steps_at_once"]))
        return lissa.solve_lissa_in_outputs(*args, **settings)

    monkeypatch.setattr(products, "solve_lissa_in_outputs", counted)
    solve = products.inverse_products(model, 0.1, 20.0, steps_alike=steps_alike, example=lambda: batches[0][:1])
    got = solve(vectors, lambda: iter(batches))
    assert calls == [(2, 32)] * in_outputs
    matvec = StackedHvp(model.loss_fn, model.params)
    expected = lissa.solve_lissa_stacked(matvec, vectors, batches, damping=0.1, scale=20.0)
    torch.testing.assert_close(got.value, expected.value, rtol=1e-10, atol=1e-12)


def test_as_many_graphs_are_held_as_fit_into_the_memory_of_a_pass(monkeypatch):
    model, vectors, batches = with_table()
    monkeypatch.setattr(products, "MUCH_IN_OUTPUTS", 1)
    calls = []

    def recorded(*args, at_once, steps_at_once, **settings):
        calls.append((at_once, steps_at_once))
        return lissa.solve_lissa_in_outputs(*args, **settings)

    monkeypatch.setattr(products, "solve_lissa_in_outputs", recorded)
    example = batches[0][:1]
    kept = products.numbers_in(example) + products.forward_work(model.loss_fn, model.params, example).written
    for fit in (0, 12, 10**6):
        memory = 4 * kept * fit * 8 * 8  # an eighth of it, in numbers of eight bytes, holds so many batches of four
        limited = model._replace(max_memory=memory)
        solve = products.inverse_products(limited, 0.1, 20.0, example=lambda: example, batch_size=4)
        solve(vectors, lambda: iter(batches))
    assert calls == [(1, 1), (12, 3), (64, 32)]


@pytest.mark.parametrize("how", ["no example", "an example that fails", "few numbers"])
def test_where_it_cannot_be_known_to_pay_nothing_is_done_in_outputs(how, monkeypatch):
    model, vectors, batches = with_table(width=1 if how == "few numbers" else 8)
    if how == "few numbers":
        more = torch.ones(1000, dtype=torch.float64)
        model = model._replace(params=model.params | {"more": more})
        vectors = vectors | {"more": more.expand(5, -1)}
    monkeypatch.setattr(products, "MUCH_IN_OUTPUTS", 1)
    monkeypatch.setattr(products, "solve_lissa_in_outputs", None)
    example = {"no example": None, "an example that fails": lambda: 1 / 0}.get(how, lambda: batches[0])
    got = products.inverse_products(model, 0.1, 20.0, example=example)(vectors, lambda: iter(batches))
    assert got.status.tolist() == [lissa.Status.FINISHED] * 5


def test_right_hand_sides_that_do_not_fit_together_are_solved_for_in_smaller_groups(monkeypatch):
    def two_at_most(vectors, batches):
        if len(vectors["w"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return solve(matvec, vectors, batches, damping=0.0, scale=4.0)

    def matvec(batch, vectors):
        return {"w": batch * vectors["w"]}

    solve = products.solve_lissa_stacked
    monkeypatch.setattr(products, "solve_lissa_stacked", lambda matvec, v, batches, **settings: two_at_most(v, batches))
    model = Functional({"w": torch.ones(3)}, None, torch.device("cpu"), None, None)
    vectors = {"w": torch.arange(15.0).reshape(5, 3)}
    got = products.inverse_products(model, 0.0, 4.0)(vectors, lambda: [torch.full((3,), 2.0)] * 60)
    torch.testing.assert_close(got.value["w"], vectors["w"] / 2)
    assert got.status.shape == (5,)
