"""Removes the overhead of calling one function many times at the same shapes: record its operations, replay them.

`traced(fn)` replays the recorded operations one by one; `compiled(fn)` has TorchInductor turn them into machine code.
Both know nothing of what `fn` computes. Recording drops work whose result is not used, and everything that `torch.func`
does between the operations.
"""

import dataclasses
import functools
import itertools
import logging
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from lissa import checks
from lissa.failures import say_once
from lissa.graph_passes import simplified
from lissa.kernels import without_onednn

logger = logging.getLogger(__name__)

MAX_TRACES = 8
"""Different shapes that are recorded before further ones run as they are: full and ragged batches, a few numbers of
vectors. A program costs seconds to compile and holds no data."""

SAME = 100.0
"""A replay may differ from the function by `10 sqrt(u)`, relative to its size: reordered sums differ by far less, a
wrong number by more."""

Program: TypeAlias = Callable[..., tuple[Tensor, ...]]
"""A recorded function of tensors alone."""


def traced(fn: Callable[..., Any], *, max_traces: int = MAX_TRACES) -> Callable[..., Any]:
    """`fn`, recorded once for each shape of its arguments with `make_fx`, and replayed from then on.

    As with `jax.jit`, `fn` must be pure: a result may depend on its arguments alone. Arguments are tensors, tuples,
    lists and dicts of them, and hashable constants. What `functools.partial` binds counts as an argument, so
    `traced(partial(hvp, loss_fn, params))` never sees stale parameters; what a closure captures, such as the frozen
    part or the buffers of a module, must not change while `traced`'s result lives.

    Under `vmap` the whole vmapped function is recorded, so that K vectors cost one program, not one with K times the
    overhead. The result is a constant to autograd: differentiate `fn` itself.

    Where recording fails (a branch on data, packed sequences) or its first replay differs from `fn`, `fn` itself runs,
    and the log says so once.

    Args:
        fn: Any function of tensors, for instance `partial(hvp, loss_fn, params)`.
        max_traces: Shapes that are recorded at most; further ones run as they are. Shapes include the ragged last batch
            of a pass, and each number of vectors under `vmap`.

    Returns:
        A function with the signature and the results of `fn`, up to rounding.

    Raises:
        ValueError: If `max_traces` is < 1.

    Example:
        >>> from functools import partial
        >>> from lissa import hvp
        >>> def loss_fn(params, x):
        ...     return (params["w"] ** 3 * x).sum()
        >>> matvec = traced(partial(hvp, loss_fn, {"w": torch.tensor([1.0, 2.0])}))
        >>> matvec(torch.ones(2), {"w": torch.tensor([1.0, 10.0])})
        {'w': tensor([  6., 120.])}
    """
    checks.count("traced", "max_traces", max_traces)
    return _specialised("traced", fn, _record, max_traces)


def compiled(fn: Callable[..., Any], *, max_traces: int = MAX_TRACES) -> Callable[..., Any]:
    """`traced(fn)`, with each recording compiled by TorchInductor: seconds for an MLP, half a minute for a transformer.

    Where there is no compiler on the machine the recording is replayed as `traced` does, and the log says so once.

    Args:
        fn: Any function of tensors, see `traced`.
        max_traces: Shapes that are compiled at most; further ones run as they are.

    Returns:
        A function with the signature and the results of `fn`, up to rounding.

    Raises:
        ValueError: If `max_traces` is < 1.
    """
    checks.count("compiled", "max_traces", max_traces)
    return _specialised("compiled", fn, _compile, max_traces)


@dataclasses.dataclass(frozen=True, eq=False)
class _Function:
    """`fn` as a function of its tensors alone, under the `vmap`s around it (innermost first).

    `structure` is how the tensors and `constants` make up the arguments; `outputs` learns how its results make up the
    result of `fn`. `programs` holds, for each layout of the tensors seen so far, its check and what to run.
    """

    fn: Callable[..., Any]
    structure: Hashable
    constants: tuple[Any, ...]
    outputs: list[Any] = dataclasses.field(default_factory=list)
    levels: tuple[tuple[int | None, ...], ...] = ()
    under: dict[tuple[int | None, ...], "_Function"] = dataclasses.field(default_factory=dict)
    programs: list[tuple[Callable[..., bool], Program]] = dataclasses.field(default_factory=list)

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
            args, kwargs = _unflatten(self.structure, iter(tensors), iter(self.constants))
            results: list[Tensor] = []
            constants: list[Any] = []
            self.outputs[:] = _flatten(self.fn(*args, **kwargs), results, constants), constants
            return tuple(results)

        for in_dims in self.levels:
            flat = torch.vmap(flat, in_dims=in_dims)
        with torch.no_grad():
            return flat(*tensors)

    def program(self, tensors: tuple[Tensor, ...]) -> Program | None:
        """What was built for the layout of these tensors."""
        return next((program for matches, program in self.programs if matches(*tensors)), None)

    def vmapped(self, in_dims: tuple[int | None, ...]) -> "_Function":
        if in_dims not in self.under:
            self.under[in_dims] = dataclasses.replace(self, levels=(*self.levels, in_dims), under={}, programs=[])
        return self.under[in_dims]


