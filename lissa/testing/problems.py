"""Small random problems for the laws of products and scores: an architecture, a loss, parameters, a batch, two vectors.

Plain torch: a problem is rebuilt from the call that its `repr` prints. Knows nothing of Hypothesis or of laws. All
entries are multiples of 1/16 in [-1, 1], so that they are the same numbers in every dtype and in print, and so that no
activation saturates.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lissa import checks
from lissa.types import ExampleLossFn, LossFn, OutputFn, OutputLossFn, Params

MODELS = ("linear", "scalar", "mlp", "tied", "lookup", "residual")
"""Simplest first: the order in which a failing problem shrinks."""

LOSSES = ("squared", "logistic", "cross-entropy", "poisson")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": torch.nn.functional.softplus,
}
CURVATURES = ("hessian", "gauss-newton", "fisher")
ACCURACIES = ("autodiff", "difference")


class Problem(NamedTuple):
    """One loss in every form, where it is taken, and two vectors. `repr` is the code that builds it.

    Attributes:
        loss_fn: `loss_fn(params, batch) -> ()`: the mean of the example losses, 0 for a batch of none.
        example_loss_fn: `example_loss_fn(params, batch) -> (B,)`.
        output_fn: `output_fn(params, batch) -> outputs`.
        output_loss_fn: `output_loss_fn(outputs, batch) -> ()`, so that `loss_fn` is this of `output_fn`.
        params: Parameters.
        batch: A dict of tensors `"x"`, `"y"` and, for padded sequences, `"mask"`, that share their first dimension B.
        u: A vector, shaped like `params`.
        v: Another.
        curvature: Which matrix a product is to be taken with: `"hessian"`, `"gauss-newton"` or `"fisher"`.
        accuracy: What the product claims: `"autodiff"`, exact up to rounding, or `"difference"`, a central difference.
        recipe: The arguments of `make_problem`; keys that start with `_` mark what a law has changed.
    """

    loss_fn: LossFn
    example_loss_fn: ExampleLossFn
    output_fn: OutputFn
    output_loss_fn: OutputLossFn
    params: Params
    batch: dict[str, Tensor]
    u: Params
    v: Params
    curvature: str
    accuracy: str
    recipe: dict[str, Any]

    def __repr__(self) -> str:
        return f"make_problem({', '.join(f'{k}={v!r}' for k, v in self.recipe.items() if not k.startswith('_'))})"

    @property
    def maker(self) -> "Callable[[], Problem]":
        """Builds it anew, tensors and all."""
        return partial(make_problem, **self.recipe)

    @property
    def functions(self) -> tuple[Callable[..., Tensor], ...]:
        """What a product of this curvature is called with, before `params, batch, v`."""
        return {
            "hessian": (self.loss_fn,),
            "gauss-newton": (self.output_fn, self.output_loss_fn),
            "fisher": (self.example_loss_fn,),
        }[self.curvature]

    @property
    def batch_size(self) -> int:
        """Number of examples, B."""
        return len(self.batch["y"])

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters and float inputs."""
        return next(iter(self.params.values())).dtype

    def rows(self, index: Any) -> dict[str, Tensor]:
        """The examples `index` of the batch."""
        return {k: t[index] for k, t in self.batch.items()}

    def in_float64(self) -> "Problem":
        """The same problem, entry for entry, in float64."""

        def double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {k: t.double() if t.is_floating_point() else t for k, t in tensors.items()}

        if self.dtype == torch.float64:
            return self
        return self._replace(params=double(self.params), batch=double(self.batch), u=double(self.u), v=double(self.v))


