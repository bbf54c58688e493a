"""The work of a forward pass is counted right, and the plan made of it is the cheapest method within memory."""

import pytest
import torch
import torch.nn.functional as F

from lissa import influence_scores, per_example_gradients
from lissa.scoring import (
    MACHINES,
    METHODS,
    NUMBERS_AT_ONCE,
    ForwardWork,
    Machine,
    forward_work,
    plan_scoring,
    pulled_at_once,
)


def example_losses(params, batch):
    x, y = batch
    return F.cross_entropy(torch.tanh(x @ params["w"]) @ params["u"], y, reduction="none")


def test_the_work_of_an_example():
    params = {"w": torch.ones(5, 4), "u": torch.ones(4, 3)}
    work = forward_work(example_losses, params, (torch.ones(1, 5), torch.zeros(1, dtype=torch.long)))
    assert work.multiplications == 5 * 4 + 4 * 3
    assert work.products == 2
    assert work.largest == 4
    assert work.tables == 0
    # Two products, tanh, log-softmax and the loss of each example, with the weight that torch's kernel also returns.
    assert work.operations == 5
    assert 4 + 4 + 3 + 3 + 1 <= work.written <= 4 + 4 + 3 + 3 + 2
    # Each operation reads what the one before wrote, the first the example and the last a label too.
    assert work.read == 5 + 4 + 4 + 3 + 3 + 1
    assert work.inputs == 5 + 1
    assert work.input_multiplications == 5 * 4


def test_the_work_of_an_embedding_is_in_its_table():
    table = torch.ones(7, 4)
    work = forward_work(lambda p, x: F.embedding(x, p["table"]).sum((1, 2)), {"table": table}, torch.zeros(1, 3).long())
    assert work.tables == 7 * 4
    assert work.written == 3 * 4 + 1
    assert work.read == 3 + 3 * 4 + 3 * 4  # the indices and their rows, and the rows once more for their sum
    assert work.looked_up == 3 * 4
    assert work.inputs == 3
    assert work.multiplications == 0


def test_the_work_of_products_with_vectors():
    params = {"A": torch.ones(5, 4), "b": torch.ones(4), "c": torch.ones(5)}
    products = [
        lambda p, x: (p["A"] @ x[0])[:1],
        lambda p, x: torch.addmv(p["c"], p["A"], x[0])[:1],
        lambda p, x: torch.dot(p["b"], x[0]).reshape(1),
    ]
    works = [forward_work(f, params, torch.ones(1, 4)) for f in products]
    assert [(work.multiplications, work.products) for work in works] == [(20, 1), (20, 1), (4, 1)]


def test_what_is_computed_of_the_parameters_alone_is_no_work_of_an_example():
    params = {"w": torch.ones(5, 4), "u": torch.ones(4, 3)}
    work = forward_work(lambda p, x: (x @ (2 * (p["w"] @ p["u"]))).sum(1), params, torch.ones(1, 5))
    assert work.operations == 4
    assert (work.products, work.multiplications) == (1, 5 * 3)
    assert (work.read, work.written, work.largest) == (5 + 5 * 3 + 3, 3 + 1, 3)


def test_what_is_read_of_the_example_is_counted_inside_vmap_too():
    def of_rows(params, x):
        return torch.vmap(lambda row: (row @ params["w"]).square().sum())(x)

    work = forward_work(of_rows, {"w": torch.ones(5, 4)}, torch.ones(1, 5))
    assert (work.inputs, work.input_multiplications) == (5, 20)


def test_a_view_is_no_operation_even_where_torch_calls_it_unsafe():
    def loss(params, x):
        return torch.ops.aten._unsafe_view((x @ params["w"]).view(2, 2), (1, 4)).sum(1)

    work = forward_work(loss, {"w": torch.ones(5, 4)}, torch.ones(1, 5))
    assert (work.operations, work.written) == (2, 4 + 1)


def test_counting_neither_differentiates_nor_draws():
    params = {"w": torch.ones(5, 4, requires_grad=True), "u": torch.ones(4, 3)}
    before = torch.get_rng_state()
    forward_work(example_losses, params, (torch.ones(1, 5), torch.zeros(1, dtype=torch.long)))
    assert params["w"].grad is None
    assert torch.equal(before, torch.get_rng_state())


WORK = ForwardWork(
    operations=10,
    multiplications=10_000,
    read=1_000,
    written=1_000,
    largest=500,
    tables=300,
    looked_up=30,
    inputs=200,
    input_multiplications=4_000,
    products=3,
)


@pytest.mark.parametrize("vectors", [1, 10, 100])
@pytest.mark.parametrize("parameters", [10_000, 10**6])
def test_chunks_hold_what_they_may_or_as_much_as_the_vectors(vectors, parameters):
    passed = 1_000 + 500
    held = {"jvp": vectors * passed, "per-example-gradients": 2 * parameters + passed, "double-vjp": 4 * passed}
    for numbers in (10**5, 10**7):
        plan = plan_scoring(WORK, examples=10**6, vectors=vectors, parameters=parameters, numbers=numbers)
        assert plan.chunk_sizes.keys() == held.keys()
        for method, size in plan.chunk_sizes.items():
            assert size == 1 or size * held[method] <= max(numbers, vectors * parameters)


def test_chunks_are_even():
    sizes = {
        n: plan_scoring(WORK, examples=n, vectors=1, parameters=1, numbers=15_000).chunk_sizes for n in (10, 11, 25)
    }
    assert {n: size["jvp"] for n, size in sizes.items()} == {10: 10, 11: 6, 25: 9}  # at most ten of 1,500 numbers each


