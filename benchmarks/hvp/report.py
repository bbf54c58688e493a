"""The benchmark's results as a Markdown table and as a plot."""

from pathlib import Path
from typing import Any

from benchmarks.hvp.strategies import PLAIN, STRATEGIES


def markdown(rows: list[dict[str, Any]]) -> str:
    """For each row and strategy: gradients a vector, speed over the plain double backward, peak memory in gradients."""
    names = [name for name in STRATEGIES if any(name in row["cells"] or name in row["failures"] for row in rows)]
    lines = [["model", *names], ["---"] * (len(names) + 1)]
    for row in rows:
        lines.append([row["row"], *(_cell(row, name) for name in names)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(row: dict[str, Any], name: str) -> str:
    if name in row["cells"]:
        cell = row["cells"][name]
        return (
            f"{cell['gradients_per_vector']:.2f} g, {cell['speedup_over_plain'][0]:.2f}x, "
            f"{cell['memory_in_gradients']:.1f} m"
        )
    return "wrong" if row["failures"].get(name, "").startswith("wrong") else "-"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Speed over the plain double backward, with quartiles; a log scale, one group of dots for each row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in STRATEGIES if name != PLAIN and any(name in row["cells"] for row in rows)]
    figure, axes = pyplot.subplots(figsize=(10, 1.5 + 0.5 * len(rows)), layout="constrained")
    markers = "osD^v<>Pp*X"
    for i, name in enumerate(names):
        places, middles, below, above = [], [], [], []
        for place, row in enumerate(rows):
            if name in row["cells"]:
                median, lower, upper = row["cells"][name]["speedup_over_plain"]
                places.append(place + (i / len(names) - 0.5) * 0.6)
                middles.append(median)
                below.append(median - lower)
                above.append(upper - median)
        axes.errorbar(middles, places, xerr=[below, above], fmt=markers[i % len(markers)], label=name, markersize=5)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xticks([0.25, 0.5, 1, 2, 4, 8, 16], ["1/4", "1/2", "1", "2", "4", "8", "16"])
    axes.set_yticks(range(len(rows)), [row["row"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as the plain double backward (median and quartiles); further right is faster")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
