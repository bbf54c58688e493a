"""The commands survive what people give them: each failure names its place, computes nothing, and has its exit code."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

import bridge
from bridge import job, run
from bridge.cli import main
from bridge.files import InputError, read
from bridge.simple_influence import SimpleInfluence

GOOD = "text,label\na fine film,pos\ndull,neg\n"


def problem(tmp_path, content, name="train.csv", **columns):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as raised:
        read(path, **{"text_column": "text", "label_column": "label", **columns})
    return str(raised.value).replace(str(path), name)


def test_rows_have_the_line_they_begin_in(tmp_path):
    path = tmp_path / "train.csv"
    path.write_bytes(b'\xef\xbb\xbftext,label\r\n"two\r\nlines",pos\r\none,1\r\n')
    rows = read(path, text_column="text", label_column="label")
    assert [(row.line, row.text, row.label) for row in rows] == [(2, "two\nlines", "pos"), (4, "one", "1")]


def test_json_lines(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "a", "label": 1}\n{"text": "b", "label": "x", "more": null}\n')
    assert read(path, text_column="text", label_column="label") == [(1, "a", "1"), (2, "b", "x")]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "train.csv: the file is empty."),
        ("text,label\n", "train.csv: there is a header, but no row."),
        ("texts,label\na,b\n", "Did you mean 'texts'?"),
        (GOOD + ",pos\n", "train.csv, line 4: the text ('text') is empty."),
        (GOOD + "x,\n", "train.csv, line 4: the label ('label') is empty."),
        (GOOD + "\nx,pos\n", "train.csv, line 4: the row is empty."),
        (GOOD + "a, b,pos\n", "train.csv, line 4: the header has 2 columns, this row 3."),
        (GOOD.encode() + b"caf\xe9,pos\n", "train.csv, line 4: byte 0xe9 is not UTF-8"),
        ('text,label\n"open,pos\n', "train.csv, line 2: not a row of separated values"),
        ("text,text\na,b\n", "the header names 'text' twice"),
    ],
)
def test_mistakes_in_a_file_are_named_by_line(tmp_path, content, says):
    assert says in problem(tmp_path, content)


def test_mistakes_in_json_lines_are_all_told(tmp_path):
    told = problem(tmp_path, '{"text": "a", "label": true}\n{\n[1]\n{"text": 3, "label": "x"}\n', "train.jsonl")
    assert [f"line {line}" in told for line in (1, 2, 3, 4)] == [True] * 4


def test_a_missing_file_and_an_unknown_format_are_named(tmp_path):
    (tmp_path / "train.csv").write_text(GOOD)
    with pytest.raises(InputError, match=r"there is no such file. Did you mean 'train.csv'\?"):
        read(tmp_path / "trian.csv", text_column="text", label_column="label")
    with pytest.raises(InputError, match="tells the format"):
        read(tmp_path / "train.txt", text_column="text", label_column="label")


def test_params_keeps_what_begins_with_a_match_and_nothing_else():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(1, 1), "aa": torch.nn.Linear(1, 1), "b": torch.nn.Linear(1, 1)})
    for pattern, expected in ((r"a\.", ["a.weight", "a.bias"]), ("a", ["a.weight", "a.bias", "aa.weight", "aa.bias"])):
        names = job.kept(model, [pattern])
        assert names == expected
        freeze = job.freezing_the_rest(model, names)
        interpreter = SimpleInfluence.from_dataset(model, [0], params_to_freeze=freeze)
        assert interpreter._candidates == expected
    with pytest.raises(InputError, match="no parameter's name begins so"):
        job.kept(model, ["weight"])
    with pytest.raises(InputError, match="not a regular expression"):
        job.kept(model, ["("])


# ---------------------------------------------------------------------- a function's model


def a_job(tests=5, n=24):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n + tests, 3, generator=generator, dtype=torch.float64)
    y = (x[:, 0] > 0).long()
    model = torch.nn.Linear(3, 2, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-1.0, 0.2, 0.0], [1.0, 0.0, 0.1]]))
        model.bias.zero_()
    return {
        "model": model,
        "train_dataset": TensorDataset(x[:n], y[:n]),
        "test_dataset": TensorDataset(x[n:], y[n:]),
        "loss_fn": F.cross_entropy,
    }


class Interrupting(TensorDataset):
    """Ctrl-C arrives when the last test example is read."""

    def __getitem__(self, i):
        if i == len(self) - 1:
            signal.raise_signal(signal.SIGINT)
        return super().__getitem__(i)


@pytest.fixture
def module(monkeypatch):
    """`--model thejob:job` for the command line."""
    this = type(sys)("thejob")
    this.job = a_job
    this.interrupted = lambda: {
        **a_job(),
        "test_dataset": Interrupting(*a_job()["test_dataset"].tensors),
    }
    this.no_mapping = lambda: 3
    monkeypatch.setitem(sys.modules, "thejob", this)
    return this


EXACT = ["--solver", "dense", "--ridge", "0.1", "--no-report", "--quiet"]


def test_run_writes_what_simple_influence_says(tmp_path, module):
    assert main(["run", "--model", "thejob:job", "--k", "3", "--out", str(tmp_path), *EXACT]) == 0
    given = a_job()
    scores = SimpleInfluence.from_dataset(
        given["model"], given["train_dataset"], loss_fn=F.cross_entropy, solver="dense", ridge=0.1, progress=False
    ).scores(given["test_dataset"])
    rows = list(csv.DictReader((tmp_path / "influence.csv").read_text().splitlines()))
    assert len(rows) == 5 * 2 * 3
    for row in rows:
        expected = scores[int(row["test_index"])]
        place = expected.argsort(descending=row["direction"] == "helpful")[int(row["rank"]) - 1]
        assert int(row["train_index"]) == int(place)
        # Written with all digits; grouping changes the order of sums only.
        assert float(row["score"]) == pytest.approx(float(expected[place]), rel=1e-10)
    assert json.loads((tmp_path / "settings.json").read_text())["used"]["damping"] == 0.1
    assert not (tmp_path / "influence.partial.csv").exists()


def test_self_ranks_by_self_influence(tmp_path, module):
    assert main(["self", "--model", "thejob:job", "--out", str(tmp_path), "--format", "jsonl", *EXACT]) == 0
    given = a_job()
    expected = SimpleInfluence.from_dataset(
        given["model"], given["train_dataset"], loss_fn=F.cross_entropy, solver="dense", ridge=0.1, progress=False
    ).self_influence()
    rows = [json.loads(line) for line in (tmp_path / "self_influence.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == expected.argsort(descending=True).tolist()
    assert [row["self_influence"] for row in rows] == pytest.approx(expected.sort(descending=True)[0].tolist())


def test_check_tells_meaningful_from_not_by_its_exit_code(module, capsys):
    assert main(["check", "--model", "thejob:job", "--ridge", "0.1", "--solver", "dense", "--quiet"]) == 0
    assert main(["check", "--model", "thejob:job", "--ridge", "1e6", "--solver", "dense", "--quiet"]) == 4
    assert "NOT MEANINGFUL" in capsys.readouterr().out


def test_k_larger_than_the_data_ranks_all(tmp_path, module, capsys):
    assert main(["run", "--model", "thejob:job", "--k", "99", "--out", str(tmp_path), *EXACT]) == 0
    assert "all are ranked" in capsys.readouterr().err
    assert len(list(csv.DictReader((tmp_path / "influence.csv").read_text().splitlines()))) == 5 * 2 * 24


def test_ctrl_c_keeps_what_is_done_and_names_it(tmp_path, module, capsys, monkeypatch):
    monkeypatch.setattr(run, "GROUP", 2)
    assert main(["run", "--model", "thejob:interrupted", "--out", str(tmp_path), *EXACT]) == 130
    partial = tmp_path / "influence.partial.csv"
    assert f"Kept: the results of 4 of 5 test examples, in {partial}" in capsys.readouterr().err
    assert {row["test_index"] for row in csv.DictReader(partial.read_text().splitlines())} == set("0123")
    assert not (tmp_path / "influence.csv").exists()


def test_the_same_command_goes_on_where_it_was_interrupted(tmp_path, module, monkeypatch):
    monkeypatch.setattr(run, "GROUP", 2)
    kept = [*EXACT, "--checkpoint", str(tmp_path / "state"), "--checkpoint-every", "0"]
    whole = [*EXACT, "--checkpoint", str(tmp_path / "another state")]
    assert main(["run", "--model", "thejob:job", "--out", str(tmp_path / "whole"), *whole]) == 0
    assert main(["run", "--model", "thejob:interrupted", "--out", str(tmp_path / "out"), *kept]) == 130
    solved = []
    plain = SimpleInfluence._solutions
    monkeypatch.setattr(SimpleInfluence, "_solutions", lambda *args, **kw: solved.append(1) or plain(*args, **kw))
    assert main(["run", "--model", "thejob:job", "--out", str(tmp_path / "out"), *kept]) == 0
    assert len(solved) == 1  # the third group; the first two are there
    files = [(tmp_path / out / "influence.csv").read_text() for out in ("whole", "out")]
    assert files[0] == files[1]
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert "checkpoint_dir" not in settings["asked"]


def test_self_goes_on_too_and_another_run_is_told_apart(tmp_path, module, monkeypatch, capsys):
    monkeypatch.setattr(run, "SELF_GROUP", 10)
    lissa = ["--solver", "lissa", "--ridge", "0.5", "--scale", "5", "--steps", "30", "--no-report", "--quiet"]
    command = ["self", "--model", "thejob:job", "--checkpoint", str(tmp_path / "state"), *lissa]
    files = []
    for out in ("first", "again"):
        assert main([*command, "--out", str(tmp_path / out)]) == 0
        files.append((tmp_path / out / "self_influence.csv").read_text())
    assert files[0] == files[1]
    assert main([*command, "--out", str(tmp_path / "other"), "--seed", "1"]) == 3
    assert "seed ('0', now '1')" in capsys.readouterr().err


WAITING_JOB = """
import time, torch
from torch.utils.data import TensorDataset

