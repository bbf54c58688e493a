"""One call a kind: runs every law that applies to a product, a solver or scores. Or the laws themselves, by name."""

from functools import partial

import torch

from lissa import checks
from lissa.testing import products, sampling_solvers, scores, solvers, strategies
from lissa.testing.law import Checked, Law, check_laws, law_name
from lissa.testing.operators import Operator, Samples
from lissa.testing.problems import ACCURACIES, CURVATURES, Problem
from lissa.testing.strategies import DTYPES


def product_laws(
    *,
    curvature: str = "hessian",
    accuracy: str = "autodiff",
    vmap: bool = False,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    min_batch_size: int = 0,
) -> tuple[Law, ...]:
    """The laws of products of this curvature, in the order in which they tell faults apart. Arguments: `check_hvp`."""
    checks.one_of("product_laws", "curvature", curvature, CURVATURES)
    checks.one_of("product_laws", "accuracy", accuracy, ACCURACIES)
    draw = partial(strategies.problems, curvature=curvature, accuracy=accuracy, dtypes=dtypes)
    legal = draw(min_batch_size=min_batch_size)
    some = draw(min_batch_size=max(1, min_batch_size))
    laws = [
        (products.form, legal),
        (products.purity, some),
        (products.determinism, some),
        (products.statelessness, some),
        (products.linearity, legal),
        (products.symmetry, legal),
    ]
    if curvature == "gauss-newton":
        laws += [(products.linear_model, draw(models=("linear",), min_batch_size=min_batch_size))]
    laws += [
        (products.additivity, draw(min_batch_size=2)),
        (products.difference_of_gradients if curvature == "hessian" else products.semidefiniteness, legal),
        (products.key_order, legal),
        (products.reparametrisation, legal),
        (products.dense_agreement, legal),
    ]
    if vmap:
        laws += [(products.vmap_is_loop, legal)]
    return tuple(Law(law_name(law), law, cases) for law, cases in laws)


def check_hvp(
    hvp: products.Product,
    *,
    curvature: str = "hessian",
    accuracy: str = "autodiff",
    vmap: bool = False,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    min_batch_size: int = 0,
    problem: Problem | None = None,
    max_examples: int = 100,
    seed: int = 0,
) -> Checked:
    """Every law of curvature products, each on `max_examples` random problems; the first broken one is raised.

    Args:
        hvp: `hvp(loss_fn, params, batch, v)` for `curvature="hessian"`; `ggnvp(output_fn, output_loss_fn, params,
            batch, v)` for `"gauss-newton"`; `fishervp(example_loss_fn, params, batch, v)` for `"fisher"`, the
            empirical one.
        curvature: Which matrix the product is with.
        accuracy: `"autodiff"`: exact up to rounding. `"difference"`: a central difference of gradients with step
            `u^(1/3) (1 + |params|) / |v|`, up to a factor of four.
        vmap: Whether the product also runs under `torch.vmap` over v.
        dtypes: Of parameters and inputs.
        min_batch_size: 0 if a batch of no example is legal (all losses here are 0 on it), else 1.
        problem: If given, the laws are checked on this problem alone: for use inside Hypothesis' own `@given`.
        max_examples: Problems for each law.
        seed: The same seed tries the same problems. Nothing is written to disk.

    Returns:
        The names of the laws that held.

    Raises:
        LawBroken: An AssertionError with the law, the smallest problem as code, got, expected and the likely cause.

    Example:
        >>> from lissa import hvp
        >>> check_hvp(hvp, max_examples=3).laws[4:6]
        ('linearity', 'symmetry')
    """
    if problem is not None:
        curvature, accuracy = problem.curvature, problem.accuracy
    laws = product_laws(curvature=curvature, accuracy=accuracy, vmap=vmap, dtypes=dtypes, min_batch_size=min_batch_size)
    return check_laws(laws, hvp, case=problem, max_examples=max_examples, seed=seed)


