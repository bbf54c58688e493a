"""Products of the Hessian with vectors: one function per strategy, one signature.

Pure functions over parameter dicts. Knows losses and derivatives; knows nothing of solvers, of `nn.Module` or of how
batches are drawn.
"""

import functools
import logging
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.func import grad, jvp, vjp

from lissa import checks, tree
from lissa.failures import explained, say_once
from lissa.kernels import DenseEmbeddings, DifferentiableForwardMode, twice_differentiable
from lissa.leafwise import leafwise
from lissa.types import Batch, LossFn, Params

logger = logging.getLogger(__name__)

HVP: TypeAlias = Callable[[LossFn, Params, Batch, Params], Params]
"""A strategy: `(loss_fn, params, batch, v) -> H v`."""


def hvp(loss_fn: LossFn, params: Params, batch: Batch, v: Params, *, mode: str = "auto") -> Params:
    """`H v`, with `H` the Hessian of `loss_fn(., batch)` at `params`; `H` itself is never formed.

    All modes compute the same product; they differ in cost and in what they can differentiate:

    - `"forward-over-reverse"`: `d/de grad L(params + e v)` by `jvp(grad(L))`. Needs forward-mode derivatives.
    - `"reverse-over-reverse"`: `d/dparams <grad L(params), v>` by `vjp(grad(L))`. Composes with every transform.
    - `"reverse-over-forward"`: `d/dparams <grad L(params), v>` by `grad(jvp(L))`. Needs forward-mode derivatives.
    - `"double-backward"`: the same by `torch.autograd.grad` twice on leaf copies. Runs where `torch.func` cannot
      (packed sequences). Under `vmap` it loops over the vectors, on one graph; it cannot itself be differentiated.
    - `"finite-difference"`: `(grad L(params + e v) - grad L(params - e v)) / 2e`. Approximate: relative error about
      1e-10 in float64 and 1e-4 in float32; refused in 16 bits, and where two step lengths disagree. Needs first
      derivatives only. Costs four gradients.
    - `"auto"`: the first of reverse-over-reverse, double-backward, forward-over-reverse and finite-difference that
      runs. It remembers, for each `loss_fn`, which one that was.

    Inside the call, kernels are switched to ones that can be differentiated twice (`lissa.kernels`). For many products
    at the same shapes, `traced` and `compiled` remove the overhead; for many vectors, `torch.vmap(..., chunk_size=)`.

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
        ValueError: If `mode` is unknown, `v` does not match `params`, or the loss is not a scalar, draws random numbers
            or changes a buffer.
        TypeError: If `params` or `v` is not a dict of floating-point tensors of the same dtypes.
        NotImplementedError: If the mode cannot differentiate the loss. The message names the operation and what works.

    Example:
        >>> def loss_fn(params, batch):
        ...     return (params["w"] ** 3 * batch).mean()
        >>> hvp(loss_fn, {"w": torch.tensor([1.0, 2.0])}, torch.ones(2), {"w": torch.tensor([1.0, 10.0])})
        {'w': tensor([ 3., 60.])}

    Source: B. A. Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6 (1994), eq. 3.
    """
    checks.one_of("hvp", "mode", mode, tuple(MODES))
    return MODES[mode](loss_fn, params, batch, v)


_with_sparse_embeddings: weakref.WeakSet[LossFn] = weakref.WeakSet()
"""Losses whose sparse gradients were met: a mode of `torch.func` makes their embeddings dense from the start."""


def _strategy(mode: str) -> Callable[[HVP], HVP]:
    """Makes a formula a public strategy: checks its arguments, selects kernels and explains what fails."""

    def decorate(formula: HVP) -> HVP:
        @functools.wraps(formula)
        def strategy(loss_fn: LossFn, params: Params, batch: Batch, v: Params) -> Params:
            checks.point("hvp", params)
            checks.vector("hvp", params, v)
            v = {key: v[key] for key in params}
            checked = checks.deterministic("hvp", checks.scalar_loss("hvp", loss_fn), params)
            if torch.compiler.is_compiling():  # a compiler traces neither switches nor handlers
                return formula(checked, params, batch, v)
            try:
                with twice_differentiable():
                    if loss_fn not in _with_sparse_embeddings:
                        try:
                            return formula(checked, params, batch, v)
                        except SparseGradientError:
                            _with_sparse_embeddings.add(loss_fn)
                    with DenseEmbeddings():
                        return formula(checked, params, batch, v)
            except RuntimeError as error:
                if torch.is_inference_mode_enabled():
                    raise RuntimeError(checks.IN_INFERENCE_MODE.format(f"hvp(mode={mode!r})")) from error
                explanation = explained(f"hvp(mode={mode!r})", error)
                if explanation is error:
                    raise
                raise explanation from error

        return strategy

    return decorate


