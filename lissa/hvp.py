"""Products of curvature matrices with vectors: Hessian (one function per strategy, one signature) and Gauss-Newton.

Pure functions on `torch.func` over parameter dicts. Knows losses and derivatives; knows nothing of solvers, of
`nn.Module` or of how batches are drawn. Costs are stated in gradients: one is a forward and a backward pass.
"""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp

from lissa import checks, tree
from lissa.kernels import twice_differentiable
from lissa.types import Batch, LossFn, OutputFn, OutputLossFn, Params

logger = logging.getLogger(__name__)


def hvp(loss_fn: LossFn, params: Params, batch: Batch, v: Params, *, mode: str = "auto") -> Params:
    """`H v`, with `H` the Hessian of `loss_fn(., batch)` at `params`; `H` itself is never formed.

    All modes compute the same product; they differ in cost and in what they can differentiate:

    - `"forward-over-reverse"`: `d/de grad L(params + e v)` by `jvp(grad(L))`. Needs forward-mode derivatives.
    - `"reverse-over-reverse"`: `d/dparams <grad L(params), v>` by `vjp(grad(L))`. Composes with every transform.
    - `"reverse-over-forward"`: `d/dparams <grad L(params), v>` by `grad(jvp(L))`. Needs forward-mode derivatives.
    - `"double-backward"`: the same by `torch.autograd.grad` twice on leaf copies. Runs where `torch.func` cannot
      (packed sequences), but not itself under `vmap` or `jvp`.
    - `"finite-difference"`: `(grad L(params + e v) - grad L(params - e v)) / 2e`. Approximate: relative error about
      1e-10 in float64 and 1e-5 in float32. Needs first derivatives only.
    - `"auto"`: the first of reverse-over-reverse, double-backward, forward-over-reverse and finite-difference that
      runs, with attention kernels switched, inside the call, to ones that can be differentiated twice.

    Args:
        loss_fn: `loss_fn(params, batch) -> ()`, the mean loss. It must be deterministic.
        params: Where the Hessian is taken.
        batch: Passed to `loss_fn` as it is.
        v: The vector, with the keys, shapes, dtypes and devices of `params`.
        mode: The strategy, see above.

    Returns:
        `H v`, shaped like `params`, in units of loss / params^2 times the units of `v`. Parameters that the loss
        does not use, or uses linearly, get zeros.

    Raises:
        ValueError: If `mode` is unknown, `v` does not match `params`, or the loss is not a scalar.
        TypeError: If `params` or `v` is not a dict of floating-point tensors of the same dtypes.

    Example:
        >>> def loss_fn(params, batch):
        ...     return (params["w"] ** 3 * batch).mean()
        >>> hvp(loss_fn, {"w": torch.tensor([1.0, 2.0])}, torch.ones(2), {"w": torch.tensor([1.0, 10.0])})
        {'w': tensor([ 3., 60.])}

    Source: B. A. Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6 (1994), eq. 3.
    """
    checks.one_of("hvp", "mode", mode, tuple(MODES))
    return MODES[mode](loss_fn, params, batch, v)


def hvp_forward_over_reverse(loss_fn: LossFn, params: Params, batch: Batch, v: Params) -> Params:
    """`H v = d/de grad L(params + e v) at e = 0`: the directional derivative of the gradient. See `hvp`."""
    loss = _loss_of_params(loss_fn, params, batch, v)
    return jvp(grad(loss), (params,), (v,))[1]


def hvp_reverse_over_reverse(loss_fn: LossFn, params: Params, batch: Batch, v: Params) -> Params:
    """`H v = d/dparams <grad L(params), v>`: the gradient pulled back, as `H` is symmetric. See `hvp`."""
    loss = _loss_of_params(loss_fn, params, batch, v)
    pullback = vjp(grad(loss), params)[1]
    return pullback(v)[0]


def hvp_reverse_over_forward(loss_fn: LossFn, params: Params, batch: Batch, v: Params) -> Params:
    """`H v = d/dparams (d/de L(params + e v))`: the gradient of the directional derivative. See `hvp`."""
    loss = _loss_of_params(loss_fn, params, batch, v)
    return grad(lambda p: jvp(loss, (p,), (v,))[1])(params)


def hvp_double_backward(loss_fn: LossFn, params: Params, batch: Batch, v: Params) -> Params:
    """`H v = d/dparams <grad L(params), v>` by `torch.autograd.grad` twice on leaf copies. See `hvp`."""
    loss = _loss_of_params(loss_fn, params, batch, v)
    leaves = tree.map(lambda p: p.detach().requires_grad_(), params)
    with torch.enable_grad():
        product = hvp_of_graph(loss(leaves), tuple(leaves.values()), tuple(v[k] for k in leaves))
    return dict(zip(leaves, product, strict=True))


def hvp_finite_difference(loss_fn: LossFn, params: Params, batch: Batch, v: Params) -> Params:
    """`H v ~ (grad L(params + e v) - grad L(params - e v)) / 2e` with `e = u^(1/3) (1 + |params|) / |v|`. See `hvp`.

    With `u` the unit roundoff, truncation `e^2 |v|^3 |L''''| / 6` and cancellation `u |grad L| / e` balance at about
    `u^(2/3)`, the best a central difference can do (Nocedal & Wright, Numerical Optimization, section 8.1).
    """
    loss = _loss_of_params(loss_fn, params, batch, v)
    unit_roundoff = max(torch.finfo(p.dtype).eps for p in params.values()) / 2
    length = tree.norm(v)
    length = torch.where(length == 0, torch.ones_like(length), length)
    e = unit_roundoff ** (1 / 3) * (1 + tree.norm(params)) / length
    ahead, behind = (grad(loss)(tree.add_scaled(params, sign * e, v)) for sign in (1, -1))
    return tree.scale(1 / (2 * e), tree.sub(ahead, behind))


