"""The work of a forward pass is counted right, and the plan made of it is the cheaper method within memory."""

import pytest
import torch
import torch.nn.functional as F

from lissa import influence_scores, per_example_gradients
from lissa.scoring import NUMBERS_AT_ONCE, ForwardWork, forward_work, plan_scoring


def example_losses(params, batch):
    x, y = batch
    return F.cross_entropy(torch.tanh(x @ params["w"]) @ params["u"], y, reduction="none")


def test_the_work_of_an_example():
    params = {"w": torch.ones(5, 4), "u": torch.ones(4, 3)}
    work = forward_work(example_losses, params, (torch.ones(1, 5), torch.zeros(1, dtype=torch.long)))
    assert work.multiplications == 5 * 4 + 4 * 3
    assert work.largest == 4
    assert work.tables == 0
    # Two products, tanh, log-softmax and the loss of each example, with the weight that torch's kernel also returns.
    assert work.operations == 5
    assert 4 + 4 + 3 + 3 + 1 <= work.written <= 4 + 4 + 3 + 3 + 2
    # Each operation reads what the one before wrote, the first the example and the last a label too.
    assert work.read == 5 + 4 + 4 + 3 + 3 + 1


def test_the_work_of_an_embedding_is_in_its_table():
    table = torch.ones(7, 4)
    work = forward_work(lambda p, x: F.embedding(x, p["table"]).sum((1, 2)), {"table": table}, torch.zeros(1, 3).long())
    assert work.tables == 7 * 4
    assert work.written == 3 * 4 + 1
    assert work.read == 3 + 3 * 4 + 3 * 4  # the indices and their rows, and the rows once more for their sum
    assert work.multiplications == 0


def test_counting_neither_differentiates_nor_draws():
    params = {"w": torch.ones(5, 4, requires_grad=True), "u": torch.ones(4, 3)}
    before = torch.get_rng_state()
    forward_work(example_losses, params, (torch.ones(1, 5), torch.zeros(1, dtype=torch.long)))
    assert params["w"].grad is None
    assert torch.equal(before, torch.get_rng_state())


WORK = ForwardWork(operations=10, multiplications=10_000, read=1_000, written=1_000, largest=500)


@pytest.mark.parametrize("vectors", [1, 10, 100])
@pytest.mark.parametrize("parameters", [10_000, 10**6])
def test_chunks_hold_what_they_may_or_as_much_as_the_vectors(vectors, parameters):
    held = {"jvp": vectors * (1_000 + 500), "per-example-gradients": 2 * parameters + 1_000 + 500}
    for numbers in (10**5, 10**7):
        plan = plan_scoring(WORK, examples=10**6, vectors=vectors, parameters=parameters, numbers=numbers)
        for method, size in plan.chunk_sizes.items():
            assert size == 1 or size * held[method] <= max(numbers, vectors * parameters)


def test_chunks_are_even():
    sizes = {
        n: plan_scoring(WORK, examples=n, vectors=1, parameters=1, numbers=15_000).chunk_sizes for n in (10, 11, 25)
    }
    assert {n: size["jvp"] for n, size in sizes.items()} == {10: 10, 11: 6, 25: 9}  # at most ten of 1,500 numbers each


def test_many_vectors_and_long_sequences_favour_gradients_and_many_parameters_favour_jvp():
    def method(vectors=10, parameters=10_000, times_as_long=1, tables=0):
        work = ForwardWork(
            operations=10,
            multiplications=10_000 * times_as_long,
            read=1_000 * times_as_long,
            written=1_000 * times_as_long,
            largest=500 * times_as_long,
            tables=tables,
        )
        return plan_scoring(work, examples=1000, vectors=vectors, parameters=parameters).method

    assert method(vectors=1) == "jvp"
    assert method(vectors=1000) == "per-example-gradients"
    assert method(times_as_long=100) == "per-example-gradients"
    assert method(parameters=10**6) == "jvp"
    assert method(parameters=10**6, tables=10**10) == "per-example-gradients"


def test_the_times_are_those_of_the_formula():
    plan = plan_scoring(WORK, examples=100, vectors=10, parameters=1_000, numbers=150_000)  # ten chunks by jvp, three
    overhead = 10 * 50e-6
    jvp = 10 * (overhead + 20 * 1_000 * 0.3e-9) + 100 * 11 * (10_000 * 10e-12 + 2_000 * 0.3e-9)
    gradients = 3 * (overhead + 20 * 1_000 * 0.3e-9)
    gradients += 100 * (20_000 * 10e-12 + 4_000 * 0.3e-9 + 2_000 * 0.3e-9 + 10_000 * 10e-12)
    assert plan.seconds == pytest.approx({"jvp": jvp, "per-example-gradients": gradients}, rel=1e-9)


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
