"""Which mode of `hvp` gives the right product on which model of the zoo. `python -m tests.support` prints the table.

A cell is right, or an error that says what works; anything else raises `SilentlyWrongError`.
"""

import logging
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lissa import hvp
from lissa.hvp import MODES
from lissa.kernels import twice_differentiable
from tests.oracles import Params, flatten, relative_error, unflatten
from tests.problems import ZOO, Problem, random_vector

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.1}
"""float64: the oracle rounds its gradients by u = 1e-16, over a step of 1e-5: 1e-11 times gradient over product, and
ten roundings. Else about a thousand roundings. It is enough to tell a right product from a wrong one."""

DIFFERENCE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}
"""A difference of gradients is accurate to u^(2/3) (2e-11 and 2e-5) times the third derivative over the product, which
is some hundreds behind a GroupNorm of three numbers."""

RIGHT, APPROXIMATE, LOOP, ERROR = "yes", "approximate", "yes, loops", "error"


class SilentlyWrongError(AssertionError):
    """A mode gave a number, and it is not the product."""


def difference_product(problem: Problem, v: Params) -> Tensor:
    """`H v` from four plain gradients: the central difference with its first error term removed, error O(e^4)."""
    theta, direction = flatten(problem.params), flatten(v)

    def gradient(theta: Tensor) -> Tensor:
        leaves = {k: t.detach().clone().requires_grad_() for k, t in unflatten(theta, problem.params).items()}
        loss = problem.loss_fn(leaves, problem.batch)
        grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        return torch.cat([g.to_dense().reshape(-1) for g in grads])

    def central(e: float) -> Tensor:
        return (gradient(theta + e * direction) - gradient(theta - e * direction)) / (2 * e)

    e = 1e-5 / direction.norm()  # short, so that no kink of ReLU or max pooling lies between
    return (4 * central(e) - central(2 * e)) / 3


def cell(problem: Problem, v: Params, expected: Tensor, mode: str) -> str:
    """What `mode` does with `problem`: the product of one vector and of two by vmap, each right or an error."""
    dtype = next(iter(problem.params.values())).dtype
    try:
        product = flatten(hvp(problem.loss_fn, problem.params, problem.batch, v, mode=mode))
    except NotImplementedError as error:
        explained(error, mode)
        return ERROR
    difference = mode == "finite-difference" or (mode == "auto" and "EmbeddingBag" in problem.name)
    tolerance = (DIFFERENCE_TOLERANCE if difference else TOLERANCE)[dtype]
    compare(problem, mode, product, expected, tolerance)

    vectors = {k: torch.stack([t, -2 * t]) for k, t in v.items()}
    try:
        products = torch.vmap(lambda v: hvp(problem.loss_fn, problem.params, problem.batch, v, mode=mode))(vectors)
    except NotImplementedError as error:
        explained(error, mode)
        return "yes, no vmap"
    for i, factor in enumerate((1, -2)):
        compare(problem, f"vmap {mode}", flatten({k: t[i] for k, t in products.items()}), factor * expected, tolerance)
    if difference:
        return APPROXIMATE
    return LOOP if mode == "double-backward" else RIGHT


def compare(problem: Problem, mode: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raises if the product is wrong."""
    error = relative_error(got.double(), expected)
    if not error <= tolerance:
        raise SilentlyWrongError(f"{mode} on {problem.name}: relative error {error:.1e} > {tolerance:.1e}")


def explained(error: Exception, mode: str) -> None:
    """Raises unless the message names the call, and a mode or a switch that works."""
    message = str(error)
    if not (message.startswith("`hvp(") and "failed: " in message and "Use mode=" in message):
        raise SilentlyWrongError(f"{mode} failed without a remedy: {message}") from error


def row(name: str, dtype: torch.dtype) -> list[str]:
    """The cells of one model, one for each mode."""
    problem = ZOO[name](dtype=dtype)
    v = random_vector(problem)
    exact = ZOO[name](dtype=torch.float64)._replace(params=as_double(problem.params), batch=as_double(problem.batch))
    with twice_differentiable():
        expected = difference_product(exact, as_double(v))
    return [cell(problem, v, expected, mode) for mode in MODES]


def as_double(tensors: Any) -> Any:
    """The batch or parameter dict with its floating-point tensors in float64."""
    return pytree.tree_map(lambda t: t.double() if t.is_floating_point() else t, tensors)


def support_matrix(dtype: torch.dtype = torch.float32) -> list[list[str]]:
    """Rows of cells, a header first."""
    return [["model", *MODES], *([name, *row(name, dtype)] for name in ZOO)]


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [" | ".join(cells) for cells in rows]
    return "\n".join(f"| {line} |" for line in [lines[0], " | ".join(["---"] * len(rows[0])), *lines[1:]])


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    print(markdown(support_matrix()))