@_strategy("forward-over-reverse")
def hvp_forward_over_reverse(loss_fn: LossFn, params: Params, batch: Batch, v: Params) -> Params:
    """`H v = d/de grad L(params + e v) at e = 0`: the directional derivative of the gradient. See `hvp`."""

    def gradient(params: Params) -> Params:
        return _all_dense(grad(loss_fn)(params, batch))

    return jvp(gradient, (params,), (v,))[1]


@_strategy("reverse-over-reverse")
def hvp_reverse_over_reverse(loss_fn: LossFn, params: Params, batch: Batch, v: Params) -> Params:
    """`H v = d/dparams <grad L(params), v>`: the gradient pulled back, as `H` is symmetric. See `hvp`."""

    def gradient(params: Params) -> Params:
        return _all_dense(grad(loss_fn)(params, batch))

    pullback = vjp(gradient, params)[1]
    return tree.map(dense, pullback(v)[0])  # in torch 2.6, sparse embeddings make it sparse


@_strategy("reverse-over-forward")
def hvp_reverse_over_forward(loss_fn: LossFn, params: Params, batch: Batch, v: Params) -> Params:
    """`H v = d/dparams (d/de L(params + e v))`: the gradient of the directional derivative. See `hvp`."""

    def directional_derivative(params: Params) -> Tensor:
        return jvp(lambda p: loss_fn(p, batch), (params,), (v,))[1]

    with DifferentiableForwardMode():
        return _all_dense(grad(directional_derivative)(params))


@_strategy("double-backward")
def hvp_double_backward(loss_fn: LossFn, params: Params, batch: Batch, v: Params) -> Params:
    """`H v = d/dparams <grad L(params), v>` by `torch.autograd.grad` twice on leaf copies. See `hvp`."""

    def prepare(params: Params, batch: Batch, count: int) -> Callable[[Params], Params]:
        leaves = tree.leaves(params)
        with torch.enable_grad():
            grads = gradient_of_graph(loss_fn(leaves, batch), tuple(leaves.values()))

        def product(v: Params) -> Params:
            parts = pull_back(grads, tuple(leaves.values()), tuple(v[k] for k in leaves), retain_graph=count > 1)
            return dict(zip(leaves, parts, strict=True))

        return product

    return leafwise("hvp(mode='double-backward')", prepare, params, batch, v)


@_strategy("finite-difference")
def hvp_finite_difference(loss_fn: LossFn, params: Params, batch: Batch, v: Params) -> Params:
    """`H v ~ (grad L(params + e v) - grad L(params - e v)) / 2e` with `e = u^(1/3) (1 + |params|) / |v|`. See `hvp`.

    With `u` the unit roundoff, truncation `e^2 |v|^3 |L''''| / 6` and cancellation `u |grad L| / e` balance at about
    `u^(2/3)`, the best a central difference can do (Nocedal & Wright, Numerical Optimization, section 8.1). A second
    difference over twice the step must agree to 10%: where it does not, a kink of the loss (ReLU, max pooling) lies
    within the step, or too much curvature, and that is an error.
    """

    def prepare(params: Params, batch: Batch, count: int) -> Callable[[Params], Params]:
        unit_roundoff = max(torch.finfo(p.dtype).eps for p in params.values()) / 2
        if unit_roundoff > _COARSEST_ROUNDOFF:
            raise NotImplementedError(f"a difference of gradients with unit roundoff {unit_roundoff:.0e}")
        step_length = unit_roundoff ** (1 / 3) * (1 + tree.norm(params))

        def gradient(params: Params) -> Params:
            leaves = tree.leaves(params)
            with torch.enable_grad():
                loss = loss_fn(leaves, batch)
            grads = torch.autograd.grad(loss, tuple(leaves.values()), materialize_grads=True)
            return dict(zip(leaves, map(dense, grads), strict=True))

        def product(v: Params) -> Params:
            length = tree.norm(v)
            e = step_length / torch.where(length == 0, torch.ones_like(length), length)

            def central(e: Tensor) -> tuple[Params, Tensor]:
                ahead, behind = (gradient(tree.add_scaled(params, sign * e, v)) for sign in (1, -1))
                return tree.scale(1 / (2 * e), tree.sub(ahead, behind)), unit_roundoff * tree.norm(ahead) / e

            (H_v, rounding), (H_v_again, _) = central(e), central(2 * e)
            gap = tree.norm(tree.sub(H_v, H_v_again))
            if gap > 0.1 * tree.norm(H_v) + 30 * rounding:
                raise NotImplementedError(f"differences of gradients disagree by {float(gap / tree.norm(H_v)):.0%}")
            return H_v

        return product

    return leafwise("hvp(mode='finite-difference')", prepare, params, batch, v)


