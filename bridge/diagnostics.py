"""What was solved, in numbers and in words, and a warning where the result means little.

Knows the numbers of a solve; knows nothing of how they came about.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lissa import Status

ACCURATE = 0.1
"""Relative residuals above this make scores that are wrong in their first digit."""

PLAIN_GRADIENT = 0.999
"""Above this cosine, the inverse Hessian did nothing: scores are gradient dot products."""


class InfluenceWarning(UserWarning):
    """The scores mean less than they seem to; the text gives the measured numbers and what to change."""


class Diagnostics(NamedTuple):
    """What is known of the solves `(H + damping I) x = v` of one call, one entry for each right-hand side.

    Attributes:
        solver: Its name; for LiSSA that chose its own way, that way in brackets.
        damping: In the units of the Hessian (AllenNLP's `damping` times `scale`).
        scale: The step size is `1 / scale`.
        steps: LiSSA steps of one run; the most products of any right-hand side for the other solvers.
        num_samples: Runs averaged.
        examples: Training examples.
        batch_size: Training examples a step.
        status: A `lissa.Status` for each right-hand side.
        relative_residual: `|v - (H + damping I) x| / |v|` on the full training data; NaN if not measured.
        cosine_with_gradient: Cosine of the angle between `x` and `v`; 1 if the inverse Hessian changed nothing.
        correlation_with_plain: Where that cosine is near 1, the correlation of scores with plain gradient products,
            over a sample of the training data, for a few of them; else NaN.
        largest_eigenvalue: Of the Hessian, on a sample, if there was something to warn of; else NaN.
        product_error: The relative error of a product in bfloat16, where these were asked for; else 0.
    """

    solver: str
    damping: float
    scale: float
    steps: int
    num_samples: int
    examples: int
    batch_size: int
    status: Tensor
    relative_residual: Tensor
    cosine_with_gradient: Tensor
    correlation_with_plain: Tensor
    largest_eigenvalue: float
    product_error: float = 0.0

    def in_words(self) -> str:
        """What was solved and what to think of it."""
        lines = [
            f"Solved (H + damping I) x = v with an effective damping of {self.damping:g} {self._way()}, "
            f"for {len(self.status)} right-hand sides."
        ]
        if len(self.status) and not self.relative_residual.isnan().all():
            verdict = "they are solved" if float(self.relative_residual.max()) <= ACCURATE else "they are not solved"
            lines.append(f"Relative residual on the full training data: {_span(self.relative_residual)}: {verdict}.")
        if len(self.status):
            if self.product_error:
                lines.append(f"Products in bfloat16 have a relative error of {self.product_error:.2g}.")
            lines.append(f"Cosine between x and the plain gradient: {_span(self.cosine_with_gradient, '.6f')}.")
        return " ".join(lines + self.problems())

    def _way(self) -> str:
        if self.solver == "gauss-newton":
            return f"at once in the space of outputs, H being the Gauss-Newton matrix of {self.examples} examples"
        if not self.solver.startswith("lissa"):
            return f"by {self.solver} in at most {self.steps} steps on all {self.examples} training examples"
        runs = "run" if self.num_samples == 1 else "runs"
        return (
            f"and scale {self.scale:g}, by {self.solver} in {self.num_samples} {runs} of {self.steps} LiSSA steps of "
            f"{self.batch_size} of {self.examples} training examples"
        )

    def problems(self) -> list[str]:
        """One sentence for each reason to distrust the scores; none if there is none."""
        found: list[str] = []
        if not len(self.status):
            return found
        if self.steps == 0 and self.solver == "lissa":
            found.append(
                f"No LiSSA step was taken: recursion_depth is a fraction of the {-(-self.examples // self.batch_size)} "
                f"batches ({self.examples} examples in batches of {self.batch_size}) and rounds down to 0. "
                "Give recursion_depth as an int, a number of steps."
            )
        plain = int((self.cosine_with_gradient >= PLAIN_GRADIENT).sum())
        if plain:
            found.append(
                f"For {plain} of {len(self.status)} right-hand sides the result points along the plain gradient "
                f"(cosine {_span(self.cosine_with_gradient, '.6f')}): scores are gradient dot products "
                f"(correlation {_span(self.correlation_with_plain, '.7f')}), the Hessian plays no part, because the "
                f"effective damping (damping * scale = {self.damping:g}) is far above the Hessian, whose largest "
                f"eigenvalue is about {self.largest_eigenvalue:.2g}, or too few steps were taken. Lower the damping "
                "(give it as `ridge`, in the units of the Hessian) and take about 2 * scale / ridge steps, or let "
                "scale='auto' and recursion_depth='auto' choose."
            )
        poor = int((self.relative_residual > ACCURATE).sum())
        if poor:
            found.append(
                f"For {poor} of {len(self.status)} right-hand sides the relative residual on the full training data is "
                f"above {ACCURATE:g} ({_span(self.relative_residual)}): the system is not solved. Take more steps "
                "(recursion_depth), average more runs (num_samples), or use larger batches (lissa_batch_size)."
            )
        return found


def joined(parts: list[Diagnostics]) -> Diagnostics:
    """The diagnostics of several groups of right-hand sides of one call."""
    tensors = ("status", "relative_residual", "cosine_with_gradient", "correlation_with_plain")
    return parts[0]._replace(**{name: torch.cat([getattr(part, name) for part in parts]) for name in tensors})


def from_plain(known: dict[str, Any]) -> Diagnostics:
    """The diagnostics whose `_asdict()` this is, wherever its tensors went in between."""
    on_cpu: dict[str, Any] = {name: v.cpu() if isinstance(v, Tensor) else v for name, v in known.items()}
    return Diagnostics(**on_cpu)


def failure_advice(worst: Status, solver: str, damping: float, scale: float) -> str:
    """What a failed solve means in terms of the arguments of `SimpleInfluence`."""
    with_scale = f"scale={scale:g} and " if solver.startswith("lissa") else ""
    what = f"{solver} with {with_scale}an effective damping of {damping:g} ended {worst.name}. {worst.explanation}"
    if worst is Status.DIVERGED:
        what += (
            f" Here: raise `scale` above {scale:g}, keeping the damping by giving it as `ridge={damping:g}`; "
            f"or raise the damping, `ridge` above {damping:g}; or let it be chosen: scale='auto'."
        )
    elif worst is Status.INDEFINITE:
        what += f" Here: raise the damping, `ridge` above {damping:g}, or use solver='minres' or 'dense'."
    return what


def _span(values: Tensor, spec: str = ".2g") -> str:
    known = values[~values.isnan()]
    if not len(known):
        return "unknown"
    low, high = float(known.min()), float(known.max())
    return f"{low:{spec}}" if low == high else f"{low:{spec}} to {high:{spec}}"
