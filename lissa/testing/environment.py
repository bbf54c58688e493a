"""Watches what a call may not touch: global random states, switches and its arguments."""

import pickle
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def nothing_global_changes(broken: Any) -> Iterator[None]:
    """Raises `broken(what, cause)` if the block reads or sets a global random state, grad mode or the default dtype."""
    with global_state_kept():
        _seed(_UNUSUAL)  # a state that no code sets by itself: setting a seed is a change, whatever was set before
        before = _environment()
        yield
        after = _environment()
    for what, now, then in zip(("torch's", "Python's", "NumPy's"), after, before, strict=False):
        if now != then:
            raise broken(f"{what} global random state", "randomness must come from a generator that the caller passes")
    if after != before:
        raise broken("grad mode or the default dtype", "restore global switches in a `finally`")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Global random states set from `seed` inside the block, and put back after it."""
    with global_state_kept():
        _seed(seed)
        yield


@contextmanager
def global_state_kept() -> Iterator[None]:
    """Puts global random states, grad mode and the default dtype back after the block."""
    numpy = sys.modules.get("numpy")
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state() if numpy else None
    grad_mode, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        if numpy:
            numpy.random.set_state(states[2])
        torch.set_grad_enabled(grad_mode)
        torch.set_default_dtype(dtype)


def first_change(now: dict[str, Tensor], then: dict[str, Tensor]) -> str | None:
    """What differs between two dicts of tensors, in words; None if they are equal to the bit and in order."""
    if list(now) != list(then):
        return "its keys"
    return next((f"[{k!r}]" for k in then if not torch.equal(now[k].detach(), then[k].detach())), None)


_UNUSUAL = 1_618_033_988


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed)


def _environment() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    return (
        torch.get_rng_state().view(torch.int64).tolist(),
        random.getstate(),
        pickle.dumps(numpy.random.get_state()) if numpy else None,
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
    )
