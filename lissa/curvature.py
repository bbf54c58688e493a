"""Products of curvature matrices other than the Hessian: Gauss-Newton and the empirical Fisher matrix.

Pure functions on `torch.func` over parameter dicts, with the signature of `hvp`. Knows losses and derivatives; knows
nothing of solvers. Costs are stated in gradients: one is a forward and a backward pass.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp

from lissa import checks
from lissa.kernels import twice_differentiable
from lissa.types import Batch, ExampleLossFn, LossFn, Matvec, OutputFn, OutputLossFn, Params


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
        >>> import torch
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> def outputs(params, x):
        ...     return x @ params["w"]
        >>> def squared_error(outputs, x):
        ...     return outputs.square().mean()
        >>> ggnvp(outputs, squared_error, {"w": torch.zeros(2)}, x, {"w": torch.tensor([1.0, 0.0])})
        {'w': tensor([2., 4.])}

    Source: N. N. Schraudolph, Fast curvature matrix-vector products, Neural Computation 14 (2002), section 3.
    """
    checks.point("ggnvp", params)
    checks.vector("ggnvp", params, v)
    v = {key: v[key] for key in params}
    output_loss = checks.scalar_loss("ggnvp", output_loss_fn, "output_loss_fn")

    def model(params: Params) -> Tensor:
        return output_fn(params, batch)

    with _kernels():
        J_v = _pushforward(model, params, v)
        outputs, J_transposed = vjp(model, params)[:2]
        pullback = vjp(grad(lambda z: output_loss(z, batch)), outputs)[1]  # H_out is symmetric
        H_J_v = pullback(J_v)[0]
        return J_transposed(H_J_v)[0]


def fvp(example_loss_fn: ExampleLossFn, params: Params, batch: Batch, v: Params) -> Params:
    """`F v = 1/B sum_i grad_i (grad_i . v)`: the empirical Fisher matrix, the second moment of the examples' gradients.

    Positive semidefinite, and not the Hessian: at a good fit gradients are small where the curvature is not. Cost:
    about two gradients; no gradient is stored per example.

    Args:
        example_loss_fn: `example_loss_fn(params, batch) -> (B,)`, the loss of each example.
        params: Where the gradients are taken.
        batch: Passed to `example_loss_fn` as it is.
        v: The vector, with the keys, shapes, dtypes and devices of `params`.

    Returns:
        `F v`, shaped like `params`, in units of loss^2 / params^2 times the units of `v`.

    Raises:
        ValueError: If `v` does not match `params`, or the losses are not of shape `(B,)`.
        TypeError: If `params` or `v` is not a dict of floating-point tensors of the same dtypes.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> fvp(lambda params, x: x @ params["w"], {"w": torch.zeros(2)}, x, {"w": torch.ones(2)})
        {'w': tensor([0.5000, 2.0000])}

    Source: J. Martens, New insights and perspectives on the natural gradient method, JMLR 21 (2020), section 11.
    """
    checks.point("fvp", params)
    checks.vector("fvp", params, v)
    v = {key: v[key] for key in params}

    def losses(params: Params) -> Tensor:
        losses = example_loss_fn(params, batch)
        if losses.ndim != 1:
            raise ValueError(
                "`fvp(example_loss_fn=...)` must return one loss per example, shape (B,), got shape "
                f"{tuple(losses.shape)}. Use reduction='none'."
            )
        return losses

    with _kernels():
        slopes = _pushforward(losses, params, v)
        pullback = vjp(losses, params)[1]
        return pullback(slopes / len(slopes))[0]


def linearised_hvp(loss_fn: LossFn, params: Params, batch: Batch) -> Matvec:
    """`v -> H v` at one batch, with the gradient's graph built once: for many products, as CG needs.

    Each product costs a backward pass through that graph, which stays in memory with the returned function.

    Args:
        loss_fn: `loss_fn(params, batch) -> ()`, the mean loss.
        params: Where the Hessian is taken.
        batch: Passed to `loss_fn` as it is.

    Returns:
        A function of `v` that may be vmapped.

    Raises:
        ValueError: If the loss is not a scalar.
        TypeError: If `params` is not a dict of floating-point tensors.

    Example:
        >>> import torch
        >>> matvec = linearised_hvp(lambda p, x: (p["w"] ** 3 * x).sum(), {"w": torch.ones(2)}, torch.ones(2))
        >>> matvec({"w": torch.tensor([1.0, 2.0])})
        {'w': tensor([ 6., 12.])}
    """
    checks.point("linearised_hvp", params)
    loss = checks.deterministic("linearised_hvp", checks.scalar_loss("linearised_hvp", loss_fn), params)
    with _kernels():
        pullback = vjp(lambda p: grad(loss)(p, batch), params)[1]

    def matvec(v: Params) -> Params:
        checks.vector("linearised_hvp", params, v)
        return pullback({key: v[key] for key in params})[0]

    return matvec


@contextmanager
def _kernels() -> Iterator[None]:
    """`twice_differentiable`, which a compiler cannot trace."""
    if torch.compiler.is_compiling():
        yield
        return
    with twice_differentiable():
        yield


def _pushforward(fn: Callable[[Params], Tensor], params: Params, v: Params) -> Tensor:
    """`J v`, in forward mode, or, where an operation has none, as the pullback of the pullback, which is linear."""
    try:
        return jvp(fn, (params,), (v,))[1]
    except NotImplementedError:
        outputs, J_transposed = vjp(fn, params)[:2]
        J = vjp(lambda u: J_transposed(u)[0], torch.zeros_like(outputs))[1]
        return J(v)[0]
