"""Influence of every training example on every other at once: Gauss-Newton, solved in the space of outputs.

With the Jacobian `J` of all n outputs of the training data (each of m numbers) and the Hessians `D` of their losses,
`G = J^T D J / n` is the Gauss-Newton matrix, P by P. Its inverse is known from the n m by n m matrix `K = J J^T` alone:

    J_a (G + damping I)^-1 J_b^T = (K_ab - K_a L (n damping I + L^T K L)^-1 L^T K_b) / damping,    D = L L^T.

One `K`, about n^2 m^2 P products, serves all right-hand sides, where a solver needs several passes over the data for
each. Knows outputs and derivatives; knows nothing of solvers.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, jacrev, vjp
from torch.utils import _pytree as pytree

from lissa import checks, sampling, tree
from lissa.kernels import twice_differentiable
from lissa.tuning import MEAN_FRACTION
from lissa.types import Batch, OutputFn, OutputLossFn, Params

MOST_ROWS = 2**29
"""Most numbers in the rows of `J` that are kept while the others pass by (2 GiB in float32)."""


class DualInfluence(NamedTuple):
    """Gauss-Newton influence of n training examples on T test losses. All but the Gram matrix is in float64.

    Attributes:
        scores: `+ grad_i . (G + damping I)^-1 grad_t`, shape `(T, n)`; positive = helpful.
        leave_one_out: `+ grad_i . (G - G_i / n + damping I)^-1 grad_t`, shape `(T, n)`: one Newton step of retraining
            without example i, whose own part of G is `G_i / n`. `scores` leave it in: see `leave_one_out_scores`.
        self_influence: `+ grad_i . (G + damping I)^-1 grad_i` of the training examples, shape `(n,)`.
        relative_residual: `|grad_t - (G + damping I) x_t| / |grad_t|` of the solution behind each row, shape `(T,)`,
            as the Gram matrix has it: what the factorisation lost. Roundings of the Gram matrix itself come on top:
            about `eps largest / damping` with the largest eigenvalue of G.
        cosine: Of the angle between `x_t` and `grad_t`, shape `(T,)`; 1 if G plays no part.
        trace: Of G, shape `()`: `trace / P` is the mean eigenvalue.
        damping: What was solved with.
    """

    scores: Tensor
    leave_one_out: Tensor
    self_influence: Tensor
    relative_residual: Tensor
    cosine: Tensor
    trace: Tensor
    damping: float


def dual_influence(
    output_fn: OutputFn,
    output_loss_fn: OutputLossFn,
    params: Params,
    train: Sequence[Batch],
    test: Sequence[Batch] | None = None,
    *,
    damping: float | None,
    gram: Tensor | None = None,
    most_rows: int = MOST_ROWS,
) -> DualInfluence:
    """`score_ti = + grad_i . (G + damping I)^-1 grad_t` for all i and t, with the Gauss-Newton matrix G of `train`.

    Self-influence of the training examples comes with it. Cost: each example's Jacobian once for each `most_rows`
    numbers of `J`, one Gram matrix, and a factorisation of size n m. Memory: `2 most_rows`, and `(n m)^2` numbers a
    few times.

    Args:
        output_fn: `output_fn(params, batch) -> (B, m)`; the outputs of an example must depend on it alone.
        output_loss_fn: `output_loss_fn(outputs, batch) -> ()`, the MEAN of losses that are convex in the outputs. For
            two classes, let the output be the difference of the logits: m = 1 costs a quarter of m = 2.
        params: Where the derivatives are taken.
        train: Batches that hold each training example once. Lengths may differ from batch to batch, so sort by length.
        test: Batches of test examples; where they are left out, the training examples are the test examples.
        damping: In the units of G; must be > 0. None: a tenth of the mean eigenvalue, as `suggest_damping` has it.
        gram: `output_gram(output_fn, params, train)` where it is there already, for another damping or other tests.
        most_rows: Bounds the memory.

    Returns:
        Scores in the order of the batches, and what they are worth.

    Raises:
        ValueError: If `damping` <= 0, there is no batch, the outputs are not of shape `(B, m)`, a loss is not convex
            in its outputs, or something is not finite.

    Example:
        >>> x = torch.tensor([[1.0], [2.0]])
        >>> def outputs(params, x):
        ...     return x * params["w"]
        >>> def squared_error(outputs, x):
        ...     return (outputs - 1).square().sum(1).mean() / 2
        >>> dual_influence(outputs, squared_error, {"w": torch.tensor(0.0)}, [x], damping=0.5).scores  # G = 2.5
        tensor([[0.3333, 0.6667],
                [0.6667, 1.3333]], dtype=torch.float64)

    Source: M. A. Woodbury, Inverting modified matrices (1950); C. K. I. Williams and C. E. Rasmussen, Gaussian
    Processes for Machine Learning (2006), eq. 2.11 and 2.12, for the same step from parameters to outputs.
    """
    checks.point("dual_influence", params)
    if damping is not None:
        checks.positive("dual_influence", "damping", damping)
    checks.count("dual_influence", "most_rows", most_rows)
    for name, batches in (("train", train), ("test", test)):
        if batches is not None and not len(batches):
            raise ValueError(f"`dual_influence({name}=...)` must hold at least one batch, got none.")

    with twice_differentiable():
        slopes, L = _output_derivatives(output_fn, output_loss_fn, params, train)
        n, m = slopes.shape
        if gram is not None and gram.shape != (n * m, n * m):
            raise ValueError(f"`dual_influence(gram=...)` must have shape {(n * m, n * m)}, got {tuple(gram.shape)}.")
        K = output_gram(output_fn, params, train, most_rows=most_rows) if gram is None else gram.double()
        if test is None:
            cross, test_slopes, own = K, slopes, _diagonal_blocks(K, m)
        else:
            test_slopes, _ = _output_derivatives(output_fn, output_loss_fn, params, test)
            cross = output_gram(output_fn, params, test, train, most_rows=most_rows)
            own = torch.cat([_own_gram(output_fn, params, batch) for batch in test])
    A = _times_blocks(_times_blocks(K, L).mT, L).mT  # L^T K L
    trace = A.trace() / n
    if damping is None:
        damping = MEAN_FRACTION * float(trace) / tree.numel(params)
        checks.positive("dual_influence", "damping", damping)
    shifted = A + n * damping * torch.eye(n * m, dtype=A.dtype, device=A.device)
    factor, info = torch.linalg.cholesky_ex(shifted)
    if bool(info != 0) or not bool(torch.isfinite(factor.diagonal()).all()):
        raise ValueError(
            f"`dual_influence(damping={damping:g})` is below the rounding of the Gram matrix, or an output or its loss "
            "is not finite. Raise `damping`, or compute in float64."
        )

    def solved(slopes: Tensor, cross: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For g = J^T slopes: `J g`, `L^T J g`, `g . g`, and `c = (n damping + A)^-1 L^T J g`."""
        J_g = torch.einsum("tm,tmi->ti", slopes, cross.reshape(*slopes.shape, n * m))
        factor_J_g = _times_blocks(J_g, L)
        g_g = torch.einsum("tm,tmk,tk->t", slopes, own, slopes)
        return J_g, factor_J_g, g_g, torch.cholesky_solve(factor_J_g.mT, factor).mT

    # Q_i = J_i (G + damping I)^-1 J_i^T; by Woodbury once more, the slopes without i are (1 - D_i Q_i / n)^-1 slopes.
    whitened = torch.linalg.solve_triangular(factor, _times_blocks(K, L).mT, upper=False).reshape(-1, n, m)
    Q = (_diagonal_blocks(K, m) - torch.einsum("rni,rnk->nik", whitened, whitened)) / damping
    without = torch.linalg.solve(torch.eye(m).to(Q) - L @ L.mT @ Q / n, slopes.unsqueeze(-1)).squeeze(-1)

    _, factor_J_g, g_g, c = solved(slopes, K, _diagonal_blocks(K, m))
    self_influence = (g_g - (c * factor_J_g).sum(1)) / damping
    J_g, factor_J_g, g_g, c = solved(test_slopes, cross, own)
    J_x = (J_g - _times_blocks(c, L.mT) @ K) / damping  # x = (g - J^T L c) / damping
    scores, leave_one_out = (torch.einsum("tnm,nm->tn", J_x.reshape(-1, n, m), s) for s in (slopes, without))
    x_g = (g_g - (c * factor_J_g).sum(1)) / damping
    x_x = (g_g - 2 * (c * factor_J_g).sum(1) + (c * (c @ A)).sum(1)) / damping**2
    left = factor_J_g - c @ shifted
    residual = (left * (left @ A)).sum(1).clamp(min=0).sqrt() / (n * damping)
    return DualInfluence(
        scores,
        leave_one_out,
        self_influence,
        (residual / g_g.sqrt()).nan_to_num(0.0),
        (x_g / (g_g * x_x).clamp(min=0).sqrt()).nan_to_num(0.0),
        trace,
        damping,
    )


