"""Influence scores `score_i = + grad_i . (H + damping I)^-1 grad_test` from an inverse-Hessian-vector product.

Positive = helpful: removing example i raises the test loss by about `score_i / n`. Knows losses and derivatives;
knows nothing of how the `ihvp` was solved for.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jvp
from torch.utils import _pytree as pytree

from lissa import checks, sampling, scoring, tree
from lissa.hvp import check_twice_differentiable, dense, nodes, pulled_back, result_shape
from lissa.kernels import twice_differentiable
from lissa.leafwise import is_constant
from lissa.lstm import DirectionalLSTM
from lissa.scoring import ScoringPlan, forward_work, plan_scoring
from lissa.types import Batch, ExampleLossFn, Params
from lissa.uses import uses

METHODS = ("auto", *scoring.METHODS)

DIFFERENTIABLE = ("jvp", "per-example-gradients")
"""The methods whose scores can be differentiated, and that run inside transforms."""

VECTORS_UNPLANNED = 16
"""Where no plan can be made (in a compiler), more vectors than this are scored by per-example gradients."""


def influence_scores(
    example_loss_fn: ExampleLossFn,
    params: Params,
    ihvp: Params,
    batch: Batch,
    *,
    method: str | ScoringPlan = "auto",
    chunk_size: int | None = None,
) -> Tensor:
    """`score_i = + grad_i . ihvp`, with `ihvp = (H + damping I)^-1 grad_test`, for each example i of the batch.

    The sign: positive = helpful. Removing example i from the n training examples raises the test loss by about
    `score_i / n`; the score itself is not divided by n.

    Args:
        example_loss_fn: `example_loss_fn(params, batch) -> (B,)`, the loss of each example.
        params: Where the gradients are taken.
        ihvp: Shaped like `params`, or K of them stacked: each tensor with one more dimension in front.
        batch: B training examples.
        method: `"jvp"`: one forward-mode pass a vector, nothing stored per example; any batch.
            `"per-example-gradients"`: B gradients by vmap, then one matrix product for all K vectors; the tensors of
            the batch must share their first dimension, and the loss of an example must depend on that example alone.
            `"double-vjp"`: one call of the loss for all examples, then one backward pass a vector through the graph of
            its gradient, see `scores_of_row_losses`. It needs second derivatives and nothing of `torch.func`, so it
            takes packed sequences and branches on the data; its scores are constants to autograd.
            `"auto"`: the one that `scoring_plan` expects to be fastest, with its chunks of examples; jvp where the
            batch cannot be cut into examples. Or such a plan, made once for many batches.
        chunk_size: Bounds the memory: at most so many vectors (jvp) or examples (the others) at a time.

    Returns:
        Scores of shape `(B,)`, or `(K, B)` for K stacked vectors, in units of the loss. Differentiable, but by
        `"double-vjp"`, which `"auto"` leaves out where something requires grad or a transform of `torch.func` is at
        work: the gradient in a training input is Koh & Liang's perturbation influence. For that use
        `"per-example-gradients"` where the model normalises layers: torch's forward-mode derivative of LayerNorm is
        right but its gradient is not.

    Raises:
        ValueError: If `ihvp` does not match `params`, or the loss is not of shape `(B,)`.
        TypeError: If `params` or `ihvp` is not a dict of floating-point tensors of the same dtypes.
        NotImplementedError: If `"double-vjp"` is called inside a transform, `torch.compile` or inference mode.

    Example:
        >>> def example_losses(params, x):
        ...     return (x @ params["w"]).square() / 2
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> influence_scores(example_losses, {"w": torch.tensor([3.0, 1.0])}, {"w": torch.tensor([1.0, 1.0])}, x)
        tensor([3., 4.])

    Source: P. W. Koh and P. Liang, Understanding black-box predictions via influence functions, ICML 2017, eq. 2.
    """
    if not isinstance(method, ScoringPlan):
        checks.one_of("influence_scores", "method", method, METHODS)
    if chunk_size is not None:
        checks.count("influence_scores", "chunk_size", chunk_size)
    checks.point("influence_scores", params)
    stacked = checks.is_stacked("influence_scores", params, ihvp, "ihvp")
    ihvp = {k: ihvp[k] for k in params}
    example_loss = _example_loss_of_params(example_loss_fn, batch)

    if method == "auto":
        K = next(iter(ihvp.values())).shape[0] if stacked else 1
        if not _has_rows(batch):
            method = "jvp"
        elif torch.compiler.is_compiling():
            method = "jvp" if K <= VECTORS_UNPLANNED else "per-example-gradients"
        else:
            methods = None if is_constant(ihvp) else _differentiable()
            method = scoring_plan(example_loss_fn, params, batch, K, methods=methods)
    if isinstance(method, ScoringPlan):
        if chunk_size is None:
            score = functools.partial(influence_scores, example_loss_fn, params, ihvp, method=method.method)
            return torch.cat([score(part) for part in _cut(batch, method.chunk_size)], dim=-1)
        method = method.method
    if method == "jvp":

        def directional(ihvp: Params) -> Tensor:
            return jvp(example_loss, (params,), (ihvp,))[1]

        return torch.vmap(directional, chunk_size=chunk_size)(ihvp) if stacked else directional(ihvp)

    vectors = ihvp if stacked else tree.map(lambda t: t.unsqueeze(0), ihvp)
    if method == "double-vjp":
        scores = _by_double_vjp(example_loss_fn, params, vectors, batch, chunk_size)
        return scores if stacked else scores.squeeze(0)

    gradients = per_example_gradients(example_loss_fn, params, batch, chunk_size=chunk_size)
    products = [_rows(vectors[k]) @ _rows(gradients[k]).mT for k in params]
    scores = torch.stack(products).sum(0)
    return scores if stacked else scores.squeeze(0)


class Scored(NamedTuple):
    """What `scores_of_row_losses` finds of B examples and K vectors.

    Attributes:
        losses: Of each example, shape `(B,)`.
        scores: Shape `(K, B)`.
        products: `sum_i H_i x_k` for the first vectors, stacked.
    """

    losses: Tensor
    scores: Tensor
    products: Params


def scores_of_row_losses(
    row_losses: Callable[[Params], Tensor],
    params: Params,
    ihvp: Params,
    *,
    products: int = 0,
    by_uses: bool = False,
) -> Scored:
    """`score_ik = grad_i . x_k` and `sum_i H_i x_k`: the derivatives of `grad (u . losses) . x_k` in `u` and `params`.

    The gradient of `u . losses` is linear in `u`, so a second backward pass for each vector gives all examples' scores:
    for as many examples as go through the model together, of any model that can be differentiated twice. Where that
    pass goes on to the parameters, it gives the product with the sum of the examples' Hessians too.

    Args:
        row_losses: `row_losses(params) -> (B,)`, each a function of its own example. Called once.
        params: Where the gradients are taken.
        ihvp: K vectors, stacked.
        products: Of how many vectors, the first ones, the products are asked for.
        by_uses: Whether the others are scored by `lissa.uses`, if they are not few and that is possible. It is if the
            first vector gets the scores that it gets by being pulled back.

    Returns:
        The scores and products, constants to autograd.

    Raises:
        RuntimeError: If an operation cannot be differentiated twice.

    Example:
        >>> def losses(params):
        ...     return (torch.tensor([[1.0, 0.0], [0.0, 2.0]]) @ params["w"]).square() / 2
        >>> scored = scores_of_row_losses(
        ...     losses, {"w": torch.tensor([3.0, 1.0])}, {"w": torch.tensor([[1.0, 1.0]])}, products=1
        ... )
        >>> scored.scores, scored.products  # H_1 + H_2 = diag(1, 4)
        (tensor([[3., 4.]]), {'w': tensor([[1., 4.]])})

    Source: J. Townsend, A new trick for calculating Jacobian vector products, 2017.
    """
    leaves = tree.leaves(params)
    with torch.enable_grad(), twice_differentiable(), DirectionalLSTM(curved=products > 0) as lstm:
        losses = row_losses(leaves)
    vectors = tuple(ihvp[k].detach() for k in leaves)
    if not losses.requires_grad:
        none = tree.map(lambda t: torch.zeros_like(t[:products]), ihvp)
        return Scored(losses, losses.new_zeros(len(vectors[0]), len(losses)), none)
    check_twice_differentiable(losses, "`influence_scores(method='double-vjp')`")
    u = torch.ones_like(losses, requires_grad=True)
    graph = list(nodes(losses))
    at_once = scoring.pulled_at_once(
        len(vectors[0]), examples=len(losses), operations=len(graph), looked_up=sum(map(_looked_up, graph)),
        device=losses.device.type,
    )  # fmt: skip

    entering = uses(losses) if by_uses and len(vectors[0]) - products >= MANY_VECTORS else None
    rows = [] if entering is None else entering.rows

    def gradient() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        inputs: list[Any] = [*leaves.values(), *rows]
        with torch.enable_grad(), twice_differentiable():
            found = torch.autograd.grad(losses, inputs, u, create_graph=True, materialize_grads=True)
        return tuple(map(dense, found[: len(leaves)])), found[len(leaves) :]

    with twice_differentiable():
        pulled, of_rows = gradient()
        scores = None
        if entering is not None:
            scores = entering.scores(of_rows, losses, leaves, dict(zip(leaves, vectors, strict=True)))
        found, *of_leaves = pulled_back(pulled, (u, *leaves.values()), [v[:products] for v in vectors], at_once=at_once)
        if scores is not None:
            first = found[:1] if products else pulled_back(pulled, (u,), [v[:1] for v in vectors])[0]
            scores = scores[products:] if _are_close(scores[:1], first) else None
        if scores is None:
            if lstm.met and 0 < products < len(vectors[0]):  # of the others nothing that only products need
                lstm.curved = False
                pulled, _ = gradient()
            scores = pulled_back(pulled, (u,), [v[products:] for v in vectors], at_once=at_once)[0]
    return Scored(losses.detach(), torch.cat([found, scores]), dict(zip(leaves, of_leaves, strict=True)))


MANY_VECTORS = 3
"""From so many on, a gradient to find out which row is whose pays."""


def _are_close(a: Tensor, b: Tensor) -> bool:
    """Whether scores are the same but for rounding, which is relative to the largest terms of their sums."""
    return bool((a - b).abs().max() <= torch.finfo(a.dtype).eps ** 0.5 * b.abs().max())


def _looked_up(node: Any) -> int:
    """Numbers of the rows that a node of autograd's graph looked up in an embedding."""
    return math.prod(result_shape(node)) if node.name() == "EmbeddingBackward0" else 0