_COARSEST_ROUNDOFF = 1e-4
"""In bfloat16 (4e-3) and float16 (5e-4) a difference of gradients may be all rounding: an error, not a number."""


def hvp_auto(loss_fn: LossFn, params: Params, batch: Batch, v: Params) -> Params:
    """`H v` by the first strategy that runs; it is the first to be tried for the same `loss_fn` later. See `hvp`."""
    if torch.compiler.is_compiling():  # a compiler traces one strategy; it cannot trace a retry
        return hvp_reverse_over_reverse(loss_fn, params, batch, v)
    mode = _remembered.get(loss_fn)
    if mode is not None:
        try:
            return MODES[mode](loss_fn, params, batch, v)
        except NotImplementedError:  # other data, or under a transform that this mode does not support
            pass
    mode, product = _first_that_runs(loss_fn, params, batch, v)
    if mode != _AUTO_ORDER[0]:
        _remembered[loss_fn] = mode
    return product


_remembered: weakref.WeakKeyDictionary[LossFn, str] = weakref.WeakKeyDictionary()
"""For each loss that the first strategy fails on, the one that worked: thousands of products pay for a failure once.
It only orders the attempts, so no result depends on it."""


def choose_mode(loss_fn: LossFn, params: Params, batch: Batch) -> str:
    """The mode that `"auto"` comes to for this loss: the first that runs.

    For code that creates its loss anew for each product, from which `"auto"` cannot learn. The choice holds for the
    kind of loss, not for one batch: pass a typical one.

    Args:
        loss_fn: `loss_fn(params, batch) -> ()`, the mean loss.
        params: Where the Hessian is taken.
        batch: Passed to `loss_fn` as it is.

    Returns:
        A mode of `hvp`, not `"auto"`.

    Raises:
        ValueError: If the loss is not a scalar.
        TypeError: If `params` is not a dict of floating-point tensors.
        NotImplementedError: If no mode runs.

    Example:
        >>> choose_mode(lambda params, x: (params["w"] * x).exp().mean(), {"w": torch.ones(3)}, torch.ones(3))
        'reverse-over-reverse'
    """
    checks.point("choose_mode", params)
    return _first_that_runs(loss_fn, params, batch, tree.zeros_like(params))[0]


def _first_that_runs(loss_fn: LossFn, params: Params, batch: Batch, v: Params) -> tuple[str, Params]:
    errors: list[Exception] = []
    for mode in _AUTO_ORDER:
        try:
            product = MODES[mode](loss_fn, params, batch, v)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            errors.append(error)
            continue
        if errors:
            say_once(logger, f"hvp(mode='auto') uses mode={mode!r}, because: {errors[0]}")
        return mode, product
    raise errors[0]


_AUTO_ORDER = ("reverse-over-reverse", "double-backward", "forward-over-reverse", "finite-difference")