def hvp_auto(loss_fn: LossFn, params: Params, batch: Batch, v: Params) -> Params:
    """`H v` by the first strategy that runs, on kernels that can be differentiated twice. See `hvp`."""
    if torch.compiler.is_compiling():  # a compiler traces one strategy; it cannot trace a retry
        return hvp_reverse_over_reverse(loss_fn, params, batch, v)
    errors: list[Exception] = []
    with twice_differentiable():
        for strategy in _AUTO_ORDER:
            try:
                product = strategy(loss_fn, params, batch, v)
            except (RuntimeError, NotImplementedError) as error:
                errors.append(error)
                continue
            if errors:
                logger.warning("hvp(mode='auto') fell back to %s, because: %s", strategy.__name__, errors[0])
            return product
    raise errors[0]


_AUTO_ORDER = (hvp_reverse_over_reverse, hvp_double_backward, hvp_forward_over_reverse, hvp_finite_difference)

MODES = {
    "auto": hvp_auto,
    "forward-over-reverse": hvp_forward_over_reverse,
    "reverse-over-reverse": hvp_reverse_over_reverse,
    "reverse-over-forward": hvp_reverse_over_forward,
    "double-backward": hvp_double_backward,
    "finite-difference": hvp_finite_difference,
}
"""The strategies by name. Each has the signature `(loss_fn, params, batch, v) -> H v`."""


def hvp_of_graph(loss: Tensor, params: Sequence[Tensor], vectors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """`H v` of a loss that is already computed, from the autograd graph that hangs on it.

    Args:
        loss: One number (any shape with one entry) whose graph is still there.
        params: Tensors that require grad.
        vectors: The parts of `v`, shaped like `params`.

    Returns:
        The parts of `H v`. Parameters that the loss does not use, or uses linearly, get zeros.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hvp_of_graph((x**3).sum(), [x], [torch.tensor([1.0, 10.0])])
        (tensor([  6., 120.]),)
    """
    zeros = tuple(torch.zeros_like(p) for p in params)
    if not loss.requires_grad:
        return zeros
    grads = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
    curved = [(g, v) for g, v in zip(grads, vectors, strict=True) if g.requires_grad]
    if not curved:
        return zeros
    outputs, cotangents = zip(*curved, strict=True)
    return torch.autograd.grad(outputs, params, cotangents, materialize_grads=True)


def ggnvp(output_fn: OutputFn, output_loss_fn: OutputLossFn, params: Params, batch: Batch, v: Params) -> Params:
    """`G v = J^T H_out J v`: the generalised Gauss-Newton matrix, for a loss `output_loss_fn(output_fn(params))`.

    `J` is the Jacobian of the outputs in the parameters and `H_out` the Hessian of the loss in the outputs. `G` is
    positive semidefinite where the loss is convex in the outputs, and equals the Hessian where the outputs are linear
    in the parameters. Cost: about two gradients.

    Args:
        output_fn: `output_fn(params, batch) -> outputs`, one tensor of any shape.
        output_loss_fn: `output_loss_fn(outputs, batch) -> ()`, the mean loss.
        params: Where the matrix is taken.
        batch: Passed to both functions as it is.
        v: The vector, with the keys, shapes, dtypes and devices of `params`.

    Returns:
        `G v`, shaped like `params`.

    Raises:
        ValueError: If `v` does not match `params`, or the loss is not a scalar.
        TypeError: If `params` or `v` is not a dict of floating-point tensors of the same dtypes.

    Example:
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> def outputs(params, x):
        ...     return x @ params["w"]
        >>> def squared_error(outputs, x):
        ...     return outputs.square().mean()
        >>> ggnvp(outputs, squared_error, {"w": torch.zeros(2)}, x, {"w": torch.tensor([1.0, 0.0])})
        {'w': tensor([2., 4.])}

    Source: N. N. Schraudolph, Fast curvature matrix-vector products, Neural Computation 14 (2002), section 3.
    """
    checks.params("ggnvp", params)
    checks.vector("ggnvp", params, v)
    output_loss = checks.scalar_loss("ggnvp", output_loss_fn, "output_loss_fn")

    def model(params: Params) -> Tensor:
        return output_fn(params, batch)

    J_v = jvp(model, (params,), (v,))[1]
    outputs, J_transposed = vjp(model, params)[:2]
    H_J_v = jvp(grad(lambda z: output_loss(z, batch)), (outputs,), (J_v,))[1]
    return J_transposed(H_J_v)[0]


def _loss_of_params(loss_fn: LossFn, params: Params, batch: Batch, v: Params) -> Callable[[Params], Tensor]:
    """`params -> loss_fn(params, batch)`, after the checks that all strategies share."""
    checks.params("hvp", params)
    checks.vector("hvp", params, v)
    scalar_loss = checks.scalar_loss("hvp", loss_fn)
    return lambda p: scalar_loss(p, batch)
