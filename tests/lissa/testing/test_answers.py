"""What is no answer at all breaks the law of form, by name, whatever it is."""

import pytest
import torch

import lissa
from lissa import tree
from lissa.testing import LawBroken, check_hvp, check_sampling_solver, check_scores, check_solver

NO_ANSWERS = {
    "None": (lambda x: None, "other keys"),
    "a list": (lambda x: list(x.values()), "other keys"),
    "another key": (lambda x: {**x, "more": torch.zeros(())}, "other keys"),
    "None for a tensor": (lambda x: dict.fromkeys(x), "no tensor"),
    "a tuple for a tensor": (lambda x: {k: (t,) for k, t in x.items()}, "no tensor"),
    "arrays": (lambda x: {k: t.numpy() for k, t in x.items()}, "no tensor"),
    "numbers": (lambda x: {k: t.tolist() for k, t in x.items()}, "no tensor"),
    "another shape": (lambda x: {k: t.unsqueeze(0) for k, t in x.items()}, "another shape"),
    "half precision": (lambda x: {k: t.half() for k, t in x.items()}, "another dtype"),
    "NaN": (lambda x: {k: t * torch.nan for k, t in x.items()}, "not finite"),
    "infinity": (lambda x: {k: t + torch.inf for k, t in x.items()}, "not finite"),
}


def product(answer):
    return lambda loss_fn, params, batch, v: answer(lissa.hvp(loss_fn, params, batch, v))


def solver(answer):
    return lambda matvec, v, *, damping: answer(lissa.solve_dense(matvec, v, damping=damping).value)


def sampling_solver(answer):
    def solve(matvec, v, data, *, damping, batch_size, repeats):
        return answer(lissa.solve_dense(lambda v: matvec(data, v), v, damping=damping).value)

    return solve


@pytest.mark.parametrize(
    ("check", "answering"),
    [(check_hvp, product), (check_solver, solver), (check_sampling_solver, sampling_solver)],
    ids=["product", "solver", "sampling solver"],
)
@pytest.mark.parametrize("name", NO_ANSWERS)
def test_no_answer_breaks_the_form(check, answering, name):
    answer, reason = NO_ANSWERS[name]
    with pytest.raises(LawBroken, match=reason) as broken:
        check(answering(answer), max_examples=20)
    assert broken.value.law == "form"


@pytest.mark.parametrize(
    "answer",
    [lambda s: None, lambda s: s.tolist(), lambda s: s.sum(), lambda s: s.half(), lambda s: s * torch.nan],
    ids=["None", "a list", "one number", "half precision", "NaN"],
)
def test_no_scores_break_the_form(answer):
    with pytest.raises(LawBroken) as broken:
        check_scores(lambda f, p, ihvp, b: answer(lissa.influence_scores(f, p, ihvp, b)), max_examples=20)
    assert broken.value.law == "form"


def test_keys_may_come_in_any_order():
    turned = product(lambda x: dict(reversed(x.items())))
    assert check_hvp(turned, max_examples=10)


def test_a_call_that_empties_its_arguments_is_impure_not_formless():
    def emptied(loss_fn, params, batch, v):
        result = lissa.hvp(loss_fn, params, batch, v)
        params.clear()
        return tree.map(torch.clone, result)

    with pytest.raises(LawBroken) as broken:
        check_hvp(emptied, max_examples=20)
    assert broken.value.law == "purity"
