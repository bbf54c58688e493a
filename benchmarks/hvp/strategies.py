"""Every way to multiply by a Hessian that the benchmark compares. To add one, write a function and an entry.

A strategy takes a problem and vectors (one, or K stacked) and returns a function that computes the product or products,
as a list of tensors in the order of the parameters. It may raise `NotImplementedError` to leave a row out.
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lissa import compiled, hvp, traced
from lissa.kernels import twice_differentiable
from tests.problems import Params, Problem

Run = Callable[[], list[Tensor]]
Strategy = Callable[[Problem, Params, int], Run]


def gradient(problem: Problem, vectors: Params, count: int) -> Run:
    """The unit of cost: one plain gradient, whatever the number of vectors."""

    def run() -> list[Tensor]:
        leaves = [p.detach().requires_grad_() for p in problem.params.values()]
        loss = problem.loss_fn(dict(zip(problem.params, leaves, strict=True)), problem.batch)
        return list(torch.autograd.grad(loss, leaves, materialize_grads=True))

    return run


def each(one: Callable[[Params], list[Tensor]], vectors: Params, count: int) -> Run:
    """One vector after the other, stacked at the end, as code without `vmap` does."""
    if count == 1:
        return lambda: one(vectors)

    def run() -> list[Tensor]:
        products = [one({k: t[i] for k, t in vectors.items()}) for i in range(count)]
        return [torch.stack(parts) for parts in zip(*products, strict=True)]

    return run


def plain_double_backward(problem: Problem, vectors: Params, count: int) -> Run:
    """`torch.autograd.grad` twice, as AllenNLP does and people write by hand; dense, as solvers need it."""

    def one(v: Params) -> list[Tensor]:
        leaves = {k: p.detach().requires_grad_() for k, p in problem.params.items()}
        parameters = list(leaves.values())
        loss = problem.loss_fn(leaves, problem.batch)
        grads = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
        grads = [g.to_dense() if g.is_sparse else g for g in grads]
        curved = [(g, v[k]) for k, g in zip(leaves, grads, strict=True) if g.requires_grad]
        outputs, cotangents = zip(*curved, strict=True)
        products = torch.autograd.grad(outputs, parameters, cotangents, materialize_grads=True)
        return [t.to_dense() if t.is_sparse else t for t in products]

    return with_kernels(each(one, vectors, count))


def autograd_functional(name: str) -> Strategy:
    """`torch.autograd.functional.hvp` or `vhp`."""
    product = getattr(torch.autograd.functional, name)

    def strategy(problem: Problem, vectors: Params, count: int) -> Run:
        def loss(*parts: Tensor) -> Tensor:
            return problem.loss_fn(dict(zip(problem.params, parts, strict=True)), problem.batch)

        def one(v: Params) -> list[Tensor]:
            return list(product(loss, tuple(problem.params.values()), tuple(v.values()))[1])

        return with_kernels(each(one, vectors, count))

    return strategy


class AsModule(nn.Module):
    """A problem's outputs as the module that curvlinops wants."""

    def __init__(self, problem: Problem):
        super().__init__()
        self.keys = list(problem.params)
        self.weights = nn.ParameterList(nn.Parameter(p.detach().clone()) for p in problem.params.values())
        self.output_fn = problem.output_fn

    def forward(self, inputs: Any) -> Tensor:
        inputs = tuple(inputs.values()) if isinstance(inputs, dict) else (inputs,)
        return self.output_fn(dict(zip(self.keys, self.weights, strict=True)), (*inputs, None))


class MeanLoss(nn.Module):
    """A problem's mean loss of its outputs."""

    reduction = "mean"

    def __init__(self, problem: Problem):
        super().__init__()
        self.output_loss_fn = problem.output_loss_fn

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.output_loss_fn(outputs, (targets,))


def curvlinops(problem: Problem, vectors: Params, count: int) -> Run:
    """curvlinops' `HessianLinearOperator`; K vectors are the columns of one matrix, which it vmaps over."""
    from curvlinops import HessianLinearOperator  # an extra, see `available`

    module = AsModule(problem)
    *inputs, targets = problem.batch
    X = inputs[0] if len(inputs) == 1 else {str(i): t for i, t in enumerate(inputs)}
    H = HessianLinearOperator(
        module,
        MeanLoss(problem),
        list(module.weights),
        [(X, targets)],
        check_deterministic=False,
        num_data=len(targets),
        batch_size_fn=lambda _: len(targets),
    )
    columns = [t if count == 1 else t.movedim(0, -1) for t in vectors.values()]

    def run() -> list[Tensor]:
        products = H @ columns
        return list(products) if count == 1 else [t.movedim(-1, 0) for t in products]

    return with_kernels(run)


def with_kernels(run: Run) -> Run:
    """`run` on kernels that can be differentiated twice, as the caller of plain autograd would have to select."""

    def switched() -> list[Tensor]:
        with twice_differentiable():
            return run()

    return switched


def lissa(mode: str, wrap: Callable[[Any], Any] = lambda fn: fn) -> Strategy:
    """`hvp` in one of its modes; K vectors by `vmap`; as it is, traced or compiled."""

    def strategy(problem: Problem, vectors: Params, count: int) -> Run:
        matvec = partial(hvp, problem.loss_fn, problem.params, mode=mode)
        product = wrap(matvec if count == 1 else torch.vmap(matvec, in_dims=(None, 0)))
        return lambda: list(product(problem.batch, vectors).values())

    return strategy


PLAIN = "plain double backward"

STRATEGIES: dict[str, Strategy] = {
    PLAIN: plain_double_backward,
    "autograd.functional.hvp": autograd_functional("hvp"),
    "autograd.functional.vhp": autograd_functional("vhp"),
    "curvlinops": curvlinops,
    "double-backward": lissa("double-backward"),
    "reverse-over-reverse": lissa("reverse-over-reverse"),
    "forward-over-reverse": lissa("forward-over-reverse"),
    "reverse-over-forward": lissa("reverse-over-forward"),
    "auto": lissa("auto"),
    "auto, traced": lissa("auto", traced),
    "auto, compiled": lissa("auto", compiled),
    "forward-over-reverse, compiled": lissa("forward-over-reverse", compiled),
}
"""The strategies by the name they have in the table."""


def available() -> dict[str, Strategy]:
    """The strategies whose library is installed."""
    missing = {"curvlinops"} if importlib.util.find_spec("curvlinops") is None else set()
    return {name: strategy for name, strategy in STRATEGIES.items() if name not in missing}