Build: TypeAlias = Callable[[_Function, tuple[Tensor, ...]], Program]
Run: TypeAlias = Callable[..., tuple[Tensor, ...]]


def _specialised(call: str, fn: Callable[..., Any], build: Build, max_traces: int) -> Callable[..., Any]:
    """`fn` by a program for the shapes at hand, which is `build` when they are first seen."""
    functions: dict[Hashable, _Function] = {}
    traces = itertools.count()
    base, bound_args, bound_kwargs = _unbind(fn)

    def run(function: _Function, *tensors: Tensor) -> tuple[Tensor, ...]:
        """On plain tensors that do not require grad, outside of all transforms."""
        program = function.program(tensors)
        if program is None:  # a tensor given twice would be recorded as one argument, and its check fails
            tensors = tuple(t.detach() for t in tensors)
            program = function.program(tensors)
        if program is not None:
            return program(*tensors)
        if next(traces) >= max_traces:
            say_once(
                logger,
                f"{call}(max_traces={max_traces}) met more shapes than that: further ones run as they are. Use batches "
                "of one size (drop_last=True), or raise max_traces.",
            )
            return function(*tensors)
        expected = function(*tensors)
        function.programs.append((_layout(tensors), _checked(call, build, function, tensors, expected)))
        return expected

    @functools.wraps(base)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        tensors: list[Tensor] = []
        constants: list[Any] = []
        try:
            structure = _flatten(((*bound_args, *args), {**bound_kwargs, **kwargs}), tensors, constants)
        except _OpaqueError as error:
            say_once(logger, f"{call}(...) runs its function as it is: {error}")
            return fn(*args, **kwargs)
        autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
        key = structure, tuple([(type(c), c) for c in constants]), autocast  # with types, as 1 == 1.0 == True
        function = functions.get(key)
        if function is None:
            function = functions[key] = _Function(base, structure, tuple(constants))
        # What autograd.Function.apply itself asks; to ask first saves its 15 microseconds.
        if torch._C._are_functorch_transforms_active():
            results = _Replay.apply(run, function, *tensors)
        else:
            results = run(function, *[t if type(t) is Tensor and not t.requires_grad else t.detach() for t in tensors])
        return _unflatten(function.outputs[0], iter(results), iter(function.outputs[1]))

    return wrapper


def _record(function: _Function, tensors: tuple[Tensor, ...]) -> torch.fx.GraphModule:
    """The operations of `function`, without those whose result is not used, in fewer and larger matrix products.

    Recorded on tensors without data, so that an operation that would look into them fails instead of being fixed.
    """
    with without_onednn():
        graph = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)
    graph.graph.eliminate_dead_code()
    return simplified(graph)


def _compile(function: _Function, tensors: tuple[Tensor, ...]) -> Program:
    recording = _record(function, tensors)
    try:
        return _machine_code(recording, tensors)
    except Exception as error:  # whatever a missing or broken compiler raises
        say_once(logger, f"compiled(...) cannot compile here and replays its recording: {_first_line(error)}")
        return recording


