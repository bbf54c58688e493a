"""Products of curvature matrices other than the Hessian: Gauss-Newton and the empirical Fisher matrix.

Pure functions on `torch.func` over parameter dicts, with the signature of `hvp`. Knows losses and derivatives; knows
nothing of solvers. Costs are stated in gradients: one is a forward and a backward pass.
"""

from torch import Tensor
from torch.func import grad, jvp, vjp

from lissa import checks
from lissa.types import Batch, OutputFn, OutputLossFn, Params


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
    checks.params("ggnvp", params)
    checks.vector("ggnvp", params, v)
    v = {key: v[key] for key in params}
    output_loss = checks.scalar_loss("ggnvp", output_loss_fn, "output_loss_fn")

    def model(params: Params) -> Tensor:
        return output_fn(params, batch)

    J_v = jvp(model, (params,), (v,))[1]
    outputs, J_transposed = vjp(model, params)[:2]
    H_J_v = jvp(grad(lambda z: output_loss(z, batch)), (outputs,), (J_v,))[1]
    return J_transposed(H_J_v)[0]