def make_problem(
    *,
    model: str = "linear",
    loss: str = "squared",
    features: int = 1,
    outputs: int = 1,
    width: int = 1,
    activation: str = "tanh",
    batch_size: int = 1,
    positions: int = 0,
    unused: bool = False,
    linear_term: bool = False,
    dtype: torch.dtype = torch.float64,
    curvature: str = "hessian",
    accuracy: str = "autodiff",
    seed: int = 0,
) -> Problem:
    """The problem with these sizes, its entries drawn from `seed` alone.

    Args:
        model: `"linear"`: `x W + b`. `"scalar"`: `act(w x)` with one number `w`. `"mlp"`: one hidden layer. `"tied"`:
            `act(x W) W^T`. `"lookup"`: rows of a table, then a layer; x holds integers. `"residual"`: `h + act(h W)`.
        loss: `"squared"`, `"logistic"`, `"poisson"` (each summed over the outputs) or `"cross-entropy"`: all convex in
            the outputs.
        features: Width of x, or the number of rows of the table.
        outputs: Number of outputs or classes; `"scalar"` and `"tied"` have as many as features.
        width: Hidden width.
        activation: `"tanh"`, `"sigmoid"` or `"softplus"`.
        batch_size: Examples; may be 0.
        positions: If > 0, each example is a sequence of so many positions, some masked, and its loss their mean.
        unused: Adds a parameter that the loss does not use.
        linear_term: Adds a parameter that the loss is linear in.
        dtype: Of parameters and inputs.
        curvature: Which matrix is asked for: one of `CURVATURES`.
        accuracy: One of `ACCURACIES`.
        seed: Where the entries come from.

    Returns:
        The problem.

    Example:
        >>> problem = make_problem(model="mlp", loss="cross-entropy", features=2, outputs=3, width=2, batch_size=4)
        >>> {k: tuple(p.shape) for k, p in problem.params.items()}
        {'w1': (2, 2), 'b1': (2,), 'w2': (2, 3), 'b2': (3,)}
        >>> problem.example_loss_fn(problem.params, problem.batch).shape
        torch.Size([4])
    """
    recipe = {k: v for k, v in locals().items() if k == "seed" or v != _DEFAULTS.get(k)}
    for name, value, choices in (
        ("model", model, MODELS),
        ("loss", loss, LOSSES),
        ("activation", activation, tuple(ACTIVATIONS)),
        ("curvature", curvature, CURVATURES),
        ("accuracy", accuracy, ACCURACIES),
    ):
        checks.one_of("make_problem", name, value, choices)
    g = torch.Generator().manual_seed(seed)
    if model in ("scalar", "tied"):
        outputs = features
    act = ACTIVATIONS[activation]

    params = {k: _entries(g, s, dtype) for k, s in _shapes(model, features, outputs, width).items()}
    if linear_term:
        params["slope"] = _entries(g, (), dtype)
    if unused:
        params["unused"] = _entries(g, (2,), dtype)

    lead = (batch_size, positions) if positions else (batch_size,)
    x = torch.randint(features, lead, generator=g) if model == "lookup" else _entries(g, (*lead, features), dtype)
    if loss == "cross-entropy":
        y = torch.randint(outputs, lead, generator=g)
    elif loss == "squared":
        y = _entries(g, (*lead, outputs), dtype)
    else:
        y = torch.randint(2, (*lead, outputs), generator=g).to(dtype)
    batch = {"x": x, "y": y}
    if positions:
        batch["mask"] = torch.randint(2, lead, generator=g).to(dtype)

    def line(params: Params, x: Tensor) -> Tensor:
        size = x if model == "lookup" else x[..., 0]
        return params["slope"] * size.to(params["slope"].dtype)

    def output_fn(params: Params, batch: Any) -> Tensor:
        out = _forward(model, params, batch["x"], act)
        if linear_term:  # one more output, which the loss adds as it is
            out = torch.cat([out, line(params, batch["x"]).unsqueeze(-1)], -1)
        return out

    def mean_over_positions(losses: Tensor, batch: Any) -> Tensor:
        if not positions:
            return losses
        return (batch["mask"] * losses).sum(1) / batch["mask"].sum(1).clamp(min=1)

    def example_loss_fn(params: Params, batch: Any) -> Tensor:
        losses = _losses(loss, _forward(model, params, batch["x"], act), batch["y"])
        if linear_term:  # not through the outputs: so that the slope's gradient is a constant to autograd too
            losses = losses + line(params, batch["x"])
        return mean_over_positions(losses, batch)

    def loss_fn(params: Params, batch: Any) -> Tensor:
        if linear_term:
            return example_loss_fn(params, batch).sum() / max(len(batch["y"]), 1)
        return output_loss_fn(output_fn(params, batch), batch)

    def output_loss_fn(out: Tensor, batch: Any) -> Tensor:
        losses = (
            _losses(loss, out[..., :-1], batch["y"]) + out[..., -1] if linear_term else _losses(loss, out, batch["y"])
        )
        return mean_over_positions(losses, batch).sum() / max(len(batch["y"]), 1)

    u, v = ({k: _entries(g, p.shape, dtype) for k, p in params.items()} for _ in range(2))
    return Problem(
        loss_fn, example_loss_fn, output_fn, output_loss_fn, params, batch, u, v, curvature, accuracy, recipe
    )


_DEFAULTS = make_problem.__kwdefaults__ or {}


def _shapes(model: str, features: int, outputs: int, width: int) -> dict[str, tuple[int, ...]]:
    return {
        "linear": {"w": (features, outputs), "b": (outputs,)},
        "scalar": {"w": ()},
        "mlp": {"w1": (features, width), "b1": (width,), "w2": (width, outputs), "b2": (outputs,)},
        "tied": {"w": (features, width)},
        "lookup": {"table": (features, width), "w": (width, outputs)},
        "residual": {"w1": (features, width), "w2": (width, width), "b2": (width,), "w3": (width, outputs)},
    }[model]


def _forward(model: str, params: Params, x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    match model:
        case "linear":
            return x @ params["w"] + params["b"]
        case "scalar":
            return act(params["w"] * x)
        case "mlp":
            return act(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]
        case "tied":
            return act(x @ params["w"]) @ params["w"].mT
        case "lookup":
            return act(params["table"][x]) @ params["w"]
        case _:
            h = act(x @ params["w1"])
            return (h + act(h @ params["w2"] + params["b2"])) @ params["w3"]


def _losses(loss: str, out: Tensor, y: Tensor) -> Tensor:
    match loss:
        case "squared":
            return (out - y).square().sum(-1) / 2
        case "logistic":
            return (torch.nn.functional.softplus(out) - y * out).sum(-1)
        case "poisson":
            return (out.exp() - y * out).sum(-1)
        case _:
            return out.logsumexp(-1) - out.gather(-1, y.unsqueeze(-1)).squeeze(-1)


def _entries(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Multiples of 1/16 in [-1, 1]."""
    return (torch.randint(-16, 17, shape, generator=generator) / 16).to(dtype)
