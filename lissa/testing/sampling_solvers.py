"""The laws of solvers that draw batches from data. Each is a plain function `law(solve, samples)`.

The solver under test is called as `solve(matvec, v, data, damping=..., batch_size=..., repeats=...)`, with
`matvec(rows, v)` the product on some rows of the data, and returns x, or anything with x as `.value`. It promises a
relative error, noise included: `samples.rtol`; and `samples.exact_rtol` where all rows are equal and there is no noise.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lissa import tree
from lissa.testing.answers import require_form
from lissa.testing.environment import nothing_global_changes
from lissa.testing.law import LawBroken, require_close, run
from lissa.testing.operators import Samples
from lissa.types import Params

SamplingSolver = Callable[..., Any]


def form(solve: SamplingSolver, samples: Samples) -> None:
    """X has the keys, shapes and dtypes of v, and is finite: exact."""
    _apply(form, solve, samples)


def purity(solve: SamplingSolver, samples: Samples) -> None:
    """A call changes neither the data nor v, and reads no global random state. Exact."""
    copy = samples._replace(data=samples.data.clone(), v=tree.map(torch.clone, samples.v))

    def broken(what: str, cause: str) -> LawBroken:
        return LawBroken(purity, f"the call changed {what}", cause=cause, case=samples)

    with nothing_global_changes(broken):
        _apply(purity, solve, copy)
    if not torch.equal(copy.data, samples.data) or any(not torch.equal(copy.v[k], samples.v[k]) for k in copy.v):
        raise broken("the data or v", "an argument is updated in place: copy it first")


def batch_size(solve: SamplingSolver, samples: Samples) -> None:
    """Every product is on `batch_size` rows (it divides the number of rows): exact counts."""
    sizes: set[int] = set()
    _apply(batch_size, solve, samples, watch=lambda rows: sizes.add(len(rows)))
    if sizes != {samples.batch_size}:
        cause = "batches are cut in another place"
        if not sizes:
            cause = "no product was taken at all"
        elif sizes == {samples.repeats}:
            cause = "repeats and batch_size are swapped"
        raise LawBroken(
            batch_size,
            f"batch_size={samples.batch_size} and repeats={samples.repeats} were asked for",
            got=f"batches of {sorted(sizes)}",
            expected=f"batches of {samples.batch_size}",
            cause=cause,
            case=samples,
        )


def every_example(solve: SamplingSolver, samples: Samples) -> None:
    """Every row of the data is in some batch: exact. Of solvers that draw at random, it asks for enough draws."""
    seen: list[Tensor] = []
    _apply(every_example, solve, samples, watch=lambda rows: seen.append(rows.detach().clone()))
    drawn = {tuple(row) for row in torch.cat(seen).tolist()} if seen else set()
    missing = [row for row in samples.data.tolist() if tuple(row) not in drawn]
    if missing:
        cause = "only the first batch is used, or a part of the data is never drawn"
        reason = f"{len(missing)} of {len(samples.data)} rows are never in a batch"
        raise LawBroken(every_example, reason, cause=cause, case=samples)


def exactness(solve: SamplingSolver, samples: Samples) -> None:
    """Where all rows are equal, every batch has the curvature of the data: `x = (C + damping I)^-1 v` without noise.

    Within `exact_rtol |x|`, what the solver promises for its steps alone.
    """
    rows = samples.data[:1].expand(len(samples.data), -1).clone()
    equal = samples._replace(data=rows)
    x = _apply(exactness, solve, equal)
    expected = equal.solution()
    require_close(
        exactness,
        x,
        tree.unflatten(expected, equal.v),
        samples.exact_rtol * float(expected.norm()),
        what="with equal rows x is not the solution",
        case=samples,
        cause=lambda: _cause(equal, x),
    )


def inverse_of_the_mean(solve: SamplingSolver, samples: Samples) -> None:
    """`x = (mean over the data of C_i + damping I)^-1 v`: the inverse of a mean, not a mean or a sum of inverses.

    Within `rtol |x|`, the noise that the solver's sampling leaves.
    """
    x = _apply(inverse_of_the_mean, solve, samples)
    expected = samples.solution()
    require_close(
        inverse_of_the_mean,
        x,
        tree.unflatten(expected, samples.v),
        samples.rtol * float(expected.norm()),
        what="x is not the solution for the mean curvature of the data",
        case=samples,
        cause=lambda: _cause(samples, x),
    )


def _apply(
    law: Callable[..., None],
    solve: SamplingSolver,
    samples: Samples,
    watch: Callable[[Tensor], Any] = lambda rows: None,
) -> Params:
    plain = samples.matvec

    def matvec(rows: Tensor, v: Params) -> Params:
        watch(rows)
        return plain(rows, v)

    def call() -> Any:
        result = solve(
            matvec,
            samples.v,
            samples.data,
            damping=samples.damping,
            batch_size=samples.batch_size,
            repeats=samples.repeats,
        )
        return getattr(result, "value", result)

    like = dict(samples.v)
    x = run(law, samples, call)
    require_form(law, x, like, samples, "x", "x itself, or a result whose .value is x")
    if not all(t.isfinite().all() for t in x.values()):
        raise LawBroken(law, "x is not finite", got=x, cause="steps that are too long", case=samples)
    return {k: x[k].detach() for k in like}


def _cause(samples: Samples, x: Params) -> str:
    got, expected = tree.flatten(x), samples.solution()
    parts = samples.data.split(samples.batch_size)
    inverses = torch.stack([samples.solution(rows) for rows in parts])
    undamped = torch.linalg.pinv(samples.curvature(samples.data), hermitian=True) @ tree.flatten(samples.v)
    suspects = {
        "it is the mean of the batches' inverses, not the inverse of their mean": inverses.mean(0),
        "it is the sum of the batches' inverses, not the inverse of their mean": inverses.sum(0),
        "only the first batch is used": inverses[0],
        "damping is ignored": undamped,
        "repeats are summed, not averaged": samples.repeats * expected,
        "it is v itself": tree.flatten(samples.v),
        "a sign": -expected,
    }
    nearest = min(suspects, key=lambda what: float((got - suspects[what]).norm()))
    if (got - suspects[nearest]).norm() <= 0.1 * (got - expected).norm():
        return nearest
    ratio = float(got @ expected / (expected @ expected))
    if (got - ratio * expected).norm() <= 0.05 * got.norm():
        return f"it is {ratio:.4g} times the solution: a wrong final scale, or repeats that are not averaged"
    return "too few steps, or more noise than promised"
