"""Progress bars on long work. Knows tqdm and nothing else."""

from collections.abc import Iterable
from typing import TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")

DELAY_SECONDS = 1.0
"""Work that is done sooner shows nothing."""


def bar(iterable: Iterable[T], *, description: str, show: bool, total: int | None = None) -> Iterable[T]:
    """`iterable`, with a bar and the time left on standard error if `show`."""
    if not show:
        return iterable
    return tqdm(iterable, desc=description, total=total, delay=DELAY_SECONDS, leave=False)
