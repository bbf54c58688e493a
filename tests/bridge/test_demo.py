"""The main job on a seed of its own: what it claims in words holds in its files."""

import csv

import pytest
import torch
import torch.nn.functional as F

from bridge import demo
from bridge.cli import main


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return demo.run(out, seed=1, progress=False), out


def test_labels_are_flipped_to_another_class_and_the_seed_decides():
    digits, same, other = demo.load(3), demo.load(3), demo.load(4)
    wrong = (digits.train_labels != digits.true_labels).nonzero().flatten()
    assert sorted(digits.flipped.tolist()) == wrong.tolist()
    assert len(wrong) == round(0.05 * len(digits.train_labels))
    assert torch.equal(digits.train_labels, same.train_labels)
    assert not torch.equal(digits.flipped, other.flipped)


def test_training_ends_where_the_gradient_vanishes():
    digits = demo.load(0)
    model = demo.train(digits)
    loss = F.cross_entropy(model(digits.train_images), digits.train_labels)
    loss = loss + demo.WEIGHT_DECAY / 2 * sum(p.square().sum() for p in model.parameters())
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    # A float32 loss near 1 is resolved to 1.2e-7, so a descent stops seeing progress at a gradient of about
    # sqrt(2 lambda_max 1.2e-7) = 5e-4, with the largest eigenvalue near 1.
    assert gradient.norm() < 5e-4


def test_it_finds_the_flipped_labels_and_its_solves_converge(done):
    findings, _ = done
    assert findings.recall(0.1) >= 0.9
    assert findings.explaining.damping == findings.searching.damping == demo.WEIGHT_DECAY
    assert float(findings.explaining.relative_residual.max()) <= 1e-2
    assert float(findings.searching.relative_residual.max()) <= 1e-2


def test_it_says_what_was_solved(done):
    words = demo.in_words(done[0])
    assert "effective damping of 0.01" in words
    assert words.count("converged (to 0.01)") == 2
    assert "NOT CONVERGED" not in words
    worse = done[0].explaining._replace(relative_residual=torch.tensor([0.5]))
    assert "NOT CONVERGED" in demo.in_words(done[0]._replace(explaining=worse))


def test_the_explained_digits_are_misclassified(done):
    findings, _ = done
    assert len(findings.explained) == demo.EXPLAINED
    assert (findings.predictions[findings.explained] != findings.digits.test_labels[findings.explained]).all()


def test_the_tables_hold_every_score(done):
    findings, out = done
    with (out / "self_influence.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["self_influence"]) for row in rows] == pytest.approx(findings.self_influence.tolist())
    flipped = [int(row["train_index"]) for row in rows if row["label"] != row["true_label"]]
    assert flipped == sorted(findings.digits.flipped.tolist())
    with (out / "influence.csv").open() as file:
        scores = [float(row["score"]) for row in csv.DictReader(file)]
    assert scores == pytest.approx(findings.scores.flatten().tolist())


def test_the_picture_is_a_png_of_a_size_to_look_at(done):
    header = (done[1] / "demo.png").read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    width, height = int.from_bytes(header[16:20]), int.from_bytes(header[20:24])
    assert width > 1000
    assert height > 500


def test_a_place_that_cannot_be_written_to_is_an_error_before_any_work(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["demo", "--out", str(tmp_path / "file"), "--quiet"]) == 1
    assert "file" in capsys.readouterr().err
