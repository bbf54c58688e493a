"""Property-based testing of anyone's Hessian-vector products, inverse solvers and influence scores.

`check_hvp(my_hvp)`, `check_solver(my_solver)`, `check_sampling_solver(my_solver)` and `check_scores(my_scores)` try
every law that applies on random small cases and raise `LawBroken` with the law, the smallest case as runnable code,
what was got and expected, and the likely cause. The laws are plain functions in `products`, `solvers`,
`sampling_solvers` and `scores`: call one on a case, or hand `product_laws()` to pytest:

    @pytest.mark.parametrize("law", product_laws(), ids=str)
    def test_my_hvp(law):
        law.check(my_hvp)

Needs Hypothesis: `pip install 'lissa[test]'`. Nothing else in `lissa` imports this package.
"""

try:
    import hypothesis  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "hypothesis":
        raise
    raise ModuleNotFoundError(
        "`lissa.testing` needs Hypothesis, which is not installed: pip install 'lissa[test]'", name="hypothesis"
    ) from error

from lissa.testing import adapters, products, sampling_solvers, scores, solvers
from lissa.testing.checking import (
    check_hvp,
    check_sampling_solver,
    check_scores,
    check_solver,
    product_laws,
    sampling_solver_laws,
    score_laws,
    solver_laws,
)
from lissa.testing.law import Checked, Law, LawBroken
from lissa.testing.operators import Operator, Samples, make_operator, make_samples
from lissa.testing.problems import Problem, make_problem
from lissa.testing.solvers import Damping, damping_meaning
from lissa.testing.strategies import (
    batch_streams,
    indefinite_operators,
    params_dicts,
    problems,
    spd_operators,
    vectors_like,
)

__all__ = [
    "Checked",
    "Damping",
    "Law",
    "LawBroken",
    "Operator",
    "Problem",
    "Samples",
    "adapters",
    "batch_streams",
    "check_hvp",
    "check_sampling_solver",
    "check_scores",
    "check_solver",
    "damping_meaning",
    "indefinite_operators",
    "make_operator",
    "make_problem",
    "make_samples",
    "params_dicts",
    "problems",
    "product_laws",
    "products",
    "sampling_solver_laws",
    "sampling_solvers",
    "score_laws",
    "scores",
    "solver_laws",
    "solvers",
    "spd_operators",
    "vectors_like",
]
