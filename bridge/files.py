"""Examples from CSV, TSV and JSON Lines files, every row checked before anything is computed.

Knows files, columns and line numbers; knows nothing of models. A mistake is named by its file and line.
"""

import csv
import difflib
import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

MOST_PROBLEMS = 10
"""Problems of one file that are told at once."""


class InputError(ValueError):
    """A file, a model or a name that was given cannot be used; nothing was computed."""


class Row(NamedTuple):
    """One example of a file: the line it begins in (the first is 1), its text and its label as written."""

    line: int
    text: str
    label: str


def read(path: Path, *, text_column: str, label_column: str) -> list[Row]:
    """The examples in a `.csv`, `.tsv` or `.jsonl` file: UTF-8, with a header or, in JSON Lines, with keys.

    Args:
        path: The file.
        text_column: Where the text is.
        label_column: Where the label is; numbers are taken as they are written.

    Returns:
        The rows in order.

    Raises:
        InputError: If the file is missing, empty, not UTF-8, or not of its format, a column is not there, or a row
            lacks a text or a label. The message names the file and the lines.
    """
    readers: dict[str, Callable[[Path, str], Iterator[_Record]]] = {
        ".csv": lambda path, text: _separated(path, text, ","),
        ".tsv": lambda path, text: _separated(path, text, "\t"),
        ".jsonl": _json_lines,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: the name must end in {', '.join(readers)}, which tells the format.")
    content = _content(path)
    if not content.strip():
        raise InputError(f"{path}: the file is empty.")
    rows, problems = [], []
    for record in reader(path, content):
        row = record.problem or _row(path, record, text_column, label_column)
        if isinstance(row, Row):
            rows.append(row)
        else:
            problems.append(row)
    if problems:
        raise InputError(listed(problems))
    if not rows:
        raise InputError(f"{path}: there is a header, but no row.")
    return rows


def unknown_labels(path: Path, rows: list[Row], known: Collection[str]) -> str:
    """In words, which rows have a label that is not known; empty if there is none."""
    problems = [
        f"{path}, line {row.line}: the label {row.label!r} is not one of the model's: {', '.join(map(repr, known))}."
        for row in rows
        if row.label not in known
    ]
    return listed(problems)


def listed(problems: list[str]) -> str:
    """The problems, one a line; of many, the first and how many more there are."""
    more = len(problems) - MOST_PROBLEMS
    return "\n".join(problems[:MOST_PROBLEMS] + ([f"... and {more} more."] if more > 0 else []))


class _Record(NamedTuple):
    """What one line holds, or what is wrong with it."""

    line: int
    values: dict[str, Any]
    problem: str = ""


def _content(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in _siblings(path)], n=1)
        raise InputError(f"{path}: there is no such file.{_did_you_mean(near)}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}.") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8 (byte {error.start} of the file). "
            "Save the file as UTF-8."
        ) from None


def _siblings(path: Path) -> list[Path]:
    return list(path.parent.iterdir()) if path.parent.is_dir() else []


def _separated(path: Path, content: str, delimiter: str) -> Iterator[_Record]:
    # `splitlines` knows more line ends than CSV does (form feeds, for one), which would shift the line numbers.
    lines = content.rstrip().replace("\r\n", "\n").replace("\r", "\n").split("\n")
    reader = csv.reader((line + "\n" for line in lines), delimiter=delimiter, strict=True)
    header: list[str] = []
    line = 1
    try:
        for values in reader:
            if not header:
                header = [value.strip() for value in values]
                twice = sorted({name for name in header if header.count(name) > 1})
                if twice:
                    raise InputError(f"{path}, line {line}: the header names {', '.join(map(repr, twice))} twice.")
            elif not values:
                yield _Record(line, {}, f"{path}, line {line}: the row is empty.")
            elif len(values) != len(header):
                problem = f"{path}, line {line}: the header has {len(header)} columns, this row {len(values)}."
                yield _Record(line, {}, problem + " A text that contains the separator must stand in double quotes.")
            else:
                yield _Record(line, dict(zip(header, values, strict=True)))
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}, line {line}: not a row of separated values: {error}.") from error


def _json_lines(path: Path, content: str) -> Iterator[_Record]:
    for line, text in enumerate(content.rstrip().replace("\r\n", "\n").split("\n"), 1):
        where = f"{path}, line {line}"
        if not text.strip():
            yield _Record(line, {}, f"{where}: the row is empty.")
            continue
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            yield _Record(line, {}, f"{where}: not JSON: {error.msg} (column {error.colno}).")
            continue
        if isinstance(values, dict):
            yield _Record(line, values)
        else:
            yield _Record(line, {}, f"{where}: must be an object like {{...}}, got {type(values).__name__}.")


def _row(path: Path, record: _Record, text_column: str, label_column: str) -> Row | str:
    """The row, or what is wrong with it. A column that no row of a CSV file has is an error of the whole file."""
    values, where = record.values, f"{path}, line {record.line}"
    for option, column in (("--text-column", text_column), ("--label-column", label_column)):
        if column not in values:
            near = difflib.get_close_matches(column, values, n=1)
            what = (
                f"there is no column {column!r} ({option}); there are {', '.join(map(repr, values))}."
                f"{_did_you_mean(near)}"
            )
            if path.suffix.lower() == ".jsonl":
                return f"{where}: {what}"
            raise InputError(f"{path}: {what}")
    text, label = values[text_column], values[label_column]
    if not isinstance(text, str):
        return f"{where}: the text ({text_column!r}) must be a string, got {text!r}."
    if isinstance(label, bool) or not isinstance(label, (str, int)):
        return f"{where}: the label ({label_column!r}) must be a string or a whole number, got {label!r}."
    text, label = text.strip(), str(label).strip()
    for what, value, column in (("text", text, text_column), ("label", label, label_column)):
        if not value:
            return f"{where}: the {what} ({column!r}) is empty."
    return Row(record.line, text, label)


def _did_you_mean(near: list[str]) -> str:
    return f" Did you mean {near[0]!r}?" if near else ""
