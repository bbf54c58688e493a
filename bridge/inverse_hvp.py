"""AllenNLP's two functions under its interpreter, `get_inverse_hvp_lissa` and `get_hvp`, on `lissa`'s recursion.

Knows AllenNLP's meaning of their arguments; knows nothing of instances or interpreters.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bridge.functional import dense_embeddings
from lissa import Params, checks, hvp_of_graph, solve_lissa, tree
from lissa.kernels import twice_differentiable


def get_inverse_hvp_lissa(
    vs: Sequence[Tensor],
    model: nn.Module,
    used_params: Sequence[Tensor],
    lissa_data_loader: Iterable[Any],
    damping: float,
    num_samples: int,
    scale: float,
) -> Tensor:
    """`c <- v + (1 - damping) c - H_batch c / scale` once a batch from `c = v`; the mean over samples of `c / scale`.

    In the limit it is `(H + damping scale I)^-1 v`: AllenNLP's damping is in units of `1 / scale`. The model stays in
    the mode it is in.

    Args:
        vs: The parts of `v`, shaped like `used_params`.
        model: Called as `model(**batch)`; returns a mapping with a one-element `"loss"`.
        used_params: The model's own parameters, or other leaves of the loss.
        lissa_data_loader: Yields the batches of a run each time it is iterated.
        damping: AllenNLP's.
        num_samples: Runs averaged.
        scale: Divides the Hessian.

    Returns:
        All parts in one vector, shape `(P,)`.

    Raises:
        ValueError: If `vs` and `used_params` do not match, or a number is out of range.
        lissa.SolverError: If the recursion diverges or meets NaN.
    """
    call = "get_inverse_hvp_lissa"
    checks.count(call, "num_samples", num_samples)
    checks.positive(call, "scale", scale)
    checks.non_negative(call, "damping", damping)
    _check_parts(call, used_params, vs, "used_params", "vs")
    names = [str(i) for i in range(len(used_params))]
    v = {name: _dense(t.detach()) for name, t in zip(names, vs, strict=True)}

    def matvec(batch: Any, v: Params) -> Params:
        with torch.enable_grad():
            loss = model(**batch)["loss"]
        return dict(zip(names, hvp_of_graph(loss, used_params, tuple(v.values())), strict=True))

    with dense_embeddings(model), twice_differentiable():
        runs = [
            solve_lissa(matvec, v, lissa_data_loader, damping=damping * scale, scale=scale) for _ in range(num_samples)
        ]
    return torch.stack([tree.flatten(run.value) for run in runs]).mean(0)


def get_hvp(loss: Tensor, params: Sequence[Tensor], vectors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """`H v`, with `H` the Hessian in `params` of a loss whose graph is still there.

    Args:
        loss: One number, of any shape.
        params: Tensors that require grad.
        vectors: The parts of `v`, shaped like `params`.

    Returns:
        The parts of `H v`. Parameters that the loss does not use, or is linear in, get zeros.

    Raises:
        ValueError: If `loss` is not one number, or `vectors` do not match `params`.

    Example:
        >>> A, x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1.0, 2.0], requires_grad=True)
        >>> get_hvp(x @ A @ x / 2, [x], [torch.tensor([10.0, 20.0])])
        (tensor([ 60., 105.]),)
    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"`get_hvp(loss=...)` must be a tensor, got {type(loss).__name__}.")
    if loss.numel() != 1:
        raise ValueError(f"`get_hvp(loss=...)` must be one number, got shape {tuple(loss.shape)}.")
    _check_parts("get_hvp", params, vectors, "params", "vectors")
    return hvp_of_graph(loss.reshape(()), params, [_dense(v) for v in vectors])


def _check_parts(call: str, params: Sequence[Tensor], vectors: Sequence[Tensor], of: str, name: str) -> None:
    shapes, expected = ([tuple(t.shape) for t in tensors] for tensors in (vectors, params))
    if shapes != expected:
        raise ValueError(f"`{call}({name}=...)` must have the shapes of {of}: {expected}, got {shapes}.")


def _dense(t: Tensor) -> Tensor:
    return t.to_dense() if t.is_sparse else t