def scoring_plan(
    example_loss_fn: ExampleLossFn,
    params: Params,
    batch: Batch,
    vectors: int,
    *,
    examples: int | None = None,
    numbers: int | None = None,
    methods: Sequence[str] | None = None,
) -> ScoringPlan:
    """How to score batches like this one, by `lissa.scoring.plan_scoring`, from what its first example takes.

    Args:
        example_loss_fn: See `influence_scores`.
        params: See `influence_scores`.
        batch: Tensors that share their first dimension.
        vectors: How many are stacked.
        examples: How many there will be to score; the default is those of the batch.
        numbers: Most numbers that a chunk holds.
        methods: Those to choose from. The default is all that give the scores of `method="auto"` here: double-vjp is
            not one of them inside a transform, nor where the loss has no second derivative, or depends on something
            that requires grad while gradients are enabled. That is tried on the first example.

    Returns:
        The plan; `influence_scores(..., method=plan)` follows it.

    Raises:
        ValueError: If the tensors of the batch do not share their first dimension, or a method is unknown.

    Example:
        >>> def example_losses(params, x):
        ...     return (x @ params["w"]).square() / 2
        >>> params, x = {"w": torch.ones(500)}, torch.ones(1000, 500)
        >>> few, many = (scoring_plan(example_losses, params, x, vectors) for vectors in (1, 1000))
        >>> few.method, many.method
        ('double-vjp', 'per-example-gradients')
        >>> influence_scores(example_losses, params, {"w": torch.ones(1, 500)}, x, method=few).shape
        torch.Size([1, 1000])
    """
    n = sampling.batch_length("scoring_plan", batch)
    example = sampling.take(batch, slice(0, 1))
    plan = functools.partial(
        plan_scoring,
        forward_work(example_loss_fn, params, example),
        examples=examples or n,
        vectors=vectors,
        parameters=tree.numel(params),
        device=next(iter(params.values())).device.type,
        numbers=numbers,
    )
    if methods is not None:
        return plan(methods=methods)
    fastest = plan(methods=(*_differentiable(), "double-vjp"))
    if fastest.method == "double-vjp" and not _takes_double_vjp(example_loss_fn, params, example):
        return plan(methods=_differentiable())
    return fastest