def output_gram(
    output_fn: OutputFn,
    params: Params,
    batches: Sequence[Batch],
    others: Sequence[Batch] | None = None,
    *,
    most_rows: int = MOST_ROWS,
) -> Tensor:
    """`K = J J'^T`: inner products of the gradients of all outputs of `batches` with those of `others`, in float64.

    Args:
        output_fn: See `dual_influence`.
        params: Where the gradients are taken.
        batches: The rows.
        others: The columns; the default is `batches`, of which each pair is then computed once.
        most_rows: See `dual_influence`.

    Returns:
        `(N m, N' m)`: example by example, output by output. Products are in the dtype of `params`.

    Example:
        >>> output_gram(lambda params, x: x * params["w"], {"w": torch.tensor(1.0)}, [torch.tensor([[2.0], [3.0]])])
        tensor([[4., 6.],
                [6., 9.]], dtype=torch.float64)
    """
    symmetric = others is None
    columns = batches if others is None else others
    blocks: dict[tuple[int, int], Tensor] = {}
    start = 0
    while start < len(batches):
        kept: list[Params] = []
        size = 0
        for batch in batches[start:]:
            kept.append(_jacobian(output_fn, params, batch))
            size += sum(t.numel() for t in kept[-1].values())
            if size >= most_rows:
                break
        stop = start + len(kept)
        for j in range(start if symmetric else 0, len(columns)):
            rows = kept[j - start] if symmetric and j < stop else _jacobian(output_fn, params, columns[j])
            for i in range(start, min(stop, j + 1) if symmetric else stop):
                blocks[i, j] = sum((kept[i - start][k] @ rows[k].mT).double() for k in params)  # pyright: ignore[reportArgumentType]
                if symmetric:
                    blocks[j, i] = blocks[i, j].mT
        start = stop
    return torch.cat([torch.cat([blocks[i, j] for j in range(len(columns))], 1) for i in range(len(batches))])


