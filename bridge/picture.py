"""The demo's picture: test digits beside the training digits that helped and harmed, and how fast labels are found.

Knows matplotlib and what the demo found; computes nothing. Colours are from Okabe and Ito's palette, which colour-blind
readers can tell apart, and no meaning rests on colour alone.
"""

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from bridge.demo import Findings

SHOWN = 5
HELPFUL, HARMFUL, NEUTRAL = "#0072B2", "#D55E00", "#555555"


def draw(findings: Findings, path: Path) -> None:
    """Writes the picture to `path`, in the format that its ending names."""
    rows = len(findings.explained)
    height = 1.9 * rows + 1.2
    figure = Figure(figsize=(17, height))
    top, bottom = 1 - 1.15 / height, 0.25 / height

    # One column for the test digit, a gap, the helpful, a gap, the harmful.
    grid = figure.add_gridspec(
        rows, 3 + 2 * SHOWN, width_ratios=[1, 0.3, *[1] * SHOWN, 0.3, *[1] * SHOWN],
        left=0.01, right=0.70, top=top, bottom=bottom, hspace=0.55, wspace=0.12,
    )  # fmt: skip
    for row in range(rows):
        columns = (0, *range(2, 2 + SHOWN), *range(3 + SHOWN, 3 + 2 * SHOWN))
        _draw_row(findings, row, [figure.add_subplot(grid[row, column]) for column in columns])
    heading = {"ha": "center", "fontsize": 15, "fontweight": "bold"}
    figure.text(0.355, 1 - 0.35 / height, "Which training digits made the model err?", **heading)
    figure.text(0.245, 1 - 0.68 / height, "most helpful: without them the loss rises", ha="center", color=HELPFUL)
    figure.text(0.565, 1 - 0.68 / height, "most harmful: without them the loss falls", ha="center", color=HARMFUL)

    figure.text(0.87, 1 - 0.35 / height, "Which training labels are wrong?", **heading)
    _draw_curve(findings, figure.add_axes((0.76, bottom + 0.09, 0.22, top - bottom - 0.07)))
    figure.savefig(path, dpi=110)


def _draw_row(findings: Findings, row: int, axes: list[Axes]) -> None:
    digits, test_index = findings.digits, int(findings.explained[row])
    truth, prediction = int(digits.test_labels[test_index]), int(findings.predictions[test_index])
    _draw_digit(axes[0], digits.test_images[test_index], f"a {truth},\ntaken for {prediction}", "", NEUTRAL)

    scores = findings.scores[row]
    for order, start, colour in (
        (scores.argsort(descending=True), 1, HELPFUL),
        (scores.argsort(), 1 + SHOWN, HARMFUL),
    ):
        for place, i in enumerate(order[:SHOWN].tolist()):
            label, truth = int(digits.train_labels[i]), int(digits.true_labels[i])
            title = f"labelled {label}" if label == truth else f"labelled {label},\nis a {truth}!"
            _draw_digit(axes[start + place], digits.train_images[i], title, f"{scores[i]:+.1f}", colour)


def _draw_digit(axes: Axes, image: Tensor, title: str, score: str, colour: str) -> None:
    axes.imshow(image.reshape(8, 8).numpy(), cmap="gray_r", vmin=0, vmax=1)
    axes.set_title(title, fontsize=9, pad=4, fontweight="bold" if "!" in title else "normal")
    axes.set_xlabel(score, fontsize=10, labelpad=3, color=colour)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=2.5)


def _draw_curve(findings: Findings, axes: Axes) -> None:
    n = len(findings.self_influence)
    checked = (torch.arange(1, n + 1) / n).numpy()
    for scores, label, colour, style in (
        (findings.self_influence, "by self-influence", HELPFUL, "-"),
        (findings.losses, "by training loss", HARMFUL, "--"),
    ):
        hits = torch.isin(scores.argsort(descending=True), findings.digits.flipped)
        found = (hits.cumsum(0) / hits.sum()).numpy()
        axes.plot(100 * checked, 100 * found, style, color=colour, label=label)
    axes.plot([0, 100], [0, 100], ":", color=NEUTRAL, label="at random")
    axes.axvline(10, color=NEUTRAL, linewidth=0.8)
    axes.annotate(
        f"{100 * findings.recall(0.1):.0f}% of the flipped labels are\namong the first 10% checked",
        (10, 100 * findings.recall(0.1)), (22, 60), arrowprops={"arrowstyle": "->", "color": NEUTRAL},
    )  # fmt: skip
    axes.set(xlabel="training examples checked, %", ylabel="flipped labels found, %", xlim=(0, 100), ylim=(0, 102))
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
