"""Results as one HTML file that needs no network, and the settings to repeat them as JSON.

Knows results and how to show them; computes nothing. Colours are from Okabe and Ito's palette, which colour-blind
readers can tell apart, and no meaning rests on colour alone.
"""

import base64
import importlib.metadata
import io
import json
import math
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bridge.diagnostics import ACCURATE, PLAIN_GRADIENT, Diagnostics
from bridge.job import Job
from bridge.run import Explained, Ranked, Settings, Solved

LONGEST_TEXT = 600
"""Characters of a text that are shown; the table has all of it."""


class Dot(NamedTuple):
    """A right-hand side in a plot: its place in percent of the width, and its value in words."""

    x: float
    value: str


class Plot(NamedTuple):
    """Values along an axis, and the threshold beyond which they are bad. Places are in percent of the width."""

    title: str
    dots: list[Dot]
    threshold: float
    threshold_label: str
    bad_from: float
    bad_to: float
    bad_label: str
    ticks: list[Dot]


def repeatable(command_line: str, job: Job, settings: Settings, diagnostics: Diagnostics) -> dict[str, Any]:
    """What was asked for, what was chosen where that left it open, and the versions it ran with."""
    return {
        "command": command_line,
        "model": type(job.model).__name__,
        "training_examples": len(job.train),
        "asked": {name: value for name, value in settings._asdict().items() if name not in _NOT_OF_THE_ANSWER},
        "used": {
            "solver": diagnostics.solver,
            "damping": diagnostics.damping,
            "scale": None if math.isnan(diagnostics.scale) else diagnostics.scale,
            "steps": diagnostics.steps,
            "batch_size": diagnostics.batch_size,
        },
        "versions": {"python": platform.python_version(), **_versions("lissa", "torch", "transformers")},
    }


_NOT_OF_THE_ANSWER = ("progress", "checkpoint_dir", "checkpoint_every")


def write_settings(path: Path, settings: dict[str, Any]) -> Path:
    """Writes `settings` as JSON and returns `path`."""
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return path


def write(path: Path, job: Job, solved: Solved, settings: dict[str, Any]) -> Path:
    """Writes the report of `bridge.run.explain`: each test example with both ends of its ranking.

    Args:
        path: The HTML file.
        job: What was explained.
        solved: Of `explain`.
        settings: Of `repeatable`.

    Returns:
        `path`.

    Raises:
        ModuleNotFoundError: If jinja2 is missing, or Pillow where examples have images.
    """
    explained: list[Explained] = solved.found
    cards = []
    for one in explained:
        longest = max((abs(entry.score) for entry in [*one.helpful, *one.harmful]), default=0.0)
        sides = [
            {"name": name, "says": says, "entries": [_entry(entry, longest) for entry in entries]}
            for name, says, entries in (
                ("helpful", "Most helpful: without them the loss would rise", one.helpful),
                ("harmful", "Most harmful: without them the loss would fall", one.harmful),
            )
        ]
        cards.append({"example": _shown(one), "sides": sides})
    title = f"Which training examples made the model predict this? {len(cards)} test examples"
    return _write(path, job, solved.diagnostics, settings, title=title, cards=cards, ranking=None)


def write_self(path: Path, job: Job, solved: Solved, settings: dict[str, Any], *, most: int) -> Path:
    """Writes the report of `bridge.run.rank_by_self_influence`: the `most` training examples ranked highest.

    Args:
        path: The HTML file.
        job: Whose training data was ranked.
        solved: Of `rank_by_self_influence`.
        settings: Of `repeatable`.
        most: How many are shown.

    Returns:
        `path`.

    Raises:
        ModuleNotFoundError: As `write`.
    """
    ranked: list[Ranked] = solved.found[:most]
    longest = max((abs(entry.score) for entry in ranked), default=0.0)
    title = f"Which labels may be wrong? The {len(ranked)} training examples of highest self-influence"
    ranking = [_entry(entry, longest) for entry in ranked]
    return _write(path, job, solved.diagnostics, settings, title=title, cards=[], ranking=ranking)