def _jacobian(output_fn: OutputFn, params: Params, batch: Batch) -> Params:
    """`(B m, P_k)` for each key k: the gradient of each output of each example, example by example."""
    B = sampling.batch_length("dual_influence", batch)

    def outputs_of_one(params: Params, example: Batch) -> Tensor:
        one = pytree.tree_map(lambda leaf: leaf.unsqueeze(0) if isinstance(leaf, Tensor) else leaf, example)
        return _checked(output_fn(params, one), 1).squeeze(0)

    in_dims = pytree.tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, batch)
    stacked = torch.vmap(jacrev(outputs_of_one), in_dims=(None, in_dims))(params, batch)
    return {k: t.reshape(B * t.shape[1], -1) for k, t in stacked.items()}


def _own_gram(output_fn: OutputFn, params: Params, batch: Batch) -> Tensor:
    """`J_t J_t^T` of each example t by itself, shape `(B, m, m)`."""
    B = sampling.batch_length("dual_influence", batch)
    rows = [t.reshape(B, -1, t.shape[1]) for t in _jacobian(output_fn, params, batch).values()]
    return sum((r @ r.mT).double() for r in rows)  # pyright: ignore[reportReturnType]


def _output_derivatives(
    output_fn: OutputFn, output_loss_fn: OutputLossFn, params: Params, batches: Sequence[Batch]
) -> tuple[Tensor, Tensor]:
    """Of each example's own loss, in its outputs: the gradient `(n, m)`, and `L (n, m, m)` with the Hessian `L L^T`."""
    loss = checks.scalar_loss("dual_influence", output_loss_fn, "output_loss_fn")
    slopes, factors = [], []
    for batch in batches:
        B = sampling.batch_length("dual_influence", batch)
        z = _checked(output_fn(params, batch), B).detach().double()
        slope = grad(partial(_total, loss, batch, B))
        # The loss is a sum over examples, so one product with e_k in every example gives column k of each Hessian.
        units = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
        gradient, product = vjp(slope, z)[:2]
        columns = [product(e.expand_as(z).contiguous())[0] for e in units]
        slopes.append(gradient)
        factors.append(_root(torch.stack(columns, -1)))
    return torch.cat(slopes), torch.cat(factors)


def _total(loss: OutputLossFn, batch: Batch, B: int, z: Tensor) -> Tensor:
    return B * loss(z, batch)


def _root(D: Tensor) -> Tensor:
    """`L` with `L L^T = D`, for each of a stack of positive semidefinite matrices."""
    if not bool(D.isfinite().all()):
        raise ValueError("`dual_influence`: the loss of a training example is not finite, or its derivatives are not.")
    values, vectors = torch.linalg.eigh((D + D.mT) / 2)
    if bool((values < -1e-8 * values.abs().amax(1, keepdim=True)).any()):
        raise ValueError(
            "`dual_influence(output_loss_fn=...)` must be convex in the outputs, got a Hessian with the eigenvalue "
            f"{float(values.min()):.2g}."
        )
    return vectors * values.clamp(min=0).sqrt().unsqueeze(1)


def _checked(outputs: Tensor, B: int) -> Tensor:
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != B:
        got = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(f"`dual_influence(output_fn=...)` must return one row per example, shape (B, m), got {got}.")
    return outputs


def _times_blocks(X: Tensor, blocks: Tensor) -> Tensor:
    """`X` times the block diagonal matrix of `blocks (n, m, m)`."""
    n, m, _ = blocks.shape
    return torch.einsum("rnm,nmk->rnk", X.reshape(-1, n, m), blocks).reshape(-1, n * m)


def _diagonal_blocks(K: Tensor, m: int) -> Tensor:
    n = len(K) // m
    return K.reshape(n, m, n, m).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
