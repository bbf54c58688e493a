"""Several processes that make the same calls and share the work, by `torch.distributed`.

Knows process groups, tensors and plain values; knows nothing of influence, models or instances. One process alone costs
nothing: its sum is what it has. A process that fails or dies ends the others' waiting with an error that names it.
"""

import atexit
import ctypes
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bridge.watch import LOOK_SECONDS, SILENCE_SECONDS, RankError, Watch
from lissa import Params

T = TypeVar("T")

PATIENCE = timedelta(days=30)
"""How long one process may work while the others wait, in a group made here. That it is alive is watched otherwise."""


class Ranks:
    """The processes that share the work.

    Args:
        group: Of `torch.distributed`; None is this process alone.

    Attributes:
        rank: Which of them this one is, from 0.
        size: How many there are.

    Example:
        >>> alone = Ranks()
        >>> alone.share(5), alone.gathered("a"), alone.first
        (range(0, 5), ['a'], True)
    """

    def __init__(self, group: Any = None):
        self._group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.size = dist.get_world_size(group) if group is not None else 1
        self._watch = Watch(group, self.rank, self.size) if self.size > 1 else None

    @property
    def first(self) -> bool:
        """Whether this is the one that prints and writes files."""
        return self.rank == 0

    def share(self, n: int, rank: int | None = None) -> range:
        """This process's part, or another's, of `range(n)`: all as long, give or take one, in order of rank."""
        rank = self.rank if rank is None else rank
        return range(rank * n // self.size, (rank + 1) * n // self.size)

    def of_share(self, rows: Sequence[int], n: int) -> list[int]:
        """Those of `rows`, below n, that are this process's, in their order."""
        share = self.share(n)
        return [i for i in rows if i in share] if self.size > 1 else list(rows)

    def sum(self, tensors: Params, weight: float = 1.0) -> Params:
        """`sum_r weight_r tensors_r`, the same on all; also inside `torch.vmap`. One message a dtype.

        A process alone returns what it has, so its weight must be 1.
        """
        if self._watch is None:
            return tensors
        found = {}
        for dtype in dict.fromkeys(t.dtype for t in tensors.values()):
            some = {name: t for name, t in tensors.items() if t.dtype == dtype}
            flat = torch.cat([t.reshape(-1) for t in some.values()])
            flat = _Sum.apply(flat if weight == 1.0 else flat.mul_(weight), self)
            parts = flat.split([t.numel() for t in some.values()])
            found |= {name: part.reshape(t.shape) for (name, t), part in zip(some.items(), parts, strict=True)}
        return {name: found[name] for name in tensors}

    def gathered(self, value: T) -> list[T]:
        """Each process's value, in order of rank; tensors of others come on the CPU."""
        if self._watch is None:
            return [value]
        data = _packed(value)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self._device) for _ in range(self.size)]
        self._run(dist.all_gather, sizes, torch.tensor([len(data)], device=self._device))
        longest = max(int(size) for size in sizes)
        padded = torch.nn.functional.pad(data, (0, longest - len(data))).to(self._device)
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        self._run(dist.all_gather, parts, padded)
        return [_unpacked(part[: int(size)]) for part, size in zip(parts, sizes, strict=True)]

    def agreed(self, value: T) -> T:
        """The first process's value."""
        if self._watch is None:
            return value
        data = _packed(value if self.first else None)
        size = torch.tensor([len(data)], device=self._device)
        source = dist.get_global_rank(self._group, 0)
        self._run(dist.broadcast, size, source)
        data = data.to(self._device) if self.first else torch.empty(int(size), dtype=torch.uint8, device=self._device)
        self._run(dist.broadcast, data, source)
        return value if self.first else _unpacked(data)

    def most(self, value: int) -> int:
        """The largest of the processes' values."""
        return max(self.gathered(value))

    def raise_first(self, check: Callable[[], None]) -> None:
        """Calls `check` on each process; if it raises a ValueError on any, all raise that of the lowest rank."""
        told = None
        try:
            check()
        except ValueError as error:
            if self._watch is None:
                raise
            told = error
        for error in self.gathered(told):
            if error is not None:
                raise error

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around what all do together: if it fails here, the others are told."""
        if self._watch is None:
            yield
            return
        self._watch.begin()
        try:
            yield
        except RankError:
            raise
        except KeyboardInterrupt:
            # A launcher ends the others when one is gone, before they had the time to find out which.
            if self._watch.broken is not None:
                raise self._watch.explained(self._watch.broken) from None
            self._watch.tell("was interrupted")
            raise
        except BaseException as error:
            self._watch.tell(f"failed with {type(error).__name__}: {error}")
            raise

    @property
    def _device(self) -> torch.device:
        """Where a message must be: NCCL takes none from the CPU."""
        on_gpu = dist.get_backend(self._group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    def _reduce(self, flat: Tensor) -> Tensor:
        """The sum over processes, in place of `flat` where it can be."""
        message = flat.detach().contiguous().to(self._device if self._device.type == "cuda" else flat.device)
        self._run(dist.all_reduce, message)
        return message.to(flat.device)

    def _run(self, collective: Callable[..., Any], *args: Any) -> None:
        """A collective, and while it waits, a look at the others from time to time."""
        watch: Any = self._watch
        try:
            work = collective(*args, group=self._group, async_op=True)
        except RuntimeError as error:
            raise watch.explained(error) from error
        while True:
            try:
                work.wait(timedelta(seconds=LOOK_SECONDS))
                return
            except RuntimeError as error:
                if "timed out" not in str(error).lower() or work.is_completed():
                    raise watch.explained(error) from error
                watch.look(SILENCE_SECONDS)


class _Sum(torch.autograd.Function):
    """A sum over processes is one for each number, so it is the same inside `vmap`."""

    @staticmethod
    def forward(flat: Tensor, ranks: Ranks) -> Tensor:
        return ranks._reduce(flat)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        flat, ranks = args
        return _Sum.apply(flat.movedim(in_dims[0], 0), ranks), 0


_ranks: dict[Any, Ranks] = {}


def ranks_of(call: str, process_group: Any, device: torch.device) -> Ranks:
    """The processes that share the work of this one.

    Args:
        call: For errors.
        process_group: `"all"`: every process of `torch.distributed`, if it is initialised or torchrun started this
            process, which then initialises it; a group, whose timeout bounds how long one may wait for another; or
            None, this process alone.
        device: Where the work is done: it decides what connects processes that torchrun started.

    Raises:
        TypeError: If `process_group` is something else.
    """
    if process_group is None or not dist.is_available():
        return Ranks()
    if isinstance(process_group, str) and process_group == "all":
        if not dist.is_initialized():
            if not launched():
                return Ranks()
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=PATIENCE)
            atexit.register(_leave)
        group = dist.group.WORLD
    elif isinstance(process_group, dist.ProcessGroup):
        group = process_group
    else:
        raise TypeError(
            f"`{call}(process_group=...)` must be 'all', None or a torch.distributed process group, got "
            f"{type(process_group).__name__}."
        )
    if dist.get_rank(group) < 0:
        raise ValueError(f"`{call}(process_group=...)`: this process, rank {dist.get_rank()}, is not in the group.")
    if group not in _ranks:
        _ranks[group] = Ranks(group)
    return _ranks[group]


def launched() -> bool:
    """Whether torchrun started this process, among others."""
    return dist.is_available() and dist.is_torchelastic_launched() and int(os.environ.get("WORLD_SIZE", "1")) > 1


def first_here() -> bool:
    """Whether this process is the only one, or the first that torchrun started: the one that prints and writes."""
    return not launched() or os.environ.get("RANK") == "0"


def second_here() -> bool:
    """Whether this is the process that has the word where the first is gone."""
    return launched() and os.environ.get("RANK") == "1"


def local_device(device: torch.device) -> torch.device:
    """`device`, or where that leaves open which GPU, this process's own."""
    if device.type == "cuda" and device.index is None and launched():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


def check_whole(call: str, model: nn.Module) -> None:
    """A ValueError if the model is one process's part of a model, or wraps it."""
    tensors = sys.modules.get("torch.distributed.tensor")  # loads slowly, and where it is not there is no DTensor
    for name, p in model.named_parameters():
        if tensors is not None and isinstance(p, tensors.DTensor):
            raise ValueError(
                f"`{call}(model=...)` must hold whole parameters, got a DTensor as {name!r}, as FSDP2 makes them: a "
                "sharded parameter cannot be differentiated twice here. Supported is the same whole model on each "
                "process, the data being shared: load a copy, or use `p.full_tensor()` of each parameter."
            )
    kind = type(model).__name__
    if kind in ("DistributedDataParallel", "FullyShardedDataParallel"):
        raise ValueError(f"`{call}(model=...)` must be the model itself, got it inside {kind}: pass `model.module`.")


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _packed(value: Any) -> Tensor:
    on_cpu = pytree.tree_map(lambda leaf: leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf, value)
    return torch.frombuffer(bytearray(pickle.dumps(on_cpu)), dtype=torch.uint8)


def _unpacked(data: Tensor) -> Any:
    data = data.cpu()
    return pickle.loads(ctypes.string_at(data.data_ptr(), len(data)))
