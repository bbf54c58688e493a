"""The record of one public call: whether earlier runs, and the other processes, make the same call, and what they know.

Knows calls, their fingerprints, the state on disk and the processes; knows nothing of what a call computes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch

from bridge import checkpoint, fingerprint
from bridge.checkpoint import Directory, Fingerprint, Record
from bridge.distributed import Ranks
from bridge.rows import Rows
from bridge.session import Session


class Keeping(NamedTuple):
    """Where the state of an interpreter's calls is kept, and how often it is written.

    Attributes:
        owner: The interpreter's class, for errors.
        states: The directory.
        every: Seconds between two writes.
        device: Where tensors are wanted.
    """

    owner: str
    states: Directory
    every: float
    device: torch.device


def check_agreement(call: str, same: Fingerprint, ranks: Ranks) -> None:
    """A ValueError unless all processes make the same call; it says which does not, and what differs."""
    differing = checkpoint.differences(ranks.agreed(same), same)
    for rank, differs in enumerate(ranks.gathered(differing)):
        if differs:
            raise ValueError(f"`{call}`: rank {rank} does not make the call of rank 0. It differs in: {differs}.")


@contextmanager
def opened(keeping: Keeping, name: str, same: Fingerprint, ranks: Ranks, *, needed: int) -> Iterator[Record]:
    """The record under `name`, with what an earlier run of the same fingerprint left; the first process writes.

    Args:
        keeping: Where and how often.
        name: Of the state.
        same: The fingerprint of the call.
        ranks: Who make it.
        needed: Bytes that one state may take.

    Raises:
        CheckpointError: If there is no room, or the state is another run's.
    """
    left: dict[str, Any] = {}

    def read() -> None:
        keeping.states.check_space(keeping.owner, checkpoint.COPIES * needed)
        state = keeping.states.read(name)
        if state is not None:
            left.update(checkpoint.belonging(keeping.owner, keeping.states, state, same))

    ranks.raise_first(read if ranks.first else lambda: None)
    write = partial(keeping.states.write_values, name, same) if ranks.first else None
    record = Record(write, ranks.agreed(left), every=keeping.every, device=keeping.device)
    yield record
    record.save()


def of_instances(instances: Rows, ranks: Ranks, share: range) -> str:
    """The digest of all instances, each process reading those chunks that begin in its share."""
    starts = [start for start in range(0, len(instances), fingerprint.CHUNK) if start in share]
    mine = fingerprint.of_rows(instances, lambda i: instances.batch([i]), starts)
    return fingerprint.of_chunks({start: digest for part in ranks.gathered(mine) for start, digest in part.items()})


def of_loss(session: Session, train: Rows, ranks: Ranks) -> float:
    """The loss of the first training instance: it tells another loss function, or another way through the model."""
    return ranks.agreed(session.losses("training", train, [0])[0] if ranks.first else 0.0)
