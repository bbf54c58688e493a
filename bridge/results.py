"""Rows of results to CSV, JSON Lines or Parquet, written as they come, so that what is done survives an interruption.

Knows files; knows nothing of influence. A file has `.partial` in its name until it is complete.
"""

import csv
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

FORMATS = ("csv", "jsonl", "parquet")


class Table(Protocol):
    """An open file of results."""

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Appends rows that all have the same keys; they are on disk when it returns (Parquet: when it is closed)."""
        ...

    def close(self) -> None:
        """Closes the file."""
        ...


@contextmanager
def table(path: Path, columns: Sequence[str]) -> Iterator[Table]:
    """A table to write to. It gets its name once the block ends well; until then, and after an error, see `partial`.

    Args:
        path: The name of the complete file; its ending is one of `FORMATS`.
        columns: The keys of each row, in order.

    Yields:
        The open table.

    Raises:
        OSError: If the file cannot be written.
        ModuleNotFoundError: For Parquet without pyarrow.
    """
    kinds = {".csv": _Csv, ".jsonl": _JsonLines, ".parquet": _Parquet}
    opened: Table = kinds[path.suffix](partial(path), columns)
    try:
        yield opened
    finally:
        opened.close()
    os.replace(partial(path), path)


def partial(path: Path) -> Path:
    """The name of the file while it is not complete: `influence.partial.csv` of `influence.csv`."""
    return path.with_suffix(f".partial{path.suffix}")


class Nowhere:
    """A table of a process that writes nothing."""

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Forgets the rows."""

    def close(self) -> None:
        """Does nothing."""


class _Csv:
    def __init__(self, path: Path, columns: Sequence[str]):
        self._file: IO[str] = path.open("w", encoding="utf-8", newline="")
        self._writer = csv.DictWriter(self._file, columns)
        self._writer.writeheader()

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        self._writer.writerows(rows)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class _JsonLines:
    def __init__(self, path: Path, columns: Sequence[str]):
        self._columns = columns
        self._file: IO[str] = path.open("w", encoding="utf-8")

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        for row in rows:
            json.dump({name: row[name] for name in self._columns}, self._file, ensure_ascii=False)
            self._file.write("\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class _Parquet:
    """One row group for each call of `write`; the types are those of the first rows."""

    def __init__(self, path: Path, columns: Sequence[str]):
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]

        self._arrow, self._path, self._columns = pyarrow, path, columns
        self._writer: Any = None

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        arrays = {name: [row[name] for row in rows] for name in self._columns}
        if self._writer is None:
            batch = self._arrow.table(arrays)
            self._writer = self._arrow.parquet.ParquetWriter(self._path, batch.schema)
        else:
            batch = self._arrow.table(arrays, schema=self._writer.schema)
        self._writer.write_table(batch)

    def close(self) -> None:
        if self._writer is None:
            self._path.touch()
        else:
            self._writer.close()