MODES: dict[str, HVP] = {
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
    return pull_back(gradient_of_graph(loss, params), params, vectors, retain_graph=False)


def gradient_of_graph(loss: Tensor, params: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """`grad L`, dense and with its own graph, so that it can be differentiated again."""
    if torch.is_inference_mode_enabled():  # there are no graphs
        raise RuntimeError(checks.IN_INFERENCE_MODE.format("A Hessian-vector product by double backward"))
    if not loss.requires_grad:
        return tuple(torch.zeros_like(p) for p in params)
    check_twice_differentiable(loss, "A Hessian-vector product by double backward")
    return tuple(map(dense, torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)))


def check_twice_differentiable(loss: Tensor, call: str) -> None:
    """Finds operations of the loss that torch differentiates once: what lies behind them would be lost without a word.

    Raises:
        NotImplementedError: If there is one.
    """
    for node in nodes(loss):
        function = getattr(node, "_forward_cls", None)
        if function is not None and getattr(function.backward, "__code__", None) is _ONCE:
            raise NotImplementedError(
                f"{call} needs second derivatives, and the loss has an operation without: {function.__name__} is "
                "marked @once_differentiable. Use another method or mode."
            )


def nodes(t: Tensor) -> Iterator[Any]:
    """The nodes of autograd's graph behind `t`, each once, after those whose results it takes."""
    todo, opened, done = [t.grad_fn] if t.grad_fn is not None else [], set[Any](), set[Any]()
    while todo:
        node = todo[-1]
        if node not in opened:
            opened.add(node)
            todo += [to for to, _ in node.next_functions if to is not None and to not in opened]
            continue
        todo.pop()
        if node not in done:
            done.add(node)
            yield node


def result_shape(node: Any, which: int = 0) -> tuple[int, ...]:
    """The shape of a result of a node of autograd's graph."""
    return tuple(node._input_metadata[which].shape)


_ONCE = once_differentiable(lambda *_: None).__code__
"""What all functions with that mark run."""


def pull_back(
    grads: Sequence[Tensor], params: Sequence[Tensor], vectors: Sequence[Tensor], *, retain_graph: bool
) -> tuple[Tensor, ...]:
    """`d/dparams <grads, v>`; zeros where the gradient does not depend on the parameters."""
    curved = [(g, v) for g, v in zip(grads, vectors, strict=True) if g.requires_grad]
    if not curved:
        return tuple(torch.zeros_like(p) for p in params)
    outputs, cotangents = zip(*curved, strict=True)
    products = torch.autograd.grad(outputs, params, cotangents, retain_graph=retain_graph, materialize_grads=True)
    return tuple(map(dense, products))


def pulled_back(
    outputs: Sequence[Tensor], leaves: Sequence[Tensor], cotangents: Sequence[Tensor], *, at_once: int | None = None
) -> tuple[Tensor, ...]:
    """`pull_back` of K stacked cotangents through one graph, which is kept.

    By `torch.vmap` around the backward pass alone, so that it does not matter how the graph came about; in turn, where
    an operation refuses that (sparse gradients).

    Args:
        outputs: Tensors that depend on the leaves.
        leaves: What to differentiate in.
        cotangents: Shaped like the outputs, each with one more dimension in front.
        at_once: Most of them in one backward pass; all, if not given.

    Returns:
        For each leaf, shape `(K, *shape)`.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> pulled_back((x**2,), (x,), (torch.eye(2),))
        (tensor([[2., 0.],
                [0., 4.]]),)
    """
    pulled = partial(pull_back, outputs, leaves, retain_graph=True)
    if not len(cotangents[0]):
        return tuple(p.new_empty(0, *p.shape) for p in leaves)
    return over_stack(pulled, tuple(cotangents), at_once=at_once)


def over_stack(
    pulled: Callable[[Sequence[Tensor]], tuple[Tensor, ...]],
    cotangents: tuple[Tensor, ...],
    *,
    at_once: int | None = None,
) -> tuple[Tensor, ...]:
    """`pulled` of each of K >= 1 stacked cotangents, stacked: by `torch.vmap`, or in turn where that is refused."""
    K = len(cotangents[0])
    if K > 1 and at_once != 1:  # of one vector, vmap takes twice as long
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "There is a performance drop")  # of what vmap loops over
                return torch.vmap(pulled, chunk_size=at_once)(cotangents)
        except RuntimeError as error:
            logger.debug("One vector at a time, because: %s", error)
    found = [pulled([c[k] for c in cotangents]) for k in range(K)]
    return tuple(map(torch.stack, zip(*found, strict=True)))


class SparseGradientError(NotImplementedError):
    """A gradient is sparse, and about to be differentiated by torch.func."""


def _all_dense(gradient: Params) -> Params:
    """`gradient`, an error if any of it is sparse: torch.func would lose it on the way to a second derivative."""
    for key, t in gradient.items():
        if t.layout != torch.strided:
            raise SparseGradientError(f"sparse gradient at {key!r}")
    return gradient


def dense(t: Tensor) -> Tensor:
    """`t` itself, or all its entries if it is sparse, as the gradients of Embedding(sparse=True) are."""
    return t if t.layout == torch.strided else t.to_dense()
