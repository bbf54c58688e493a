"""What a wrong answer looks like: compares it with the answers of the usual mistakes.

A diagnosis, not a law: the laws say that something is wrong, this says what it resembles.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lissa import tree
from lissa.testing.oracles import dense_curvature
from lissa.testing.problems import CURVATURES, Problem
from lissa.types import Params


def cause_of_product(problem: Problem, v: Params, got: Params, expected: Params, tolerance: float) -> str:
    """The usual mistake whose answer `got` is, within `tolerance`; "" if it is none of them."""
    got_flat, expected_flat = tree.flatten(got).double(), tree.flatten(expected).double()
    suspects = _suspects(problem, tree.flatten(v).double())
    return _nearest(got_flat, expected_flat, tolerance, suspects, problem.batch_size) or cause_of_precision(
        problem.dtype, got, expected
    )


def _suspects(problem: Problem, v: Tensor) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    names = {"hessian": "Hessian", "gauss-newton": "Gauss-Newton", "fisher": "empirical Fisher"}
    for other in CURVATURES:
        if other != problem.curvature:
            what = f"it is the product with the {names[other]} matrix, not with the {names[problem.curvature]} matrix"
            yield what, lambda other=other: dense_curvature(problem._replace(curvature=other)) @ v
    yield (
        "terms between different parameter tensors are dropped: it is the product with the diagonal blocks alone",
        lambda: _blocks(dense_curvature(problem), problem.params) @ v,
    )
    if problem.batch_size > 1:
        for rows, what in (
            (slice(1), "only the first example of the batch is used"),
            (slice(problem.batch_size // 2), "only the first half of the batch is used"),
            (slice(problem.batch_size - 1), "the last example of the batch is left out"),
        ):
            yield what, lambda rows=rows: dense_curvature(problem._replace(batch=problem.rows(rows))) @ v
    if "mask" in problem.batch:
        unmasked = {**problem.batch, "mask": torch.ones_like(problem.batch["mask"])}
        yield "the mask is ignored", lambda: dense_curvature(problem._replace(batch=unmasked)) @ v


def _nearest(
    got: Tensor,
    expected: Tensor,
    tolerance: float,
    suspects: Iterator[tuple[str, Callable[[], Tensor]]],
    batch_size: int,
) -> str:
    if not got.isfinite().all():
        return "NaN or infinity: 0/0 for a batch of none, or an operation without a finite second derivative"
    if expected.norm() <= tolerance:
        return "it should be zero here"
    if got.norm() <= tolerance:
        return "it is zero: a detach(), or a graph that ends early"
    for what, answer in suspects:
        if (got - answer()).norm() <= 2 * tolerance:
            return what
    ratio = float(got @ expected / (expected @ expected))
    if (got - ratio * expected).norm() <= 2 * tolerance:
        return f"it is {ratio:.4g} times the right answer: {_factor(ratio, batch_size)}"
    return ""


def _factor(ratio: float, batch_size: int) -> str:
    def near(value: float) -> bool:
        return abs(ratio / value - 1) < 1e-3

    if near(-1):
        return "a sign"
    if batch_size > 1 and near(batch_size):
        return "a sum over the batch where a mean is asked for"
    if batch_size > 1 and near(1 / batch_size):
        return "divided by the batch size twice"
    if near(2) or near(0.5):
        return "a factor of 2: the 1/2 of a quadratic form or of a squared error"
    return "a factor"


def cause_of_precision(dtype: torch.dtype, got: Params, expected: Params, size: float | None = None) -> str:
    """Whether a float64 answer is right to float32 only, relative to `size`, by default that of the right one."""
    size = float(tree.norm(expected)) if size is None else size
    relative = float(tree.norm(tree.map(lambda a, b: a.double() - b.double(), got, expected))) / size if size else 1.0
    if dtype == torch.float64 and relative < 1e-5:
        return f"it is right to {relative:.0e} only: float32 somewhere in a float64 path, or a difference quotient"
    return ""


def _blocks(matrix: Tensor, params: Params) -> Tensor:
    sizes = [t.numel() for t in params.values()]
    return torch.block_diag(*[
        block.split(sizes, 1)[i] for i, block in enumerate(matrix.split(sizes, 0))
    ])  # fmt: skip