def per_example_gradients(
    example_loss_fn: ExampleLossFn, params: Params, batch: Batch, *, chunk_size: int | None = None
) -> Params:
    """`grad_i = d example_loss_i / d params` for each example i: tensors of shape `(B, *params[k].shape)`.

    Args:
        example_loss_fn: `example_loss_fn(params, batch) -> (B,)`. The loss of an example must depend on it alone.
        params: Where the gradients are taken.
        batch: Tensors, or tuples, lists and dicts of them, that share their first dimension B.
        chunk_size: Bounds the working memory: at most so many examples at a time. The result holds `B P` numbers.

    Returns:
        The gradients, stacked.

    Raises:
        ValueError: If the tensors of the batch do not share their first dimension.

    Example:
        >>> per_example_gradients(lambda p, x: p["w"] * x**2, {"w": torch.tensor(1.0)}, torch.tensor([1.0, 2.0]))
        {'w': tensor([1., 4.])}
    """
    checks.point("per_example_gradients", params)
    sampling.batch_length("per_example_gradients", batch)

    def loss_of_one(params: Params, example: Any) -> Tensor:
        batch_of_one = pytree.tree_map(lambda leaf: leaf.unsqueeze(0) if isinstance(leaf, Tensor) else leaf, example)
        return _example_loss_of_params(example_loss_fn, batch_of_one)(params).squeeze(0)

    in_dims = pytree.tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, batch)
    return torch.vmap(grad(loss_of_one), in_dims=(None, in_dims), chunk_size=chunk_size)(params, batch)


