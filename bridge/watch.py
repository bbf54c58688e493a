"""Whether the other processes that share the work are alive, and why one of them is not.

Knows `torch.distributed`'s store; knows nothing of what the processes do together.
"""

import atexit
import logging
import os
import socket
import threading
import time
from contextlib import suppress
from typing import Any

import torch.distributed as dist

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""How often a process that waits for others looks whether they are well, and how often it says that it is itself."""

SILENCE_SECONDS = 40.0
"""A process that has said nothing for so long, while another waits for it, is lost."""

SILENCE_AFTER_BREAK = 5.0
"""The same once a connection has broken: then some process is gone, and the only question is which."""


class RankError(RuntimeError):
    """Another process failed or died; the message says which, and as far as known why."""

    def __init__(self, reason: str):
        super().__init__(f"{reason.removesuffix('.')}. {_START_AGAIN}")
        self.first_is_gone = reason.startswith("Rank 0 ")


_START_AGAIN = "Start again: with a checkpoint_dir the run goes on from its latest state, on any number of processes."


class Watch:
    """Says that this process is alive, hears whether the others are, and passes on why one failed.

    In `torch.distributed`'s own store: a number that grows for each process, and for each joint call the reason why it
    ended, if it did; the first reason counts.
    """

    def __init__(self, group: Any, rank: int, size: int):
        names = "-".join(map(str, dist.get_process_group_ranks(group)))
        store = dist.distributed_c10d._get_default_store()
        self._store = dist.distributed_c10d.PrefixStore(f"lissa/{names}", store)
        self._rank, self._size = rank, size
        self._call = 0
        self.broken: Exception | None = None
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._stop: threading.Event | None = None
        self._since = time.monotonic()
        self._warned = False

    def begin(self) -> None:
        """The next joint call."""
        self._call += 1
        self._since = time.monotonic()
        if self._stop is None:
            self._stop = threading.Event()
            self._beat(0)
            beats = threading.Thread(target=self._beats, args=(self._stop,), daemon=True)
            beats.start()
            atexit.register(self._end, self._stop, beats)

    def tell(self, what: str, rank: int | None = None) -> str:
        """Why this call cannot go on, for those who wait; returns what was told first."""
        rank = self._rank if rank is None else rank
        reason = f"{self._name(rank)} {what}"
        with suppress(RuntimeError):
            return self._store.compare_set(f"{self._call}/reason", "", reason).decode()
        return reason

    def look(self, silence: float) -> None:
        """Raises a RankError if another process has told why it ended, or has said nothing for so long."""
        try:
            if self._store.check([f"{self._call}/reason"]):
                raise RankError(self._store.get(f"{self._call}/reason").decode())
            now = time.monotonic()
            missing = []
            for rank in range(self._size):
                if rank == self._rank:
                    continue
                if not self._store.check([f"beat/{rank}"]):
                    missing.append(rank)
                    continue
                beat = self._store.get(f"beat/{rank}")
                if self._seen.get(rank, (b"", 0.0))[0] != beat:
                    self._seen[rank] = (beat, now)
                if now - self._seen[rank][1] > silence:
                    raise RankError(self.tell(f"died, or has not answered for {silence:.0f} s", rank))
        except RankError:
            raise
        except RuntimeError as error:
            raise RankError(
                f"Rank 0 of {self._size}, or the launcher, whichever keeps the store of torch.distributed, died."
            ) from error
        if missing and not self._warned and now - self._since > SILENCE_SECONDS:
            self._warned = True
            logger.warning(
                "Waiting for rank %s to make the same call. If not all processes are to share the work, pass "
                "process_group=None.",
                ", ".join(map(str, missing)),
            )

    def explained(self, error: Exception) -> Exception:
        """A RankError for a collective that failed: waits until it is known whose process is gone."""
        self.broken = error
        until = time.monotonic() + 2 * SILENCE_AFTER_BREAK
        self._seen.clear()
        while time.monotonic() < until:
            try:
                self.look(SILENCE_AFTER_BREAK)
            except RankError as lost:
                return lost
            time.sleep(LOOK_SECONDS / 4)
        return error

    def _beats(self, stop: threading.Event) -> None:
        count = 0
        while not stop.wait(LOOK_SECONDS):
            count += 1
            try:
                self._beat(count)
            except RuntimeError:  # the store is gone, and with it those who would listen
                return

    def _beat(self, count: int) -> None:
        self._store.set(f"beat/{self._rank}", f"{count} {os.getpid()} {socket.gethostname()}")

    def _name(self, rank: int) -> str:
        known = ""
        with suppress(RuntimeError):
            if self._store.check([f"beat/{rank}"]):
                _, process, host = self._store.get(f"beat/{rank}").decode().split(" ")
                known = f" (process {process} on {host})"
        return f"Rank {rank} of {self._size}{known}"

    @staticmethod
    def _end(stop: threading.Event, beats: threading.Thread) -> None:
        stop.set()
        beats.join(2 * LOOK_SECONDS)