class Waiting(TensorDataset):
    def __getitem__(self, i):
        if i == 20:  # in the second group
            time.sleep(600)
        return super().__getitem__(i)

def job():
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()
    return {"model": torch.nn.Linear(3, 2), "train_dataset": TensorDataset(x, y), "test_dataset": Waiting(x, y),
            "loss_fn": torch.nn.functional.cross_entropy}
"""


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_command_itself_keeps_what_is_done(tmp_path, sent, code):
    (tmp_path / "waiting.py").write_text(WAITING_JOB)
    command = [sys.executable, "-m", "bridge", "run", "--model", "waiting:job", "--out", "out", *EXACT]
    path = [str(Path(bridge.__file__).parent.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    partial = tmp_path / "out" / "influence.partial.csv"
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 300
        while not (partial.exists() and len(partial.read_text().splitlines()) > 1):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        process.send_signal(sent)
        told = process.communicate(timeout=150)[1]
    assert process.returncode == code
    assert "Kept: the results of 16 of 40 test examples, in out/influence.partial.csv" in told
    assert "Traceback" not in told
    rows = list(csv.DictReader(partial.read_text().splitlines()))
    assert {int(row["test_index"]) for row in rows} == set(range(16))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "nowhere:job"], "no module 'nowhere'"),
        (["--model", "thejob:nothing"], "no function 'nothing'"),
        (["--model", "thejob:no_mapping"], "must return a mapping"),
        (["--model", "no-such-directory"], "no such directory"),
        (["--model", "thejob:job", "--train", "x.csv"], "leave out --train"),
        (["--model", "thejob:job", "--params", "nothing"], "no parameter's name begins so"),
    ],
)
def test_what_cannot_be_used_has_its_own_exit_code(tmp_path, module, capsys, arguments, says):
    assert main(["run", *arguments, "--out", str(tmp_path), *EXACT]) == 3
    assert says in capsys.readouterr().err


def test_wrong_usage_is_exit_code_2(module):
    with pytest.raises(SystemExit, match="2"):
        main(["run", "--model", "thejob:job", "--out", "x", "--ridge", "-1"])
