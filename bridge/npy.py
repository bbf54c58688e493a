"""Arrays in NumPy's file format, written through a memory map. Knows the format; needs no NumPy."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

KINDS = {torch.float64: "f8", torch.float32: "f4", torch.float16: "f2"}


@contextmanager
def being_written(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Tensor]:
    """A tensor of zeros whose numbers are those of a `.npy` file; the file gets its name when the work inside is done.

    The operating system writes pages to disk as it needs memory, so that the array may be larger than that. bfloat16,
    which NumPy does not have, is kept as float32.

    Args:
        path: Where to write; what is there is replaced.
        shape: Of the array, at least one number.
        dtype: A floating-point type.

    Yields:
        The tensor.

    Example:
        >>> import tempfile, numpy
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with being_written(Path(folder) / "a.npy", (2, 2), torch.float32) as rows:
        ...         rows[1] = torch.tensor([1.0, 2.0])
        ...     numpy.load(Path(folder) / "a.npy").tolist()
        [[0.0, 0.0], [1.0, 2.0]]
    """
    dtype = dtype if dtype in KINDS else torch.float32
    header = _header(shape, dtype)
    numbers = torch.Size(shape).numel()
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(header)
            file.truncate(len(header) + numbers * dtype.itemsize)
        size = partial.stat().st_size
        storage = torch.UntypedStorage.from_file(str(partial), shared=True, nbytes=size)
        yield torch.empty(0, dtype=dtype).set_(storage, len(header) // dtype.itemsize, shape)  # type: ignore[call-overload]
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _header(shape: tuple[int, ...], dtype: torch.dtype) -> bytes:
    """Version 1.0 of the format: a magic number, the length, and a Python dict, padded to a multiple of 64 bytes."""
    order = "<" if sys.byteorder == "little" else ">"
    text = f"{{'descr': '{order}{KINDS[dtype]}', 'fortran_order': False, 'shape': {tuple(shape)}, }}"
    length = -(-(10 + len(text) + 1) // 64) * 64
    return b"\x93NUMPY\x01\x00" + (length - 10).to_bytes(2, "little") + text.ljust(length - 11).encode() + b"\n"
