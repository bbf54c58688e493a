"""`nn.Module` -> `(params, loss_fn)`: a model's loss as a pure function of a parameter dict.

Knows modules and their state; knows nothing of instances, solvers or influence. Nothing of the caller's module changes:
work runs on a copy that shares the parameters (so it costs no memory) and owns everything a forward pass may write to.
"""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from bridge import output_space
from bridge.attention import masks_always_made
from bridge.output_space import OutputLoss
from lissa import Batch, ExampleLossFn, LastLayer, LossFn, Params, tree
from lissa.kernels import twice_differentiable
from lissa.types import OutputFn, OutputLossFn

logger = logging.getLogger(__name__)


class MissingLossError(ValueError):
    """The model returned no loss: most often the instance has no label."""


class Functional(NamedTuple):
    """A model as pure functions.

    Attributes:
        params: The parameters that influence is measured in; detached, on the device where work is done.
        loss_fn: `loss_fn(params, batch) -> ()`, the loss the model reports for a batch.
        device: Where batches must be.
        output_fn: `output_fn(params, batch) -> (B, m)`, what that loss is a function of; see `bridge.output_space`.
        output_loss_fn: `output_loss_fn(outputs, batch) -> ()`, so that it is `loss_fn` of `output_fn`.
        max_memory: Bytes that work with these functions may take, beside model and data; None: a sensible amount.
        last_layer: Where batches are `lissa.Expansion`s, the layer that has the parameters; see `bridge.last_layer`.
    """

    params: Params
    loss_fn: LossFn
    device: torch.device
    output_fn: OutputFn
    output_loss_fn: OutputLossFn
    max_memory: int | None = None
    last_layer: LastLayer | None = None


@contextmanager
def evaluation(model: nn.Module, *, training: bool = False) -> Iterator[nn.Module]:
    """A stand-in for `model` in eval mode, with dense embedding gradients and twice differentiable kernels.

    It shares the parameters with `model` and owns the rest. Where a model cannot be copied, it is the model itself,
    with its flags put back on exit; its own Python state (metrics it counts, say) is then its own affair.

    Args:
        model: The caller's model.
        training: Train mode instead, for those who ask for it.

    Yields:
        The stand-in.
    """
    stand_in = _copy_sharing_parameters(model)
    if stand_in is model:
        logger.warning("The model cannot be copied, so it is used itself and its flags put back afterwards.")
    else:
        _silence_metrics(stand_in)
    with _flags(stand_in, training=training), twice_differentiable(), masks_always_made():
        yield stand_in


@contextmanager
def dense_embeddings(model: nn.Module) -> Iterator[None]:
    """Inside, embeddings of `model` give dense gradients: sparse ones cannot be differentiated again."""
    with _flags(model):
        yield


@contextmanager
def _flags(model: nn.Module, training: bool | None = None) -> Iterator[None]:
    """Sets `training` if given, and clears `sparse`, on each module by itself; `train()` may do more than that."""
    wanted = {"sparse": False} if training is None else {"sparse": False, "training": training}
    before = [
        (module, flag, getattr(module, flag))
        for module in model.modules()
        for flag in wanted
        if isinstance(getattr(module, flag, None), bool)
    ]
    try:
        for module, flag, _ in before:
            setattr(module, flag, wanted[flag])
        yield
    finally:
        for module, flag, value in before:
            setattr(module, flag, value)


