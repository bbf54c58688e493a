"""The pictures of `python -m benchmarks.accuracy`: one function a part, from its result to a PNG."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt

mpl.use("Agg")


def stability(result: dict, path: Path) -> None:
    """Relative error over scale, a panel for each batch size; the prediction is the line at 1."""
    rows = [row for row in result["rows"] if row["replicate"] == 0]
    figure, panels = plt.subplots(1, len(rows), figsize=(3 * len(rows), 3), sharey=True)
    for axes, row in zip(panels, rows, strict=True):
        axes.semilogy(row["factors"], row["worst_error"], "o-", color="C1", label="worst run")
        axes.semilogy(row["factors"], row["rms_error"], "o-", color="C0", label="root mean square")
        axes.axhline(1, color="0.6", linewidth=1)
        axes.axvline(1, color="C3", label="predicted")
        axes.axvline(row["mean_square"], color="C2", linestyle="--", label="mean square")
        axes.set(title=f"batch {row['batch_size']}", xlabel="scale / predicted", ylim=(0.03, 1e3))
    panels[0].set_ylabel("relative error")
    panels[-1].legend(fontsize="small")
    save(figure, path)


def leave_one_out(result: dict, path: Path) -> None:
    """Predicted against refitted changes of the test loss."""
    figure, axes = plt.subplots(figsize=(4, 4))
    changes = np.array(result["changes"])
    ends = [min(changes), max(changes)]
    axes.plot(ends, ends, color="0.6", linewidth=1, label="equal")
    marks = {"AllenNLP's defaults": "x", "tuned, first order": "o", "tuned, own curvature taken out": "s"}
    for i, (name, mark) in enumerate(marks.items()):
        axes.plot(result[name]["predicted"], changes, mark, color=f"C{i}", markersize=4, label=name)
    axes.set(xlabel="score / n", ylabel="change of the test loss after a refit", title=result["task"])
    axes.legend(fontsize="small")
    save(figure, path)


def solvers(result: dict, path: Path) -> None:
    """Relative error over cost, a panel for each task and damping, a mark for each solver."""
    tasks = list(dict.fromkeys(row["task"] for row in result["rows"]))
    dampings = sorted({row["damping"] for row in result["rows"]}, reverse=True)
    names = list(dict.fromkeys(row["solver"] for row in result["rows"] if row["solver"] != "dense"))
    shape = (len(tasks), len(dampings))
    figure, panels = plt.subplots(
        *shape, figsize=(3.2 * shape[1], 2.4 * shape[0]), sharex=True, sharey=True, squeeze=False
    )
    for row in result["rows"]:
        if row["solver"] in names:
            i = names.index(row["solver"])
            axes = panels[tasks.index(row["task"])][dampings.index(row["damping"])]
            axes.loglog(row["passes"], row["error"], "os^Dv<>"[i % 7], color=f"C{i % 10}", label=row["solver"])
    for i, task in enumerate(tasks):
        for j, damping in enumerate(dampings):
            panels[i][j].set_title(f"{task}\ndamping {damping:g}", fontsize="small")
            panels[i][j].axhline(1, color="0.6", linewidth=1)
    for axes in panels[-1]:
        axes.set_xlabel("passes over the data")
    for axes in panels[:, 0]:
        axes.set_ylabel("relative error")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small")
    save(figure, path)


def save(figure: plt.Figure, path: Path) -> None:
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"wrote {path.name}", flush=True)


PLOTS = {"stability": stability, "leave-one-out": leave_one_out, "solvers": solvers}
