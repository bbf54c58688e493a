"""The arguments of an interpreter, checked before any work, and AllenNLP's damping translated into ours.

Here, and only here, AllenNLP's `damping` d becomes `damping = d * scale` in the units of the Hessian.
"""

import math
import numbers
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from lissa import checks

DEFAULT_DAMPING = float("3e-3")
"""AllenNLP's default. An object of its own, so that `damping is DEFAULT_DAMPING` tells whether damping was given."""


SOLVER_NAMES = ("lissa", "cg", "minres", "dense", "gauss-newton", "auto")


class LissaSettings(NamedTuple):
    """What is solved and how. None where it is to be chosen from the spectrum.

    Attributes:
        batch_size: Training examples a step.
        damping: In the units of the Hessian.
        scale: The step size is `1 / scale`.
        steps: Steps of one run.
        num_samples: Runs averaged.
        solver: One of `SOLVER_NAMES`.
        rtol: The relative residual that solvers stop at, where they choose their own steps.
    """

    batch_size: int
    damping: float | None
    scale: float | None
    steps: int | None
    num_samples: int
    solver: str = "lissa"
    rtol: float = 1e-2


def lissa_settings(
    *,
    examples: int,
    lissa_batch_size: Any,
    damping: Any,
    ridge: Any,
    scale: Any,
    recursion_depth: Any,
    num_samples: Any,
    solver: Any = "lissa",
    rtol: Any = 1e-2,
) -> LissaSettings:
    """The settings for so many training examples, from the arguments of `SimpleInfluence`.

    Example:
        >>> lissa_settings(examples=1000, lissa_batch_size=8, damping=DEFAULT_DAMPING, ridge=None, scale=1e4,
        ...                recursion_depth=0.25, num_samples=1)
        LissaSettings(batch_size=8, damping=30.0, scale=10000.0, steps=31, num_samples=1, solver='lissa', rtol=0.01)
    """
    call = "SimpleInfluence"
    checks.one_of(call, "solver", solver, SOLVER_NAMES)
    checks.positive(call, "rtol", rtol)
    checks.count(call, "lissa_batch_size", lissa_batch_size)
    checks.count(call, "num_samples", num_samples)
    scale_of_H = _auto_or(scale, lambda: checks.positive(call, "scale", scale))
    damping_of_H = _damping(call, damping, ridge, scale_of_H, solver)
    batches = math.ceil(examples / lissa_batch_size)
    steps = None if recursion_depth == "auto" else _steps(call, recursion_depth, batches)
    return LissaSettings(int(lissa_batch_size), damping_of_H, scale_of_H, steps, int(num_samples), solver, float(rtol))


def _damping(call: str, damping: Any, ridge: Any, scale: float | None, solver: str) -> float | None:
    """In the units of the Hessian: `ridge`, or AllenNLP's `damping * scale`; None where none was given."""
    given = damping is not DEFAULT_DAMPING
    if ridge is not None:
        if given:
            raise ValueError(
                f"`{call}(damping=..., ridge=...)`: give one of the two, got damping={damping} and ridge={ridge}. "
                "`ridge` is in the units of the Hessian; AllenNLP's `damping` is ridge / scale."
            )
        return _auto_or(ridge, lambda: checks.non_negative(call, "ridge", ridge))
    checks.non_negative(call, "damping", damping)
    if scale is not None and (given or solver == "lissa"):
        return float(damping) * scale
    if given:
        raise ValueError(
            f"`{call}(scale='auto')`: AllenNLP's damping is in units of 1 / scale, got damping={damping}. "
            "Give `ridge`, the damping in the units of the Hessian."
        )
    return None


def _auto_or(value: Any, check: Callable[[], None]) -> float | None:
    if isinstance(value, str) and value == "auto":
        return None
    check()
    return float(value)


def _steps(call: str, depth: Any, batches: int) -> int:
    """A float is a fraction of the batches of one pass, an int a number of steps."""
    if (
        not isinstance(depth, (float, numbers.Integral))
        or isinstance(depth, bool)
        or not math.isfinite(depth)
        or depth <= 0
    ):
        raise ValueError(
            f"`{call}(recursion_depth=...)` must be an int > 0, a number of steps, or a float > 0, a fraction of the "
            f"batches of one pass, got {depth!r}."
        )
    return int(batches * depth) if isinstance(depth, float) else int(depth)


def trainable_names(call: str, model: Any, params_to_freeze: Any) -> list[str]:
    """Parameters of `model` that require grad and match none of the patterns (`re.match`: at the start of the name)."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"`{call}(model=...)` must be a torch.nn.Module, got {type(model).__name__}.")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"`{call}(model=...)` must be a plain torch.nn.Module, got a torch.jit.ScriptModule: its parameters cannot "
            "be exchanged, so it has no loss as a function of parameters. Pass the module it was scripted from."
        )
    patterns = _patterns(call, params_to_freeze)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype.is_floating_point]
    if not trainable:
        raise ValueError(f"`{call}(model=...)` must have a parameter that requires grad, got none.")
    kept = [name for name in trainable if not any(pattern.match(name) for pattern in patterns)]
    if not kept:
        raise ValueError(
            f"`{call}(params_to_freeze={[p.pattern for p in patterns]})` freezes every parameter: {trainable}."
        )
    return kept


def _patterns(call: str, params_to_freeze: Any) -> list[re.Pattern[str]]:
    if params_to_freeze is None:
        return []
    if isinstance(params_to_freeze, (str, bytes)) or not isinstance(params_to_freeze, Iterable):
        raise TypeError(
            f"`{call}(params_to_freeze=...)` must be a list of regular expressions, got {params_to_freeze!r}. "
            "Put it in a list."
        )
    patterns = []
    for pattern in params_to_freeze:
        if not isinstance(pattern, str):
            raise TypeError(f"`{call}(params_to_freeze=...)` must hold strings, got {type(pattern).__name__}.")
        try:
            patterns.append(re.compile(pattern))
        except re.error as error:
            raise ValueError(
                f"`{call}(params_to_freeze=...)` must hold regular expressions, got {pattern!r}: {error}."
            ) from error
    return patterns


def device_of(call: str, cuda_device: Any, model: nn.Module) -> torch.device:
    """AllenNLP's `cuda_device`: -1 is the CPU, i >= 0 that GPU; a `torch.device` is itself, None is the model's."""
    if cuda_device is None:
        return next(model.parameters()).device
    if isinstance(cuda_device, torch.device):
        return cuda_device
    if isinstance(cuda_device, bool) or not isinstance(cuda_device, int):
        raise TypeError(
            f"`{call}(cuda_device=...)` must be an int, a torch.device or None, got {type(cuda_device).__name__}."
        )
    if cuda_device < 0:
        return torch.device("cpu")
    if cuda_device >= torch.cuda.device_count():
        raise ValueError(
            f"`{call}(cuda_device=...)` must be below the number of GPUs, {torch.cuda.device_count()}, "
            f"got {cuda_device}. -1 is the CPU."
        )
    return torch.device("cuda", int(cuda_device))
