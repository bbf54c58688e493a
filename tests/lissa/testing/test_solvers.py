import pytest

from lissa import solve_cg, tree
from lissa.testing import LawBroken, check_solver, damping_meaning
from tests.wrong_implementations import damping_subtracted, damping_times_scale, no_damping, recursion


def allennlp(matvec, v, *, damping, scale=16.0):
    """`h <- v + (1 - damping) h - H h / scale`, 600 steps: what is left is below (1 - 1 / 64)^600 = 1e-4."""
    h = v
    for _ in range(600):
        h = tree.map(lambda v, h, A_h: v + (1 - damping) * h - A_h / scale, v, h, matvec(h))
    return tree.scale(1 / scale, h)


def ours(matvec, v, *, damping):
    return tree.scale(1 / 4, recursion(matvec, v, damping, 4.0, 200))


@pytest.mark.parametrize(
    ("solve", "meaning", "factor"),
    [
        (ours, "H + damping I", 1.0),
        (lambda matvec, v, *, damping: solve_cg(matvec, v, damping=damping, rtol=1e-8), "H + damping I", 1.0),
        (allennlp, "H + damping * scale I", 16.0),
        (damping_times_scale, "H + damping * scale I", 10.0),
        (no_damping, "ignored", 0.0),
    ],
)
def test_a_solver_is_told_what_it_means_by_damping(solve, meaning, factor):
    found = damping_meaning(solve)
    assert found.meaning == meaning
    assert found.factor == pytest.approx(factor, abs=1e-3)


def test_what_is_no_solution_of_any_shift_is_unknown():
    assert damping_meaning(lambda matvec, v, *, damping: v).meaning == "unknown"


def test_subtracted_damping_is_a_factor_of_minus_one():
    assert damping_meaning(damping_subtracted).factor == pytest.approx(-1.0, abs=1e-3)


def test_allennlps_meaning_keeps_every_law_once_its_scale_is_said():
    check_solver(allennlp, damping_scale=16.0, rtol=1e-2, max_examples=4)
    with pytest.raises(LawBroken, match=r"AllenNLP's meaning.*scale = 16"):
        check_solver(allennlp, rtol=1e-2, max_examples=20)