def solver_laws(
    *,
    indefinite: bool = False,
    rtol: float | None = None,
    damping_scale: float = 1.0,
    vmap: bool = False,
    takes_rtol: bool = False,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> tuple[Law, ...]:
    """The laws of solvers, in the order in which they tell faults apart. Arguments: `check_solver`."""
    draw = strategies.indefinite_operators if indefinite else strategies.spd_operators
    operators = draw(dtypes=dtypes, rtol=rtol, damping_scale=damping_scale)
    laws = [
        solvers.form,
        solvers.purity,
        solvers.determinism,
        solvers.meaning_of_damping,
        solvers.residual,
        solvers.linearity,
        solvers.key_order,
        solvers.rotation,
        solvers.ridge_solution,
        solvers.dense_agreement,
    ]
    if takes_rtol:
        laws += [solvers.early_stop]
    if vmap:
        laws += [solvers.vmap_is_loop]
    return tuple(Law(law_name(law), law, operators) for law in laws)


def check_solver(
    solve: solvers.Solver,
    *,
    indefinite: bool = False,
    rtol: float | None = None,
    damping_scale: float = 1.0,
    vmap: bool = False,
    takes_rtol: bool = False,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    operator: Operator | None = None,
    max_examples: int = 100,
    seed: int = 0,
) -> Checked:
    """Every law of solvers of `(A + damping I) x = v`, on `max_examples` operators each; the first broken is raised.

    Args:
        solve: `solve(matvec, v, damping=...)`, returning x or anything with x as `.value`.
        indefinite: Whether the matrices have eigenvalues of both signs.
        rtol: The relative residual that the solver promises. Default: half the digits, `sqrt(eps)` of the dtype.
        damping_scale: What the solver multiplies damping with: 1 for ours; its scale for AllenNLP's meaning. A solver
            with another meaning breaks the law "meaning of damping", whose message says which it has; so does
            `damping_meaning(solve)`.
        vmap: Whether the solver also runs under `torch.vmap` over v.
        takes_rtol: Whether the solver also takes `rtol=` and stops early by it.
        dtypes: Of matrices and vectors.
        operator: If given, the laws are checked on this operator alone: for use inside Hypothesis' own `@given`.
        max_examples: Operators for each law.
        seed: The same seed tries the same operators. Nothing is written to disk.

    Returns:
        The names of the laws that held.

    Raises:
        LawBroken: An AssertionError with the law, the smallest operator as code, got, expected and the likely cause.

    Example:
        >>> from lissa import tree
        >>> def solve(matvec, v, *, damping):
        ...     P = tree.numel(v)
        ...     eye = torch.eye(P, dtype=tree.flatten(v).dtype)
        ...     matrix = torch.stack([tree.flatten(matvec(tree.unflatten(e, v))) for e in eye]) + damping * eye
        ...     return tree.unflatten(torch.linalg.solve(matrix, tree.flatten(v)), v)
        >>> check_solver(solve, max_examples=3).laws[3]
        'meaning of damping'
    """
    laws = solver_laws(
        indefinite=indefinite, rtol=rtol, damping_scale=damping_scale, vmap=vmap, takes_rtol=takes_rtol, dtypes=dtypes
    )
    return check_laws(laws, solve, case=operator, max_examples=max_examples, seed=seed)


def sampling_solver_laws(*, rtol: float = 0.8, exact_rtol: float = 0.05) -> tuple[Law, ...]:
    """The laws of solvers that draw batches. Arguments: `check_sampling_solver`."""
    samples = strategies.batch_streams(rtol=rtol, exact_rtol=exact_rtol)
    laws = (
        sampling_solvers.form,
        sampling_solvers.purity,
        sampling_solvers.batch_size,
        sampling_solvers.every_example,
        sampling_solvers.exactness,
        sampling_solvers.inverse_of_the_mean,
    )
    return tuple(Law(law_name(law), law, samples) for law in laws)


def check_sampling_solver(
    solve: sampling_solvers.SamplingSolver,
    *,
    rtol: float = 0.8,
    exact_rtol: float = 0.05,
    samples: Samples | None = None,
    max_examples: int = 100,
    seed: int = 0,
) -> Checked:
    """Every law of solvers that draw batches from data, each on `max_examples` data sets; the first broken is raised.

    Args:
        solve: `solve(matvec, v, data, damping=..., batch_size=..., repeats=...)`, with `matvec(rows, v)`, returning x
            or anything with x as `.value`; it draws batches of rows and averages so many repeats.
        rtol: The relative error that it promises, sampling noise included.
        exact_rtol: The same where all rows are equal, so that there is no noise.
        samples: If given, the laws are checked on these data alone: for use inside Hypothesis' own `@given`.
        max_examples: Data sets for each law.
        seed: The same seed tries the same data sets.

    Returns:
        The names of the laws that held.

    Raises:
        LawBroken: An AssertionError with the law, the smallest data set as code, got, expected and the likely cause.

    Example:
        >>> from lissa import solve_lissa, tree
        >>> def solve(matvec, v, data, *, damping, batch_size, repeats):
        ...     batches = list(data.split(batch_size)) * 400  # not at random: each row as often as any other
        ...     return solve_lissa(matvec, v, batches, damping=damping, scale=40.0, average_after=len(batches) // 2)
        >>> check_sampling_solver(solve, max_examples=2).laws[-1]
        'inverse of the mean'
    """
    laws = sampling_solver_laws(rtol=rtol, exact_rtol=exact_rtol)
    return check_laws(laws, solve, case=samples, max_examples=max_examples, seed=seed)


def score_laws(*, dtypes: tuple[torch.dtype, ...] = DTYPES, min_batch_size: int = 1) -> tuple[Law, ...]:
    """The laws of influence scores. Arguments: `check_scores`."""
    problems = strategies.problems(dtypes=dtypes, min_batch_size=min_batch_size)
    laws = (
        scores.form,
        scores.purity,
        scores.determinism,
        scores.example_order,
        scores.batching,
        scores.sign,
        scores.linearity,
        scores.dense_agreement,
        scores.leave_one_out,
    )
    return tuple(Law(law_name(law), law, problems) for law in laws)


def check_scores(
    scores_fn: scores.Scores,
    *,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    min_batch_size: int = 1,
    problem: Problem | None = None,
    max_examples: int = 100,
    seed: int = 0,
) -> Checked:
    """Every law of influence scores, each on `max_examples` random problems; the first broken one is raised.

    Args:
        scores_fn: `scores(example_loss_fn, params, ihvp, batch) -> (B,)`: `+ grad_i . ihvp`, not divided by n.
        dtypes: Of parameters and inputs.
        min_batch_size: 0 if a batch of no example is legal, else 1.
        problem: If given, the laws are checked on this problem alone: for use inside Hypothesis' own `@given`.
        max_examples: Problems for each law.
        seed: The same seed tries the same problems.

    Returns:
        The names of the laws that held.

    Raises:
        LawBroken: An AssertionError with the law, the smallest problem as code, got, expected and the likely cause.

    Example:
        >>> from lissa import influence_scores
        >>> check_scores(influence_scores, max_examples=3).laws[-1]
        'leave one out'
    """
    laws = score_laws(dtypes=dtypes, min_batch_size=min_batch_size)
    return check_laws(laws, scores_fn, case=problem, max_examples=max_examples, seed=seed)