def png(image: Tensor) -> str:
    """An image as a `data:` address: grey `(h, w)` or `(c, h, w)` with c = 1 or 3; numbers in [0, 1], or uint8.

    Raises:
        ValueError: If the shape is another.
    """
    from PIL import Image

    pixels = image.detach().cpu()
    if pixels.ndim == 3 and pixels.shape[0] == 1:
        pixels = pixels[0]
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[0] != 3):
        raise ValueError(f"`png(image=...)` must have shape (h, w), (1, h, w) or (3, h, w), got {tuple(image.shape)}.")
    if pixels.dtype != torch.uint8:
        pixels = (pixels.double().nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8)
    if pixels.ndim == 3:
        pixels = pixels.permute(1, 2, 0)
    mode = "L" if pixels.ndim == 2 else "RGB"
    data = io.BytesIO()
    size = (pixels.shape[1], pixels.shape[0])
    Image.frombytes(mode, size, bytes(pixels.contiguous().flatten().tolist())).save(data, format="PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def plots(diagnostics: Diagnostics) -> list[Plot]:
    """The residuals and cosines of the right-hand sides; no residuals if they were not measured."""
    found = []
    residuals = [value for value in diagnostics.relative_residual.tolist() if not math.isnan(value)]
    if residuals:
        low, high = -8, 1
        dots = [Dot(_along(math.log10(max(value, 1e-30)), low, high), f"{value:.1e}") for value in residuals]
        ticks = [Dot(_along(power, low, high), f"1e{power}") for power in range(low, high + 1, 2)]
        limit = _along(math.log10(ACCURATE), low, high)
        found.append(
            Plot("Relative residual of each solve on the full training data: left is good", dots, limit,
                 f"{ACCURATE:g}", limit, 100.0, "not solved", ticks)
        )  # fmt: skip
    cosines = [0.0 if math.isnan(value) else value for value in diagnostics.cosine_with_gradient.tolist()]
    if cosines:
        # 1 - cosine on a log axis: what matters is how far from 1.
        low, high = -6, 0.5
        dots = [Dot(_along(math.log10(max(1 - value, 1e-30)), low, high), f"{value:.6f}") for value in cosines]
        ticks = [Dot(_along(power, low, high), f"{1 - 10.0**power:g}") for power in (-6, -4, -2, 0)]
        limit = _along(math.log10(1 - PLAIN_GRADIENT), low, high)
        found.append(
            Plot("Cosine between solution and plain gradient: far from 1 means the Hessian plays a part", dots,
                 limit, f"{PLAIN_GRADIENT:g}", 0.0, limit, "plain gradient", ticks)
        )  # fmt: skip
    return found


def _along(value: float, low: float, high: float) -> float:
    """Place on an axis from `low` to `high` in percent; beyond the ends, the end."""
    return 100 * (min(max(value, low), high) - low) / (high - low)


def _shown(one: Explained) -> dict[str, Any]:
    wrong = bool(one.predicted) and one.predicted != one.example.label
    return {
        **_example(one.example),
        "loss": f"{one.loss:.3g}",
        "predicted": one.predicted,
        "wrong": wrong,
    }


def _entry(entry: Ranked, longest: float) -> dict[str, Any]:
    """`width`: of the bar in percent of the longest on its card."""
    return {
        **_example(entry.example),
        "loss": f"{entry.loss:.3g}",
        "score": f"{entry.score:+.3g}".replace("-", "\N{MINUS SIGN}"),
        "width": 100 * abs(entry.score) / longest if longest else 0.0,
        "direction": "helpful" if entry.score >= 0 else "harmful",
    }


def _example(example: Any) -> dict[str, Any]:
    text = example.text if len(example.text) <= LONGEST_TEXT else example.text[:LONGEST_TEXT] + " ..."
    image = None if example.image is None else png(example.image)
    return {"place": example.place, "label": example.label, "text": text, "image": image}


def _write(
    path: Path,
    job: Job,
    diagnostics: Diagnostics,
    settings: dict[str, Any],
    *,
    title: str,
    cards: Sequence[Any],
    ranking: Sequence[Any] | None,
) -> Path:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bridge"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template("report.html").render(
        title=title,
        cards=cards,
        ranking=ranking,
        place=job.place,
        training_examples=len(job.train),
        in_words=diagnostics.in_words(),
        problems=diagnostics.problems(),
        plots=plots(diagnostics),
        settings=settings,
    )
    path.write_text(page, encoding="utf-8")
    return path


def _versions(*names: str) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
