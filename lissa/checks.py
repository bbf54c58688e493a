"""Argument checks at the public boundary: each error names the call, the argument, the rule and what was got.

Knows shapes and types, not algorithms. Reads metadata only, so a check costs no device synchronisation.
"""

import functools
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lissa import tree
from lissa.types import Params


def params(call: str, value: Any, name: str = "params") -> None:
    """`value` must be a non-empty dict of floating-point tensors."""
    if not isinstance(value, Mapping):
        raise TypeError(f"`{call}({name}=...)` must be a dict of tensors, got {type(value).__name__}.")
    if not value:
        raise ValueError(f"`{call}({name}=...)` must hold at least one tensor, got an empty dict.")
    for key, tensor in value.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"`{call}({name}=...)` must be a dict of tensors, got {type(tensor).__name__} at {key!r}.")
        if not tensor.dtype.is_floating_point:
            raise TypeError(
                f"`{call}({name}=...)` must hold floating-point tensors, got {tensor.dtype} at {key!r}. "
                "Keep integer buffers out of the parameter dict: close over them in the loss."
            )


def point(call: str, value: Any) -> None:
    """`value` must be parameters, and derivatives at it possible here.

    In torch 2.11 and before, inference mode makes those of torch.func zero without a word.
    """
    params(call, value)
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled() and not differentiates_in_inference():
        raise RuntimeError(IN_INFERENCE_MODE.format(call))


IN_INFERENCE_MODE = (
    "`{}` takes derivatives, which torch leaves out inside `torch.inference_mode()`. Use `torch.no_grad()` there, "
    "which changes nothing here."
)


def vector(call: str, like: Params, value: Any, name: str = "v", of: str = "params") -> None:
    """`value` must have the keys, shapes, dtypes and devices of `like`."""
    params(call, value, name)
    if value.keys() != like.keys():
        missing, extra = sorted(like.keys() - value.keys()), sorted(value.keys() - like.keys())
        raise ValueError(
            f"`{call}({name}=...)` must have the keys of {of}: missing keys {missing}, extra keys {extra}."
        )
    for key, tensor in like.items():
        for attribute, error in (("shape", ValueError), ("dtype", TypeError), ("device", ValueError)):
            expected, got = getattr(tensor, attribute), getattr(value[key], attribute)
            if expected != got:
                raise error(
                    f"`{call}({name}=...)` must have the {attribute} of {of}: {key!r} has {_plain(expected)}, "
                    f"got {_plain(got)}."
                )


def is_stacked(call: str, like: Params, value: Any, name: str) -> bool:
    """Whether `value` holds K vectors, each tensor with one more dimension in front, after checking that it fits."""
    params(call, value, name)
    extra = {value[k].ndim - p.ndim for k, p in like.items() if k in value}
    stacked = extra == {1}
    one = tree.map(lambda t: t[0], value) if stacked and all(len(t) for t in value.values()) else value
    vector(call, like, one, name)
    if stacked and len({len(t) for t in value.values()}) != 1:
        raise ValueError(
            f"`{call}({name}=...)` must hold equally many vectors under each key, got "
            f"{ {k: len(t) for k, t in value.items()} }."
        )
    return stacked


def stacked_vectors(call: str, like: Params, value: Any, name: str) -> None:
    """`value` must hold K >= 1 vectors of the keys, shapes, dtypes and devices of `like`."""
    stacked(call, value, name)
    vector(call, like, tree.map(lambda t: t[0], value), name)


def stacked(call: str, value: Any, name: str) -> None:
    """`value` must hold K >= 1 vectors: each tensor with a dimension of the same size K in front."""
    params(call, value, name)
    sizes = {k: len(t) if t.ndim else None for k, t in value.items()}
    if None in sizes.values() or len(set(sizes.values())) > 1:
        raise ValueError(
            f"`{call}({name}=...)` must hold equally many vectors under each key, stacked along a dimension in front, "
            f"got {sizes}."
        )
    if 0 in sizes.values():
        raise ValueError(f"`{call}({name}=...)` must hold at least one vector, got none.")


def scalar_loss(
    call: str, loss_fn: Callable[[Any, Any], Tensor], name: str = "loss_fn"
) -> Callable[[Any, Any], Tensor]:
    """`loss_fn`, checked each time it is called to return one floating-point number, shape `()`."""

    def checked(argument: Any, batch: Any) -> Tensor:
        loss = loss_fn(argument, batch)
        if not isinstance(loss, Tensor):
            raise TypeError(f"`{call}({name}=...)` must return a tensor, got {type(loss).__name__}.")
        if loss.shape != ():
            raise ValueError(
                f"`{call}({name}=...)` must return a scalar, the mean loss of the batch, "
                f"got shape {tuple(loss.shape)}. Add `.mean()`."
            )
        return loss

    return checked


def deterministic(
    call: str, loss_fn: Callable[[Any, Any], Tensor], like: Params, name: str = "loss_fn"
) -> Callable[[Any, Any], Tensor]:
    """`loss_fn`, checked each time it is called to draw no random numbers on the devices of `like`."""
    devices = {t.device for t in like.values()}

    def checked(argument: Any, batch: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return loss_fn(argument, batch)
        before = _random_states(devices)
        loss = loss_fn(argument, batch)
        if any(not torch.equal(a, b) for a, b in zip(before, _random_states(devices), strict=True)):
            raise ValueError(
                f"`{call}({name}=...)` must be deterministic, but it drew random numbers: its derivatives would be "
                "those of another function each time. Put the model in eval mode, which switches dropout off, or draw "
                "the numbers before and pass them in the batch."
            )
        return loss

    return checked


def finite(call: str, name: str, value: Any) -> None:
    """`value` must be a finite number."""
    _number(call, name, value)
    if not math.isfinite(value):
        raise ValueError(f"`{call}({name}=...)` must be finite, got {value}.")


def positive(call: str, name: str, value: Any) -> None:
    """`value` must be a finite number > 0."""
    finite(call, name, value)
    if not value > 0:
        raise ValueError(f"`{call}({name}=...)` must be > 0, got {value}.")


def non_negative(call: str, name: str, value: Any) -> None:
    """`value` must be a finite number >= 0."""
    finite(call, name, value)
    if not value >= 0:
        raise ValueError(f"`{call}({name}=...)` must be >= 0, got {value}.")


def count(call: str, name: str, value: Any, at_least: int = 1) -> None:
    """`value` must be an int >= `at_least`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"`{call}({name}=...)` must be an int, got {type(value).__name__}.")
    if value < at_least:
        raise ValueError(f"`{call}({name}=...)` must be >= {at_least}, got {value}.")


def one_of(call: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    """`value` must be one of `choices`."""
    if value not in choices:
        raise ValueError(f"`{call}({name}=...)` must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def generator(call: str, value: Any) -> None:
    """`value` must be a torch.Generator."""
    if not isinstance(value, torch.Generator):
        raise TypeError(
            f"`{call}(generator=...)` must be a torch.Generator, got {type(value).__name__}. "
            "Use torch.Generator().manual_seed(0)."
        )


@functools.cache
def differentiates_in_inference() -> bool:
    """Whether torch.func does its work in inference mode."""
    with torch.inference_mode():
        return float(torch.func.grad(torch.square)(torch.ones(()))) == 2.0


def _random_states(devices: set[torch.device]) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return states + [torch.cuda.get_rng_state(device) for device in devices if device.type == "cuda"]


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, torch.Size) else value


def _number(call: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{call}({name}=...)` must be a number, got {type(value).__name__}.")
