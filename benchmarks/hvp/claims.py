"""What the table must show, beside what it shows: anyone can check a claim on their machine.

Each claim names its rows; a claim about rows that were not measured is left out.
"""

from typing import Any, NamedTuple

from benchmarks.hvp.models import MLP, SOFTMAX, TRANSFORMER, Row

CHOICES = ("auto", "auto, traced", "auto, compiled", "forward-over-reverse, compiled")
"""What the quickest is taken from, after warm-up."""


class Verdict(NamedTuple):
    """One line: what is measured, the bound (a minimum, or a maximum), and the number."""

    what: str
    bound: str
    measured: float
    holds: bool


def verdicts(rows: list[dict[str, Any]], chunks: list[dict[str, Any]]) -> list[Verdict]:
    """Every claim on the rows that were measured, and on the memory by chunk."""
    by_name = {row["row"]: row for row in rows}
    lines = []
    for row, minimum in AT_LEAST:
        if str(row) in by_name:
            lines.append(_at_least(f"{row}: speed over the double backward", minimum, _speed(by_name[str(row)])))
    for row, measure, maximum, what in AT_MOST:
        if str(row) in by_name:
            lines.append(_at_most(f"{row}: {what}", maximum, measure(by_name[str(row)])))
    for chunk in {row["chunk"]: None for row in chunks}:
        beyond = [row["gradients_beyond_results"] for row in chunks if row["chunk"] == chunk]
        lines.append(_at_most(f"memory in chunks of {chunk}: largest over smallest", 1.05, max(beyond) / min(beyond)))
    for row in rows:
        lines.append(_at_least(f"{row['row']}: never slower", 0.95, _speed(row)))
        if "curvlinops" in row["cells"]:
            theirs = row["cells"]["curvlinops"]["speedup_over_plain"][0]
            lines.append(_at_least(f"{row['row']}: speed over curvlinops", 1.0, _speed(row) / theirs))
    return lines


def in_words(lines: list[Verdict]) -> str:
    """A Markdown table of the verdicts."""
    table = ["| claim | bound | measured | holds |", "| --- | --- | --- | --- |"]
    table += [f"| {v.what} | {v.bound} | {v.measured:.2f} | {'yes' if v.holds else 'NO'} |" for v in lines]
    return "\n".join(table)


def _quickest(row: dict[str, Any]) -> dict[str, Any]:
    cells = [cell for name, cell in row["cells"].items() if name in CHOICES]
    return min(cells, key=lambda cell: cell["gradients_per_vector"])


def _speed(row: dict[str, Any]) -> float:
    return _quickest(row)["speedup_over_plain"][0]


def _gradients(row: dict[str, Any]) -> float:
    return _quickest(row)["gradients_per_vector"]


def _memory(row: dict[str, Any]) -> float:
    return _quickest(row)["memory_in_gradients"]


def _at_least(what: str, minimum: float, measured: float) -> Verdict:
    return Verdict(what, f">= {minimum}", measured, measured >= minimum)


def _at_most(what: str, maximum: float, measured: float) -> Verdict:
    return Verdict(what, f"<= {maximum}", measured, measured <= maximum)


AT_LEAST = [
    (Row(SOFTMAX, 8, 1), 2.5),
    (Row(MLP, 8, 1), 2.0),
    (Row(MLP, 64, 1), 2.0),
    (Row(TRANSFORMER, 8, 1), 1.4),
    (Row(SOFTMAX, 8, 16), 15.0),
    (Row(MLP, 8, 16), 3.5),
    (Row(MLP, 64, 16), 3.5),
]

AT_MOST = [
    (Row(TRANSFORMER, 8, 1), _gradients, 2.2, "gradients a vector"),
    (Row(TRANSFORMER, 8, 16), _gradients, 2.0, "gradients a vector"),
    (Row(TRANSFORMER, 8, 1), _memory, 3.0, "memory in gradients"),
]