def _by_double_vjp(
    example_loss_fn: ExampleLossFn, params: Params, vectors: Params, batch: Batch, chunk_size: int | None
) -> Tensor:
    """`scores_of_row_losses`, for chunks of examples."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not is_constant():
        raise NotImplementedError(
            "`influence_scores(method='double-vjp')` runs torch.autograd on copies of the parameters: not inside "
            "transforms of torch.func, torch.compile or inference mode. Use method='auto', 'jvp' or "
            "'per-example-gradients' there."
        )
    parts = [batch] if chunk_size is None else _cut(batch, chunk_size)
    losses = (_example_loss_of_params(example_loss_fn, part) for part in parts)
    return torch.cat([scores_of_row_losses(each, params, vectors).scores for each in losses], dim=-1)


def _differentiable() -> tuple[str, ...]:
    """Those of `DIFFERENTIABLE` that run here: torch begins no other forward mode inside `forward_ad.dual_level`."""
    return DIFFERENTIABLE if forward_ad._current_level < 0 else ("per-example-gradients",)


def _takes_double_vjp(example_loss_fn: ExampleLossFn, params: Params, example: Batch) -> bool:
    """Whether double-vjp runs, and its scores, constants, are what they should be."""
    if not is_constant(params, example):
        return False
    example_loss = _example_loss_of_params(example_loss_fn, example)
    if torch.is_grad_enabled() and example_loss(params).requires_grad:  # of something else, as it must be
        return False
    try:
        _by_double_vjp(example_loss_fn, params, tree.map(lambda p: p.unsqueeze(0), params), example, None)
    except RuntimeError:
        return False
    return True


def _cut(batch: Batch, size: int) -> list[Batch]:
    n = sampling.batch_length("influence_scores", batch)
    return [sampling.take(batch, slice(i, i + size)) for i in range(0, n, size)] if n > size else [batch]


def _rows(stack: Tensor) -> Tensor:
    """`(N, *shape) -> (N, P)`."""
    return stack.reshape(len(stack), stack[:1].numel())


def _has_rows(batch: Batch) -> bool:
    try:
        sampling.batch_length("influence_scores", batch)
    except ValueError:
        return False
    return True


def _example_loss_of_params(example_loss_fn: ExampleLossFn, batch: Batch) -> Any:
    """`params -> example_loss_fn(params, batch)`, checked to return one loss per example."""

    def example_loss(params: Params) -> Tensor:
        losses = example_loss_fn(params, batch)
        if not isinstance(losses, Tensor):
            raise TypeError(
                f"`influence_scores(example_loss_fn=...)` must return a tensor, got {type(losses).__name__}."
            )
        if losses.ndim != 1:
            raise ValueError(
                "`influence_scores(example_loss_fn=...)` must return one loss per example, shape (B,), "
                f"got shape {tuple(losses.shape)}. Use reduction='none'."
            )
        return losses

    return example_loss
