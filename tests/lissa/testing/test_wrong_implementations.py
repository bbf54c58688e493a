"""The laws bite: each wrong implementation is found by the law that is named for it, within 100 examples."""

import pytest

from lissa.testing import LawBroken, product_laws, sampling_solver_laws, score_laws, solver_laws
from tests.wrong_implementations import WRONG


@pytest.mark.parametrize("name", WRONG)
def test_the_named_law_finds_it_and_says_why(name):
    wrong = WRONG[name]
    law = next(law for law in wrong.laws if law.name == wrong.law)
    with pytest.raises(LawBroken) as broken:
        law.check(wrong.make(), max_examples=100)
    assert broken.value.law == wrong.law
    assert wrong.cause in broken.value.cause


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_no_earlier_law_takes_it_for_something_else(name):
    wrong = WRONG[name]
    implementation = wrong.make()
    for law in wrong.laws[: [law.name for law in wrong.laws].index(wrong.law)]:
        law.check(implementation, max_examples=100)


def breaks(law, wrong):
    try:
        law.check(wrong.make(), max_examples=20)
    except LawBroken as broken:
        return "raised" not in broken.reason  # a call that fails shows nothing of the law
    return False


FAMILIES = {
    "hessian": product_laws(vmap=True),
    "gauss-newton": tuple(
        law for law in product_laws(curvature="gauss-newton") if law.name in ("linear model", "semidefiniteness")
    ),
    "solver": solver_laws(takes_rtol=True),
    "sampling": sampling_solver_laws(),
    "scores": score_laws(),
}


@pytest.mark.parametrize(("family", "law"), [(f, law) for f, laws in FAMILIES.items() for law in laws], ids=str)
def test_every_law_finds_something(family, law):
    """A law that nothing here breaks would have shown nothing by holding."""
    kin = [w for w in WRONG.values() if {x.holds for x in w.laws} & {law.holds} and family_of(w) == family]
    assert any(breaks(law, wrong) for wrong in sorted(kin, key=lambda wrong: wrong.law != law.name))


def family_of(wrong):
    names = {law.name: law.holds.__module__.rpartition(".")[2] for law in wrong.laws}
    if "linear model" in names:
        return "gauss-newton"
    kinds = {"products": "hessian", "solvers": "solver", "sampling_solvers": "sampling", "scores": "scores"}
    return kinds[names["form"]]
