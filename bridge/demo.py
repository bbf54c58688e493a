"""The demo: which training digits made a classifier err, and which of its training labels are wrong?

Trains a softmax regression on scikit-learn's handwritten digits with 5% of the training labels flipped, then asks
`SimpleInfluence` both questions. Knows the data, the screen and files; does no numerics of its own beyond training.
"""

import csv
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from bridge import distributed
from bridge.diagnostics import Diagnostics
from bridge.simple_influence import SimpleInfluence

FLIPPED_SHARE = 0.05
TEST_SHARE = 0.3
WEIGHT_DECAY = 0.01
EXPLAINED = 4
TOLERANCE = 1e-2


class Digits(NamedTuple):
    """Images in [0, 1] of shape (n, 64) and labels; `flipped` are the training examples with a wrong label."""

    train_images: Tensor
    train_labels: Tensor
    true_labels: Tensor
    flipped: Tensor
    test_images: Tensor
    test_labels: Tensor


class Findings(NamedTuple):
    """What the demo found.

    Attributes:
        digits: The data.
        explained: Indices of the explained test digits, shape (T,).
        predictions: What the model takes each test digit for.
        scores: Influence of each training digit on the loss of each explained digit, shape (T, n).
        self_influence: Of each training digit on its own loss, shape (n,).
        losses: The loss of each training digit, shape (n,).
        explaining: What was solved for `scores`.
        searching: What was solved for `self_influence`.
    """

    digits: Digits
    explained: Tensor
    predictions: Tensor
    scores: Tensor
    self_influence: Tensor
    losses: Tensor
    explaining: Diagnostics
    searching: Diagnostics

    def recall(self, checked_share: float) -> float:
        """Share of the flipped labels among the `checked_share` of training digits of highest self-influence."""
        checked = self.self_influence.argsort(descending=True)[: int(checked_share * len(self.self_influence))]
        return torch.isin(self.digits.flipped, checked).double().mean().item()


def run(out: Path, *, seed: int = 0, progress: bool = True) -> Findings:
    """Does the whole job and writes `demo.png`, `influence.csv` and `self_influence.csv` into the folder `out`.

    Args:
        out: The folder; it is made if it is not there.
        seed: Of the split, the flipped labels and the solver.
        progress: Whether long work shows a bar.

    Returns:
        What was found.

    Raises:
        OSError: If the folder cannot be written to; nothing was computed then.
    """
    from bridge import picture  # matplotlib takes a second to load

    if distributed.first_here():
        out.mkdir(parents=True, exist_ok=True)
        for name in ("demo.png", "influence.csv", "self_influence.csv"):
            (out / name).touch()

    digits = load(seed)
    model = train(digits)
    findings = study(digits, model, seed=seed, progress=progress)
    if not distributed.first_here():
        return findings
    print(in_words(findings))

    picture.draw(findings, out / "demo.png")
    write_scores(findings, out)
    print(f"Wrote {out / 'demo.png'}, {out / 'influence.csv'} and {out / 'self_influence.csv'}.")
    return findings


