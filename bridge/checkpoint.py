"""A long run's state on disk: it can be killed at any moment and goes on from there.

Knows files, tensors and plain values, and what makes two runs the same; knows nothing of influence or solvers.

A state is a file of `torch.save`, readable with `torch.load(..., weights_only=True)`: named values, and the fingerprint
of the run that they belong to. Its name ends in the SHA-256 of its content, and it gets that name once it is complete
and on disk: a file that was cut short, or has changed since, is known by its name, and the one before it is used.
"""

import hashlib
import logging
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

logger = logging.getLogger(__name__)

T = TypeVar("T")

Fingerprint = Mapping[str, str | float]
"""What must be the same for a run to go on, by name. A number may differ by `AGREES`; a text may not."""

AGREES = 1e-3
"""Relative difference of numbers that are the same but for rounding, such as a loss on other hardware."""

KEPT = 2
"""States of one name that are kept: the latest, and the one to go back to if it is damaged."""

COPIES = KEPT + 1
"""States that are on disk while one is being written."""

SHARE_OF_TIME = 0.1
"""Of a run's time, at most so much is spent on writing states, whatever interval was asked for."""


class CheckpointError(ValueError):
    """The directory cannot be used, or holds the state of another run."""


class Directory(NamedTuple):
    """States in a directory, each under a name.

    Attributes:
        path: The directory.
    """

    path: Path

    def check(self, call: str) -> None:
        """Raises a CheckpointError unless a file can be written here; the directory is made if it is not there."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f"probe.{uuid.uuid4().hex}.tmp"
            probe.write_bytes(b"\0")
            probe.unlink()
        except OSError as error:
            raise CheckpointError(
                f"`{call}(checkpoint_dir={str(self.path)!r})` cannot be written to: {error.strerror or error}."
            ) from error

    def check_space(self, call: str, needed: int) -> None:
        """Raises a CheckpointError unless `needed` bytes are free."""
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise CheckpointError(
                f"`{call}(checkpoint_dir={str(self.path)!r})` needs about {needed:,} bytes for its states, and "
                f"{free:,} are free there."
            )

    def write(self, name: str, state: Any) -> None:
        """`state` under `name`; the one before it is kept. After a crash either is there, never a part of one."""
        temporary = self.path / f"{name}.{uuid.uuid4().hex}.tmp"
        digest = hashlib.sha256()
        try:
            with temporary.open("wb") as file:
                torch.save(state, _Hashed(file, digest))  # pyright: ignore[reportArgumentType]
                file.flush()
                os.fsync(file.fileno())
            before = self._files(name)
            number = 1 + (_number(before[0]) if before else 0)
            os.replace(temporary, self.path / f"{name}.{number:08d}.{digest.hexdigest()}.pt")
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        self._sync()
        for old in self._files(name)[KEPT:]:
            old.unlink(missing_ok=True)

    def write_values(self, name: str, fingerprint: Fingerprint, values: dict[str, Any]) -> None:
        """The values of a run, with its fingerprint; see `belonging`."""
        self.write(name, {"fingerprint": dict(fingerprint), "values": values})

    def read(self, name: str) -> Any:
        """The latest state under `name` that is whole, on the CPU; None if there is none."""
        for left in self.path.glob(f"{name}.*.tmp"):
            left.unlink(missing_ok=True)
        for path in self._files(name):
            if _sha256(path) == path.name.split(".")[-2]:
                return torch.load(path, map_location="cpu", weights_only=True)
            logger.warning("The state in %s is damaged; the one before it is used, if there is one.", path)
        return None

    def _files(self, name: str) -> list[Path]:
        """The files of a name, latest first."""
        return sorted(self.path.glob(f"{name}.*.pt"), key=_number, reverse=True)

    def _sync(self) -> None:
        """Renames are on disk once their directory is; not every system can say so."""
        try:
            handle = os.open(self.path, os.O_RDONLY)
        except OSError:
            return
        try:
            os.fsync(handle)
        except OSError:
            pass
        finally:
            os.close(handle)


def differences(before: Fingerprint, now: Fingerprint) -> list[str]:
    """What differs between two fingerprints, in words.

    Example:
        >>> differences({"seed": "0", "damping": "0.1"}, {"seed": "1", "damping": "0.1"})
        ["seed ('0', now '1')"]
    """
    found = []
    for name in [*before, *(name for name in now if name not in before)]:
        old, new = before.get(name), now.get(name)
        if isinstance(old, float) and isinstance(new, float):
            same = abs(old - new) <= AGREES * max(abs(old), abs(new)) or old == new
        else:
            same = old == new
        if same:
            continue
        if old is None or new is None:
            found.append(f"{name} ({'is new' if old is None else 'is gone'})")
        else:
            digests = isinstance(old, str) and len(old) == _DIGEST and isinstance(new, str) and len(new) == _DIGEST
            found.append(f"{name} (other content)" if digests else f"{name} ({old!r}, now {new!r})")
    return found


class Record:
    """What a call has found so far, by name, and when to write it down.

    Values are tensors, numbers, texts, None, and lists and dicts of them.

    Args:
        write: Writes all values; None where nothing is to be kept.
        values: What an earlier run left.
        every: Seconds between two writes.
        device: Where tensors that an earlier run left are wanted.

    Example:
        >>> record = Record(None, {"sum": 3})
        >>> record.once("sum", lambda part: 1 + 2), record.once("product", lambda part: 1 * 2)
        (3, 2)
    """

    def __init__(
        self,
        write: Callable[[dict[str, Any]], None] | None = None,
        values: dict[str, Any] | None = None,
        *,
        every: float = 0.0,
        device: torch.device | None = None,
    ):
        self._book = _Book(write, dict(values or {}), every)
        self._prefix = ""
        self._device = device

    @property
    def kept(self) -> bool:
        """Whether anything is ever written."""
        return self._book.write is not None

    @property
    def every(self) -> float:
        """Seconds between two writes; endless if nothing is ever written."""
        return self._book.every if self.kept else math.inf

    def get(self, key: str) -> Any:
        """The value of `key`, its tensors on the device; None if there is none."""
        value = self._book.values.get(self._prefix + key)
        return value if self._device is None else _to(value, self._device)

    def once(self, key: str, compute: Callable[["Record"], T]) -> T:
        """The value of `key`, computed if an earlier run did not; what was kept on the way there is then forgotten.

        Args:
            key: Its name.
            compute: Given a record of its own, for what it wants to keep on the way.
        """
        found: Any = self.get(key)
        if found is not None:
            return found
        part = self.part(key)
        value = compute(part)
        if self.kept:
            for known in [known for known in self._book.values if known.startswith(part._prefix)]:
                del self._book.values[known]
            self.note(key, value)
            self.save(only_if_due=True)
        return value

    def part(self, key: str) -> "Record":
        """A record whose names begin with `key`, written with this one."""
        part = Record()
        part._book, part._prefix, part._device = self._book, f"{self._prefix}{key}/", self._device
        return part

    def note(self, key: str, value: Any) -> None:
        """Keeps a value, to be written with the next."""
        if self.kept:
            self._book.values[self._prefix + key] = _to(value, torch.device("cpu"))
            self._book.news = True

    def put(self, key: str, value: Any) -> None:
        """Keeps a value, and writes all."""
        self.note(key, value)
        self.save()

    def due(self) -> bool:
        """Whether it is time to write."""
        return self.kept and self._book.due()

    def save(self, *, only_if_due: bool = False) -> None:
        """Writes all values, if there is news. If that fails, what was there stays, and the log says so."""
        if self.kept and self._book.news and (not only_if_due or self.due()):
            self._book.save()


class _Book:
    """The values of a record and of its parts, and the clock."""

    def __init__(self, write: Callable[[dict[str, Any]], None] | None, values: dict[str, Any], every: float):
        self.write, self.values, self.every = write, values, every
        self._last, self._took = time.monotonic(), 0.0
        self.news = False

    def due(self) -> bool:
        return time.monotonic() - self._last >= max(self.every, self._took / SHARE_OF_TIME)

    def save(self) -> None:
        start = time.monotonic()
        try:
            if self.write is not None:
                self.write(self.values)
                self.news = False
        except (OSError, RuntimeError) as error:
            logger.warning("The run's state could not be written, and the run goes on without: %s", error)
        self._last = time.monotonic()
        self._took = self._last - start


def belonging(call: str, directory: Directory, state: Any, fingerprint: Fingerprint) -> dict[str, Any]:
    """The values of a state, if it is this run's."""
    different = differences(state["fingerprint"], fingerprint)
    if different:
        raise CheckpointError(
            f"`{call}(checkpoint_dir={str(directory.path)!r})` holds the state of another run. It differs in: "
            f"{'; '.join(different[:_MOST_NAMED])}{'; ...' if len(different) > _MOST_NAMED else ''}. Give another "
            "directory, or remove this one to begin anew."
        )
    return state["values"]


_DIGEST = 64
_MOST_NAMED = 5


class _Hashed:
    """A file for `torch.save` that hashes what goes through it."""

    def __init__(self, file: Any, digest: Any):
        self._file, self._digest = file, digest

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def _sha256(path: Path, chunk: int = 2**20) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(chunk):
            digest.update(block)
    return digest.hexdigest()


def _number(path: Path) -> int:
    number = path.name.split(".")[-3]
    return int(number) if number.isdigit() else -1


def _to(value: Any, device: torch.device) -> Any:
    return pytree.tree_map(lambda leaf: leaf.detach().to(device) if isinstance(leaf, Tensor) else leaf, value)