def _machine_code(recording: torch.fx.GraphModule, tensors: tuple[Tensor, ...]) -> Program:
    """The recording compiled by TorchInductor, without its wrappers where they do nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, on import; it takes seconds, so only who compiles pays for it
        from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    kernels: list[Any] = []

    def keep(*args: Any, **options: Any) -> Any:
        kernels.append(compile_fx_inner(*args, **options))
        return kernels[-1]

    program: Any = compile_fx(recording, list(tensors), inner_compile=keep)  # type: ignore[arg-type]
    with torch.no_grad():
        results = program(*tensors)
    return _without_wrappers(kernels, tensors, results) or (lambda *tensors: tuple(program(*tensors)))


def _without_wrappers(kernels: list[Any], tensors: tuple[Tensor, ...], results: Sequence[Tensor]) -> Program | None:
    """The generated code itself, where it maps these tensors to these results: it is the whole program.

    TorchInductor's wrappers care for arguments that are written to and results that are views of them, in 10 to 20
    microseconds a call, as long as a small product takes.
    """
    call = getattr(kernels[0], "current_callable", None) if len(kernels) == 1 else None
    if call is None:
        return None
    try:
        bare = call(list(tensors))
    except Exception:  # it takes other arguments
        return None
    owned = {t.untyped_storage().data_ptr() for t in tensors}
    if len(bare) != len(results) or any(
        not isinstance(b, Tensor)
        or (b.shape, b.stride(), b.dtype, b.device) != (r.shape, r.stride(), r.dtype, r.device)
        or not torch.equal(b.nan_to_num(), r.nan_to_num())
        or b.untyped_storage().data_ptr() in owned
        for b, r in zip(bare, results, strict=True)
    ):
        return None
    return lambda *tensors: tuple(call(list(tensors)))


def _checked(
    call: str, build: Build, function: _Function, tensors: tuple[Tensor, ...], expected: tuple[Tensor, ...]
) -> Program:
    """The program, or `function` itself where it cannot be built or would give other numbers."""
    size = sum(float(t.double().norm() ** 2) for t in expected) ** 0.5
    try:
        program = build(function, tensors)
        with torch.no_grad():
            got = program(*tensors)
        gap = sum(float((a.double() - b.double()).norm() ** 2) for a, b in zip(got, expected, strict=True)) ** 0.5
    except Exception as error:  # anything may fail inside of a user's function; it has just run as it is
        say_once(logger, f"{call}(...) runs its function as it is, because: {_first_line(error)}")
        return function
    unit_roundoff = max((torch.finfo(t.dtype).eps for t in expected if t.dtype.is_floating_point), default=0.0)
    if gap > SAME**0.5 * unit_roundoff**0.5 * size:
        say_once(logger, f"{call}(...) runs its function as it is: the replay differs by {gap / size:.0e}")
        return function
    return program


class _Replay(torch.autograd.Function):
    """Leaves the transforms around a call: `vmap` becomes part of the function, `grad` and `jvp` are refused."""

    @staticmethod
    def forward(run: Run, function: _Function, *tensors: Tensor) -> tuple[Tensor, ...]:
        return run(function, *(t.detach() for t in tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        run, function, *tensors = args
        results = _Replay.apply(run, function.vmapped(in_dims[2:]), *tensors)
        return results, (0,) * len(results)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise _not_differentiable()

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise _not_differentiable()


def _not_differentiable() -> NotImplementedError:
    return NotImplementedError(
        "What `traced(fn)` and `compiled(fn)` return cannot be differentiated. Differentiate `fn`, and trace that."
    )


class _OpaqueError(TypeError):
    """An argument that a recording could not tell from another one of its kind."""


_CONSTANTS = (int, float, str, type(None), torch.dtype, torch.device)


def _flatten(value: Any, tensors: list[Tensor], constants: list[Any]) -> Hashable:
    """The structure of `value`, whose leaves are appended to `tensors` and `constants`.

    torch's own pytrees take 15 microseconds where this takes 2: as long as a small compiled product.
    """
    kind = type(value)
    if kind is Tensor:
        tensors.append(value)
        return Tensor
    if kind is tuple or kind is dict or isinstance(value, (tuple, list, dict)):
        parts = []
        is_dict = isinstance(value, dict)
        for part in value.values() if is_dict else value:
            if type(part) is Tensor:  # most are: the call would take longer than the rest
                tensors.append(part)
                parts.append(Tensor)
            else:
                parts.append(_flatten(part, tensors, constants))
        return kind, tuple(value) if is_dict else None, tuple(parts)
    if isinstance(value, Tensor):
        tensors.append(value)
        return Tensor
    if isinstance(value, _CONSTANTS) or callable(value):
        constants.append(value)
        return None
    raise _OpaqueError(
        f"an argument holds a {kind.__name__}, and only tensors, tuples, lists and dicts of them, numbers, strings and "
        "functions can be told apart from call to call."
    )


def _unflatten(structure: Any, tensors: Iterator[Tensor], constants: Iterator[Any]) -> Any:
    """The value whose `_flatten` is `structure`."""
    if structure is Tensor:
        return next(tensors)
    if structure is None:
        return next(constants)
    kind, keys, parts = structure
    values = [_unflatten(part, tensors, constants) for part in parts]
    if keys is not None:
        return kind(zip(keys, values, strict=True))
    return kind(*values) if hasattr(kind, "_fields") else kind(values)


def _layout(tensors: tuple[Tensor, ...]) -> Callable[..., bool]:
    """Whether tensors have the shapes, strides, dtypes and devices of these, and none is given twice.

    Checked by torch.compile's own guards, in a microsecond where Python takes 20.
    """
    if not tensors:
        return lambda: True
    guards: Any = torch._C._dynamo.guards  # type: ignore[attr-defined]
    return guards.TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check


def _unbind(fn: Callable[..., Any]) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """The function under `functools.partial`, and what is bound."""
    if isinstance(fn, functools.partial):
        return fn.func, fn.args, fn.keywords
    return fn, (), {}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"