def functional(
    module: nn.Module,
    names: Iterable[str],
    *,
    output_loss: OutputLoss | None = None,
    device: torch.device | None = None,
) -> Functional:
    """`loss_fn(params, batch)` of a module, with `params` the named ones; the others and the buffers are constants.

    A batch that is a mapping is passed as `module(**batch)` and the loss read from the output's `"loss"`; of a pair
    `(x, y)` the loss is `output_loss(module(x), y)`, or `module(**x)` for a mapping `x`. Each evaluation gets its own
    copy of the buffers, so that a module may write to them. Tied parameters stay tied.

    Args:
        module: A module inside `evaluation`.
        names: Names out of `module.named_parameters()`.
        output_loss: For pairs.
        device: Where to work; the default is where the parameters are.

    Returns:
        The functions.

    Example:
        >>> model = functional(nn.Linear(1, 1, bias=False), ["weight"], output_loss=nn.functional.mse_loss)
        >>> model.loss_fn({"weight": torch.tensor([[3.0]])}, (torch.tensor([[2.0]]), torch.tensor([[5.0]])))
        tensor(1.)
    """
    if device is None:
        device = next(module.parameters()).device
    parameters = {name: p.detach().to(device) for name, p in module.named_parameters()}
    buffers = {name: b.detach().to(device) for name, b in module.named_buffers()}
    params = {name: parameters.pop(name) for name in names}
    keeps_state = _keeps_state(module)

    def call(params: Params) -> Callable[..., Any]:
        state = {**parameters, **params, **{name: b.clone() for name, b in buffers.items()}}
        fresh = _copy_sharing_parameters(module) if keeps_state else module
        return partial(functional_call, fresh, state)

    def loss_fn(params: Params, batch: Batch) -> Tensor:
        loss = _loss(call(params), batch, output_loss)
        if loss.numel() != 1:
            raise ValueError(
                f"The loss must be a scalar, the mean loss of the batch, got shape {tuple(loss.shape)}. Add `.mean()`."
            )
        return loss.reshape(())

    def output_fn(params: Params, batch: Batch) -> Tensor:
        return output_space.output(call(params), batch, output_loss)

    def output_loss_fn(z: Tensor, batch: Batch) -> Tensor:
        return output_space.loss(z, batch, output_loss)

    return Functional(params, loss_fn, device, output_fn, output_loss_fn)


def example_losses(loss_fn: LossFn) -> ExampleLossFn:
    """`example_loss_fn(params, stack) -> (B,)`: the loss of each row of a stack of batches.

    A model reports a batch mean only, so an example's loss is the loss of a batch of one: a row of `stacked_alike`.
    """

    def of_rows(params: Params, stack: Batch) -> Tensor:
        return torch.vmap(loss_fn, in_dims=(None, rows_of(stack)))(params, stack)

    return of_rows


def rows_of(stack: Batch) -> Any:
    """`in_dims` of `torch.vmap` for a function of one row of a stack."""
    return pytree.tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, stack)


def loss_and_gradient(loss_fn: LossFn, params: Params, batch: Batch) -> tuple[Tensor, Params]:
    """`L, grad L`, both detached; parameters that the loss does not use get zeros. See `loss_and_used_gradient`."""
    loss, used = loss_and_used_gradient(loss_fn, params, batch)
    return loss, {name: used[name] if name in used else torch.zeros_like(p) for name, p in params.items()}


def loss_and_used_gradient(loss_fn: LossFn, params: Params, batch: Batch) -> tuple[Tensor, Params]:
    """`L, grad L`, both detached, the gradient in those parameters only that the loss depends on.

    By `torch.autograd` on leaf copies: it takes models that `torch.func` does not.
    """
    leaves = tree.leaves(params)
    with torch.enable_grad():
        loss = loss_fn(leaves, batch)
        if not loss.requires_grad:
            return loss.detach(), {}
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return loss.detach(), {k: g.detach() for k, g in zip(leaves, gradients, strict=True) if g is not None}


def unused(model: Functional, params: Params, batch: Batch) -> Params:
    """Those of `params`, out of `model.params`, that the loss of the batch does not depend on."""
    used = loss_and_used_gradient(lambda p, b: model.loss_fn({**model.params, **p}, b), params, batch)[1]
    return {name: p for name, p in params.items() if name not in used}


def _loss(call: Callable[..., Any], batch: Batch, output_loss: OutputLoss | None) -> Tensor:
    if isinstance(batch, Mapping):
        if output_loss is not None:
            raise TypeError(
                "`loss_fn` goes with (x, y) pairs, got a mapping: leave `loss_fn` out if the model returns its loss, "
                "or let the dataset yield (inputs, label)."
            )
        loss = _reported_loss(call((), dict(batch)))
    else:
        if output_loss is None:
            raise TypeError(
                f"`loss_fn` is needed where instances are not mappings, got a batch of type {type(batch).__name__}: "
                "pass `loss_fn(output, y)`."
            )
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise TypeError(
                "With `loss_fn`, an instance must be an (x, y) pair, which makes a batch of two parts, got a batch of "
                f"type {type(batch).__name__}."
            )
        x, y = batch
        output = call((), dict(x)) if isinstance(x, Mapping) else call((x,))
        loss = output_loss(output, y)
    if not isinstance(loss, Tensor):
        raise TypeError(f"The loss must be a tensor, got {type(loss).__name__}.")
    return loss


