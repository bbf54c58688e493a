"""Attention masks of transformers' models in a form that `torch.vmap` takes, inside a `with` block only.

Knows transformers' registry of mask functions; imports transformers never, since a model that needs this has done so.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

SKIPPING = ("sdpa", "eager")
"""Attention implementations whose masks may be left out."""


@contextmanager
def masks_always_made() -> Iterator[None]:
    """Transformers makes the mask of a padded batch whether or not anything is padded, and as before on exit.

    It looks into a mask of shape (B, L) to see whether attention can go without, a branch on the data that `torch.vmap`
    cannot follow. The mask made instead adds 0 where nothing is padded: the outputs are the same. Without
    transformers, or where the user registered other mask functions, nothing happens.
    """
    registry: Any = getattr(sys.modules.get("transformers.masking_utils"), "ALL_MASK_ATTENTION_FUNCTIONS", {})
    before: dict[str, Callable[..., Any]] = {name: registry[name] for name in SKIPPING if name in registry}
    try:
        for name, make in before.items():
            registry[name] = partial(_made, make)
        yield
    finally:
        for name, make in before.items():
            registry[name] = make


def _made(make: Callable[..., Any], *args: Any, attention_mask: Tensor | None = None, **options: Any) -> Any:
    if attention_mask is not None:
        options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return make(*args, attention_mask=attention_mask, **options)
