"""How a check runs and reports: one law, the smallest case as code, the same each time, nothing left behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

import lissa
from lissa import tree
from lissa.testing import (
    LawBroken,
    check_hvp,
    check_scores,
    check_solver,
    make_problem,
    problems,
    product_laws,
    products,
)


def doubled(loss_fn, params, batch, v):
    return tree.scale(2.0, lissa.hvp(loss_fn, params, batch, v))


def broken_by(hvp, **options):
    with pytest.raises(LawBroken) as broken:
        check_hvp(hvp, max_examples=30, **options)
    return broken.value


def test_the_report_names_law_numbers_cause_and_case():
    broken = broken_by(doubled)
    assert isinstance(broken, AssertionError)
    assert broken.law == "difference of gradients"
    # The answer is twice the expected one, entry by entry, up to what a difference of gradients can tell.
    torch.testing.assert_close(tree.flatten(broken.got), 2 * tree.flatten(broken.expected), rtol=1e-4, atol=1e-7)
    for words in ("law broken: difference of gradients", "got:", "expected:", "likely cause: it is 2 times"):
        assert words in str(broken)


def test_the_case_is_small_and_its_code_breaks_the_law_again():
    broken = broken_by(doubled)
    # One input, one output, no hidden layer is enough to see a factor: w and b.
    assert sum(p.numel() for p in broken.case.params.values()) <= 2
    *_, first_import, second_import, call = str(broken).splitlines()
    assert "make_problem" in call
    with pytest.raises(LawBroken, match="difference of gradients"):
        exec("\n".join(line.strip() for line in (first_import, second_import, call)), {"YOUR_FUNCTION": doubled})


def test_the_same_seed_gives_the_same_report():
    assert str(broken_by(doubled, seed=3)) == str(broken_by(doubled, seed=3))


def test_seeds_try_other_cases():
    def seen(seed):
        cases = []
        law = product_laws()[0]
        law._replace(holds=lambda _, case: cases.append(repr(case))).check(lissa.hvp, max_examples=5, seed=seed)
        return cases

    assert seen(0) == seen(0)
    assert seen(0) != seen(1)


def test_an_exception_of_the_code_under_test_breaks_the_law():
    def fails(loss_fn, params, batch, v):
        raise RuntimeError("no kernel")

    broken = broken_by(fails)
    assert (broken.law, broken.got) == ("form", "RuntimeError")
    assert "no kernel" in str(broken)


@given(problem=problems(dtypes=(torch.float64,)))
@settings(max_examples=3, deadline=None, database=None)
def test_checks_work_inside_given(problem):
    assert len(check_hvp(lissa.hvp, problem=problem).laws) == len(product_laws())


@pytest.mark.parametrize("law", product_laws(), ids=str)
def test_laws_work_as_parameters_of_a_test(law):
    law.check(lissa.hvp, max_examples=2)


def test_a_law_is_a_plain_function():
    problem = make_problem(model="mlp", features=2, width=2, batch_size=3)
    assert products.symmetry(lissa.hvp, problem) is None
    with pytest.raises(LawBroken, match="dense agreement"):
        products.dense_agreement(doubled, problem)


@pytest.mark.parametrize(
    ("check", "implementation", "law"),
    [
        (check_hvp, doubled, "difference of gradients"),
        (check_solver, lambda matvec, v, *, damping: tree.scale(2.0, v), "residual"),
        (check_scores, lambda f, p, ihvp, b: 2 * lissa.influence_scores(f, p, ihvp, b), "dense agreement"),
    ],
)
def test_one_call_checks_each_kind(check, implementation, law):
    with pytest.raises(LawBroken) as broken:
        check(implementation, max_examples=10)
    assert broken.value.law == law


def test_a_case_that_was_changed_is_new_for_the_next_one():
    def in_place(loss_fn, params, batch, v):
        product = lissa.hvp(loss_fn, params, batch, v)
        with torch.no_grad():
            next(iter(params.values())).add_(1.0)
        return product

    def entries(problem):
        return [t.tolist() for t in problem.params.values()]

    law = product_laws()[0]
    law.check(in_place, max_examples=10)
    seen = []
    law._replace(holds=lambda _, case: seen.append(entries(case) == entries(case.maker()))).check(lissa.hvp)
    assert all(seen)


def test_a_fault_that_does_not_come_back_is_reported_all_the_same():
    calls = 0

    def wrong_once(loss_fn, params, batch, v):
        nonlocal calls
        calls += 1
        return doubled(loss_fn, params, batch, v) if calls == 40 else lissa.hvp(loss_fn, params, batch, v)

    law = next(law for law in product_laws() if law.name == "dense agreement")
    with pytest.raises(LawBroken, match="dense agreement"):
        law.check(wrong_once)


def test_a_check_leaves_global_states_as_they_were():
    def careless(loss_fn, params, batch, v):
        product = lissa.hvp(loss_fn, params, batch, v)
        torch.manual_seed(7)
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        return product

    before = torch.get_rng_state()
    assert broken_by(careless).law == "purity"
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32


def test_an_endless_loop_can_be_told_from_its_interrupt():
    def endless(loss_fn, params, batch, v):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as interrupt:
        check_hvp(endless)
    if hasattr(interrupt.value, "add_note"):
        assert "'form' on make_problem(" in interrupt.value.__notes__[0]


@pytest.mark.parametrize(
    ("fails", "cause"),
    [
        (lambda params, v: v, "products` says how it is called"),
        (lambda loss_fn, params, batch, v: 1 / len(batch["y"]), "min_batch_size=1"),
    ],
)
def test_the_cause_of_an_exception_is_named(fails, cause):
    assert cause in broken_by(fails).cause


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"hvp": 3}, TypeError, "must be callable"),
        ({"curvature": "hesian"}, ValueError, "curvature"),
        ({"accuracy": "exact"}, ValueError, "accuracy"),
        ({"max_examples": 0}, ValueError, "max_examples"),
    ],
)
def test_bad_arguments_are_not_the_implementations_fault(arguments, error, words):
    with pytest.raises(error, match=words):
        check_hvp(**{"hvp": lissa.hvp} | arguments)


def run(code, directory):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=directory,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(lissa.__file__).parent.parent)},
    ).stdout


def test_a_check_writes_nothing_into_the_working_directory(tmp_path):
    run("import lissa, lissa.testing; lissa.testing.check_hvp(lissa.hvp, max_examples=2)", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_hypothesis_the_import_says_what_to_install(tmp_path):
    code = """
import sys
sys.modules["hypothesis"] = None  # as if it were not installed
try:
    import lissa.testing
except ModuleNotFoundError as error:
    print(error)
"""
    assert "pip install 'lissa[test]'" in run(code, tmp_path)