def _reported_loss(output: Any) -> Any:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        held = sorted(map(str, output)) if isinstance(output, Mapping) else type(output).__name__
        raise MissingLossError(
            f'The model returned no "loss" (it returned {held}). A loss needs a label: does the instance have one?'
        )
    return loss


def _copy_sharing_parameters(model: nn.Module) -> nn.Module:
    """A deep copy that shares parameters, buffers and the vocabulary with `model`; `model` if it cannot be copied.

    Parameters of modules that it holds in lists, say, are shared too: a recording must see them and not copies.
    """
    shared: list[Any] = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        values = vars(module)
        shared += [t for t in values.values() if isinstance(t, Tensor) and t.grad_fn is not None]
        held = pytree.tree_leaves([value for value in values.values() if isinstance(value, (list, tuple, dict))])
        shared += [p for other in held if isinstance(other, nn.Module) for p in other.parameters()]
        if "vocab" in values:
            shared.append(values["vocab"])
    try:
        return copy.deepcopy(model, {id(value): value for value in shared})
    except Exception as error:
        logger.info("Cannot copy the model: %s", error)
        return model


class _Silent:
    """Stands for a metric of a stand-in: it counts nothing, and answers whatever else it is asked as the metric would.

    What a metric counts has no part in the loss. But counting branches on the data, which `vmap` and recordings refuse,
    and it is state, for which each evaluation would need a copy of the module of its own.
    """

    def __init__(self, metric: Any):
        self._metric = metric

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_metric":
            raise AttributeError(name)
        return getattr(self._metric, name)


def _silence_metrics(stand_in: nn.Module) -> None:
    for module in stand_in.modules():
        for key, value in list(vars(module).items()):
            if key not in _MODULE_KEYS:
                vars(module)[key] = _silenced(value)


def _silenced(value: Any) -> Any:
    if isinstance(value, dict) and any(map(_is_metric, value.values())):
        return {key: _silenced(item) for key, item in value.items()}
    if isinstance(value, list) and any(map(_is_metric, value)):
        return [_silenced(item) for item in value]
    return _Silent(value) if _is_metric(value) else value


def _is_metric(value: Any) -> bool:
    """Whether it is a metric as AllenNLP has them: called to count, asked by `get_metric`, emptied by `reset`."""
    kind = type(value)
    return not isinstance(value, nn.Module) and all(
        callable(getattr(kind, name, None)) for name in ("__call__", "get_metric", "reset")
    )


_MODULE_KEYS = frozenset(vars(nn.Module()))
_STATELESS = (type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.Size)
_CALLABLES = (FunctionType, MethodType, BuiltinFunctionType)


def _keeps_state(model: nn.Module) -> bool:
    """Whether a forward pass might write to Python state: metrics that count, caches, plain tensor attributes.

    Such state must not hold on to tensors of a finished transform, so each evaluation then works on its own copy.
    Transformers' modules hold their configuration and tables for loading and saving, none of which a forward pass
    writes to.
    """
    parts = set(model.modules())

    def is_constant(value: Any) -> bool:
        if isinstance(value, tuple) or (isinstance(value, (list, set)) and value):  # what starts empty is to be filled
            return all(map(is_constant, value))
        if isinstance(value, dict) and value:
            return all(map(is_constant, value.values()))
        if isinstance(value, nn.Module):
            return value in parts
        return isinstance(value, (*_STATELESS, *_CALLABLES, _Silent))

    return any(
        not is_constant(value)
        for module in model.modules()
        if not type(module).__module__.startswith(("torch.nn", "transformers."))
        for key, value in vars(module).items()
        if key not in _MODULE_KEYS and key != "vocab"
    )