def test_many_vectors_and_long_sequences_favour_gradients_and_many_parameters_the_others():
    def method(examples=1000, vectors=10, parameters=10_000, times_as_long=1, tables=0, methods=METHODS):
        work = ForwardWork(
            operations=10,
            multiplications=10_000 * times_as_long,
            read=1_000 * times_as_long,
            written=1_000 * times_as_long,
            largest=500 * times_as_long,
            tables=tables,
            products=3,
        )
        return plan_scoring(work, examples=examples, vectors=vectors, parameters=parameters, methods=methods).method

    assert method(examples=10, vectors=1) == "double-vjp"
    assert method(vectors=1000) == "per-example-gradients"
    assert method(times_as_long=100) == "per-example-gradients"
    assert method(parameters=10**6, methods=METHODS[:2]) == "jvp"
    assert method(parameters=10**6, tables=10**6, vectors=100) == "double-vjp"
    assert method(parameters=10**6, tables=10**10, methods=METHODS[:2]) == "per-example-gradients"


def test_only_the_methods_that_are_named_are_planned():
    for methods in (("jvp",), ("double-vjp", "per-example-gradients")):
        plan = plan_scoring(WORK, examples=100, vectors=10, parameters=1_000, methods=methods)
        assert plan.method in methods
        assert set(plan.seconds) == set(plan.chunk_sizes) == set(methods)
    for methods, got in ((("fast",), "'fast'"), ((), "none")):
        with pytest.raises(ValueError, match=rf"`plan_scoring\(methods=...\)`.*{got}"):
            plan_scoring(WORK, examples=100, vectors=10, parameters=1_000, methods=methods)


@pytest.mark.parametrize("cache", [1_000, 10**6])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_times_are_those_of_the_formula(device, cache, monkeypatch):
    a, b, m, w, d = 1e-3, 1e-4, 1e-6, 1e-7, 1e-2
    monkeypatch.setitem(MACHINES, device, Machine(a, b, m, w, cache, d))
    plan = plan_scoring(WORK, examples=100, vectors=10, parameters=1_000, device=device, numbers=150_000)
    G, M, I, E, V, P, K = 16_000, 1_850, 200, 30, 300, 1_000, 10  # noqa: E741
    # Ten chunks of ten, three of 34, four of 25, where all ten vectors go at once.
    jvp = 10 * (29 * a + 17.5 * V * w) + 100 * (11 * (G * m + 0.8 * M * w) + (12.5 * E + 14 * I) * w)
    jvp += 100 * 2 * max(0, 1 - cache / 150_000) * K * M * w
    gradients = 3 * (46.5 * a + d + 7.5 * P * w) + 100 * (G * m + (3.5 * M + 2.5 * P) * w + 7.5 * P * m)
    gradients += 100 * 2.5 * P * max(0, 1 - cache / 34_000) * w
    double_vjp = 4 * (15 * a + d + 5 * 80 * b + (10 * P + 10 / 3 * V) * w)
    double_vjp += 100 * (13.75 * G * m + (9 * M + 15 * (E + I)) * w)
    expected = {"jvp": jvp, "per-example-gradients": gradients, "double-vjp": double_vjp}
    assert plan.seconds == pytest.approx(expected, rel=1e-9)
    monkeypatch.setitem(MACHINES, device, Machine(a, 1e-6, m, w, cache, d))  # now passes cost less than vmap
    again = plan_scoring(WORK, examples=100, vectors=10, parameters=1_000, device=device, numbers=150_000)
    one_by_one = 4 * (10 * 80 * 1e-6 - 5 * 80 * b - 10 / 3 * V * w)
    assert again.seconds["double-vjp"] == pytest.approx(double_vjp + one_by_one, rel=1e-9)


@pytest.mark.parametrize(("looked_up", "at_once"), [(0, 102), (44_999, 102), (45_001, 1)])
def test_vectors_go_one_by_one_where_looked_up_rows_cost_more_than_passes(looked_up, at_once, monkeypatch):
    monkeypatch.setitem(MACHINES, "cpu", Machine(1.0, 1e-5, 1.0, 1e-9, 1.0, 0.0))  # 18 N b = 40 E w at E = 45,000
    assert pulled_at_once(20, examples=10, operations=10, looked_up=looked_up) == at_once


def test_of_two_vectors_none_is_pulled_back_with_the_other_where_rows_are_looked_up():
    assert [pulled_at_once(2, examples=1, operations=100, looked_up=n) for n in (0, 1)] == [1024, 1]


@pytest.mark.parametrize("numbers", [1, 40, 10**6])
@pytest.mark.parametrize("vectors", [1, 40])
def test_scores_by_plan_do_not_depend_on_the_chunks(numbers, vectors, monkeypatch):
    monkeypatch.setitem(NUMBERS_AT_ONCE, "cpu", numbers)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    params = {"w": normal(5, 4), "u": normal(4, 3)}
    batch = (normal(7, 5), torch.randint(3, (7,), generator=generator))
    ihvps = {k: normal(vectors, *p.shape) for k, p in params.items()}
    gradients = per_example_gradients(example_losses, params, batch)
    expected = sum(ihvps[k].flatten(1) @ gradients[k].flatten(1).T for k in params)
    torch.testing.assert_close(influence_scores(example_losses, params, ihvps, batch), expected, rtol=1e-12, atol=1e-12)