def load(seed: int) -> Digits:
    """Splits the 1,797 digits at random and flips 5% of the training labels to another class."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    order = torch.randperm(len(images), generator=generator)
    train, test = order[int(TEST_SHARE * len(order)) :], order[: int(TEST_SHARE * len(order))]
    flipped = torch.randperm(len(train), generator=generator)[: round(FLIPPED_SHARE * len(train))]
    train_labels = labels[train].clone()
    train_labels[flipped] = (train_labels[flipped] + torch.randint(1, 10, flipped.shape, generator=generator)) % 10
    return Digits(images[train], train_labels, labels[train], flipped, images[test], labels[test])


def train(digits: Digits) -> nn.Module:
    """Fits a softmax regression, mean cross-entropy + WEIGHT_DECAY / 2 |params|^2, to its minimum."""
    model = nn.Linear(64, 10)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=500, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty = sum(p.square().sum() for p in model.parameters())
        loss = F.cross_entropy(model(digits.train_images), digits.train_labels) + WEIGHT_DECAY / 2 * penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    return model


def study(digits: Digits, model: nn.Module, *, seed: int, progress: bool) -> Findings:
    """Explains the test digits with the largest losses among the misclassified, and scores every training digit."""
    with torch.no_grad():
        predictions = model(digits.test_images).argmax(1)
        test_losses = F.cross_entropy(model(digits.test_images), digits.test_labels, reduction="none")
        losses = F.cross_entropy(model(digits.train_images), digits.train_labels, reduction="none")
    wrong = (predictions != digits.test_labels).nonzero().flatten()
    explained = wrong[test_losses[wrong].argsort(descending=True)][:EXPLAINED]

    influence = SimpleInfluence.from_dataset(
        model,
        TensorDataset(digits.train_images, digits.train_labels),
        loss_fn=F.cross_entropy,
        ridge=WEIGHT_DECAY,  # the Hessian of what was minimised is H + WEIGHT_DECAY I
        solver="auto",
        rtol=TOLERANCE,
        seed=seed,
        progress=progress,
    )
    scores = influence.scores([(digits.test_images[i], digits.test_labels[i]) for i in explained])
    explaining = influence.diagnostics
    self_influence = influence.self_influence()
    searching = influence.diagnostics
    return Findings(digits, explained, predictions, scores, self_influence, losses, explaining, searching)


def in_words(findings: Findings) -> str:
    """The findings, and what was solved to get them, for a reader who was not there."""
    digits, lines = findings.digits, []
    n, accuracy = len(digits.train_labels), (findings.predictions == digits.test_labels).double().mean()
    lines.append(
        f"Trained on {n} digits, {len(digits.flipped)} of them with a flipped label; "
        f"{100 * accuracy:.1f}% of {len(digits.test_labels)} test digits are classified right."
    )
    for test_index, row in zip(findings.explained.tolist(), findings.scores, strict=True):
        helpful, harmful = int(row.argmax()), int(row.argmin())
        lines.append(
            f"Test digit {test_index}, a {digits.test_labels[test_index]}, is taken for "
            f"{findings.predictions[test_index]}. Most helpful: training digit {helpful}, {_label(digits, helpful)}, "
            f"score {row[helpful]:+.2f}. Most harmful: training digit {harmful}, {_label(digits, harmful)}, "
            f"score {row[harmful]:+.2f}: without it the test loss would fall by about {-row[harmful] / n:.1g}."
        )
    lines.append(
        f"Flipped labels: {100 * findings.recall(0.1):.0f}% of them are among the 10% of training digits of highest "
        "self-influence."
    )
    for what, solved in (("To explain", findings.explaining), ("To search", findings.searching)):
        residual = float(solved.relative_residual.max())
        lines.append(
            f"{what}: (H + damping I) x = v was solved for {len(solved.status)} right-hand sides with an effective "
            f"damping of {solved.damping:g} by {solved.solver} in {solved.steps} steps; the relative residual on all "
            f"{n} training digits is at most {residual:.1e}: "
            f"{'converged' if residual <= TOLERANCE else 'NOT CONVERGED'} (to {TOLERANCE:g})."
        )
    return "\n".join(lines)


def write_scores(findings: Findings, out: Path) -> None:
    """One CSV of the influence of each training digit on each explained digit, and one of self-influence."""
    digits = findings.digits
    with (out / "influence.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["test_index", "test_label", "predicted", "train_index", "train_label", "true_label", "score"])
        for t, row in zip(findings.explained.tolist(), findings.scores.tolist(), strict=True):
            for i, score in enumerate(row):
                label, truth = int(digits.train_labels[i]), int(digits.true_labels[i])
                writer.writerow([t, int(digits.test_labels[t]), int(findings.predictions[t]), i, label, truth, score])
    with (out / "self_influence.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["train_index", "label", "true_label", "loss", "self_influence"])
        columns = (digits.train_labels, digits.true_labels, findings.losses, findings.self_influence)
        writer.writerows(zip(range(len(digits.train_labels)), *(c.tolist() for c in columns), strict=True))


def _label(digits: Digits, i: int) -> str:
    label, truth = int(digits.train_labels[i]), int(digits.true_labels[i])
    return f"a {label}" if label == truth else f"a {truth} labelled {label}"
