"""What a run depends on, as digests by name, so that a changed model, row or setting can be told and named.

Knows modules, instances and versions; knows nothing of where fingerprints are kept.
"""

import ctypes
import hashlib
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

CHUNK = 1024
"""Rows that one digest is of. Digests of chunks join to that of the data, whoever read which chunk."""

_PLAIN = (type(None), bool, int, float, complex, str, bytes)


def of_versions() -> dict[str, str]:
    """The versions of what computes."""
    return {"lissa's version": _version("lissa"), "torch's version": str(torch.__version__)}


def of_model(model: nn.Module) -> dict[str, str]:
    """A digest of each parameter and buffer.

    Example:
        >>> list(of_model(nn.Linear(1, 1)))
        ["the model's class", "the model's 'weight'", "the model's 'bias'"]
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    kind = type(model)
    return {"the model's class": f"{kind.__module__}.{kind.__qualname__}"} | {
        f"the model's {name!r}": _joined([_of_leaf(tensor)]) for name, tensor in tensors
    }


def of_rows(instances: Sequence[Any], collated: Callable[[int], Any], starts: Iterable[int]) -> dict[int, str]:
    """Digests of chunks of `CHUNK` instances, by where each starts.

    Args:
        instances: Their tensors, numbers and texts are digested; others by what they are collated to.
        collated: `collated(i)` is the batch of instance i alone.
        starts: Multiples of `CHUNK`.
    """

    def digests(start: int) -> Iterable[bytes]:
        for i in range(start, min(start + CHUNK, len(instances))):
            try:
                yield from _of(instances[i])
            except TypeError:
                yield from _of(collated(i), strict=False)

    return {start: _joined(digests(start)) for start in starts}


def of_chunks(digests: dict[int, str]) -> str:
    """The digest of all rows, from those of their chunks."""
    return _joined(digests[start].encode() for start in sorted(digests))


def _joined(digests: Iterable[bytes]) -> str:
    whole = hashlib.sha256()
    for digest in digests:
        whole.update(digest)
    return whole.hexdigest()


def _of(value: Any, *, strict: bool = True) -> Iterable[bytes]:
    """Pieces to hash; a TypeError for a leaf of unknown kind, if `strict`, else its type stands for it."""
    leaves, structure = pytree.tree_flatten(value)
    yield str(structure).encode()
    for leaf in leaves:
        if isinstance(leaf, (Tensor, *_PLAIN)):
            yield _of_leaf(leaf)
        elif hasattr(leaf, "dtype") and hasattr(leaf, "tobytes"):  # NumPy's
            yield str((leaf.dtype, getattr(leaf, "shape", ()))).encode() + leaf.tobytes()
        elif strict:
            raise TypeError(type(leaf).__name__)
        else:
            yield type(leaf).__name__.encode()


def _of_leaf(leaf: Any) -> bytes:
    if not isinstance(leaf, Tensor):
        return repr(leaf).encode()
    dense = leaf.detach().to("cpu").contiguous()
    content = hashlib.sha256(str((dense.dtype, tuple(dense.shape))).encode())
    if dense.nbytes:
        content.update((ctypes.c_char * dense.nbytes).from_address(dense.data_ptr()))
    return content.digest()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"
