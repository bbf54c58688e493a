"""A run that is killed goes on to the same bits; a damaged or foreign state never becomes a number."""

import logging
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import bridge
from bridge import SimpleInfluence, checkpoint
from bridge.checkpoint import CheckpointError, Directory, Record, differences
from tests.bridge.fakes import BagOfWords, Reader, linear, pairs, sentences

pytestmark = pytest.mark.filterwarnings("ignore::bridge.diagnostics.InfluenceWarning")

# ---------------------------------------------------------------------- files


def states(path, name="a"):
    return sorted(path.glob(f"{name}.*.pt"))


def test_what_is_written_is_read_and_the_one_before_it_is_kept(tmp_path):
    directory = Directory(tmp_path)
    assert directory.read("a") is None
    for step in range(4):
        directory.write("a", {"step": step, "h": torch.full((3,), float(step)), "none": None, "list": [1, 2.5, "x"]})
    assert len(states(tmp_path)) == checkpoint.KEPT
    assert len(list(tmp_path.iterdir())) == checkpoint.KEPT  # nothing temporary is left
    read = directory.read("a")
    assert (read["step"], read["none"], read["list"]) == (3, None, [1, 2.5, "x"])
    assert torch.equal(read["h"], torch.full((3,), 3.0))
    # An open format: torch's own, readable without running code from it.
    assert torch.load(states(tmp_path)[0], weights_only=True)["step"] == 2


def damages(content):
    """Cut short at several places, emptied, grown, and with one bit changed at several places."""
    size = len(content)
    yield from (content[:keep] for keep in (0, 1, size // 3, size - 1))
    yield content + b"\0"
    for place in range(0, size, max(1, size // 16)):
        yield content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def test_a_damaged_state_is_told_and_the_one_before_it_used(tmp_path, caplog):
    directory = Directory(tmp_path)
    directory.write("a", {"step": 1})
    directory.write("a", {"step": 2})
    latest = states(tmp_path)[-1]
    whole = latest.read_bytes()
    for content in damages(whole):
        latest.write_bytes(content)
        caplog.clear()
        assert directory.read("a") == {"step": 1}
        assert "damaged" in caplog.text
    for path in states(tmp_path):
        path.write_bytes(b"")
    assert directory.read("a") is None


def test_what_a_killed_writer_leaves_is_not_read_but_removed(tmp_path):
    directory = Directory(tmp_path)
    directory.write("a", {"step": 1})
    left = tmp_path / "a.0123.tmp"
    left.write_bytes(states(tmp_path)[0].read_bytes()[:100])
    assert directory.read("a") == {"step": 1}
    assert not left.exists()


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, caplog):
    directory = Directory(tmp_path)
    record = Record(lambda values: directory.write("a", dict(values)))
    record.put("x", 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        record.put("x", 2)  # the run goes on
    assert "No space left" in caplog.text
    assert directory.read("a") == {"x": 1}
    assert not list(tmp_path.glob("*.tmp"))


def test_a_directory_that_cannot_be_used_is_an_error_before_work(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(CheckpointError, match="cannot be written to"):
        Directory(file).check("f")
    with pytest.raises(CheckpointError, match="are free there"):
        Directory(tmp_path).check_space("f", 10**18)

    def reader_that_must_not_be_asked():
        raise AssertionError

    with pytest.raises(CheckpointError, match=r"SimpleInfluence\(checkpoint_dir="):
        SimpleInfluence(linear(), None, reader_that_must_not_be_asked, checkpoint_dir=file)  # pyright: ignore


# ---------------------------------------------------------------------- records


def test_once_is_computed_once_and_forgets_its_steps():
    written = []
    record = Record(lambda values: written.append(dict(values)))

    def compute(part):
        part.put("step", 1)
        return {"x": torch.ones(2)}

    assert torch.equal(record.once("a", compute)["x"], torch.ones(2))
    assert [set(values) for values in written] == [{"a/step"}, {"a"}]
    again = Record(None, written[-1])
    assert torch.equal(again.once("a", lambda part: pytest.fail("computed twice"))["x"], torch.ones(2))


def test_states_are_written_at_an_interval(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    written = []
    record = Record(lambda values: written.append(now[0]), every=10.0)
    for second in range(1, 41):
        now[0] = float(second)
        record.note("x", second)
        record.save(only_if_due=True)
    assert written == [10, 20, 30, 40]

    def slow(values):
        written.append(now[0])
        now[0] += 3.0  # 3 s to write: at most a tenth of the time, so 30 s from one end to the next

    written.clear()
    record = Record(slow, every=10.0)
    for second in range(41, 120):
        now[0] = max(now[0], float(second))
        record.note("x", second)
        record.save(only_if_due=True)
    assert written == [50, 83, 116]


def test_differences_are_named():
    before = {"seed": "0", "data": "a" * 64, "loss": 1.0, "gone": "x"}
    now = {"seed": "1", "data": "b" * 64, "loss": 1.0 + 1e-9, "new": "y"}
    assert differences(before, now) == ["seed ('0', now '1')", "data (other content)", "gone (is gone)", "new (is new)"]
    assert differences({"loss": 1.0}, {"loss": 1.1}) == ["loss (1.0, now 1.1)"]


# ---------------------------------------------------------------------- runs


def influence(path, model=None, data=None, **kwargs):
    settings = {"loss_fn": F.cross_entropy, "ridge": 0.5, "scale": 5.0, "recursion_depth": 40, "progress": False}
    return SimpleInfluence.from_dataset(
        model or linear(), data or pairs(300), checkpoint_dir=path, **{"checkpoint_every": 0.0, **settings, **kwargs}
    )


def results(influence):
    """What several calls return, whole."""
    tests = pairs(5, seed=1)
    outputs = influence.interpret_both_ends(tests, k=4)
    ends = [[(e.score, e.loss) for e in (*o.most_helpful, *o.most_harmful)] for o in outputs]
    rest = [influence.scores(tests[:2]), influence.self_influence(range(7)), influence.inverse_hvps(tests[:2])]
    return ends, rest, influence.diagnostics.in_words()


def assert_same_bits(got, expected):
    assert got[0] == expected[0]
    torch.testing.assert_close(got[1], expected[1], rtol=0, atol=0)
    assert got[2] == expected[2]


class StoppedError(Exception):
    pass


def stopping_at(monkeypatch, write):
    """The run ends right after it has written its state for the `write`-th time, or with all done."""
    plain, count = Directory.write, [0]

    def counted(self, *args):
        plain(self, *args)
        count[0] += 1
        if count[0] == write:
            raise StoppedError

    monkeypatch.setattr(Directory, "write", counted)
    monkeypatch.setattr(checkpoint, "SHARE_OF_TIME", 1e9)  # at every opportunity


WAYS = {
    "lissa": {},
    "lissa, twice": {"num_samples": 2, "measure_residual": True},
    "cg": {"solver": "cg"},
    "tuned": {"solver": "auto", "scale": "auto", "recursion_depth": "auto"},
    "dense": {"solver": "dense"},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_stopped_at_any_write_goes_on_to_the_same_bits(tmp_path, monkeypatch, way):
    kwargs = {"score_batch_size": 4, **WAYS[way]}
    expected = results(influence(tmp_path / "whole", **kwargs))
    stops = 0
    # Each attempt is stopped after some more writes, so that it is stopped in every phase of every call.
    for _ in range(200):
        try:
            with monkeypatch.context() as patch:
                stopping_at(patch, 7)
                got = results(influence(tmp_path / "stopped", **kwargs))
                break
        except StoppedError:
            stops += 1
    assert stops >= 3
    assert_same_bits(got, expected)
    assert_same_bits(results(influence(tmp_path / "stopped", **kwargs)), expected)  # all of it read back


def test_instances_of_different_shapes_are_scored_the_same_wherever_a_run_stopped(tmp_path, monkeypatch):
    def scores(path):
        run = SimpleInfluence(
            BagOfWords(), sentences(90), Reader(), ridge=0.5, scale=5.0, recursion_depth=20, progress=False,
            score_batch_size=2, checkpoint_dir=path, checkpoint_every=0.0,
        )  # fmt: skip
        return run.scores(list(Reader().read(sentences(3, seed=1))))

    expected = scores(tmp_path / "whole")
    for _ in range(100):
        try:
            with monkeypatch.context() as patch:
                stopping_at(patch, 2)
                got = scores(tmp_path / "stopped")
                break
        except StoppedError:
            pass
    assert torch.equal(got, expected)


def test_damaged_states_never_become_a_number(tmp_path, monkeypatch, caplog):
    expected = results(influence(tmp_path / "whole", score_batch_size=4))
    caplog.set_level(logging.WARNING)
    for stop_at, both in ((4, False), (9, False), (12, True)):
        path = tmp_path / f"stopped {stop_at}"
        with monkeypatch.context() as patch:
            stopping_at(patch, stop_at)
            with pytest.raises(StoppedError):
                results(influence(path, score_batch_size=4))
        newest = sorted(path.glob("*.pt"))
        for damaged in newest if both else newest[-1:]:
            content = bytearray(damaged.read_bytes())
            content[len(content) // 2] ^= 255
            damaged.write_bytes(content[:-3] if both else content)
        assert_same_bits(results(influence(path, score_batch_size=4)), expected)
        assert "damaged" in caplog.text
        caplog.clear()


def changed(model):
    with torch.no_grad():
        model.weight[0, 0] += 1e-12
    return model


OTHER_RUNS = {
    "the model's 'weight' (other content)": {"model": changed(linear())},
    "the training data (other content)": {"data": [*pairs(299), (pairs(300)[299][0] + 1e-12, 0)]},
    "the number of training instances ('300', now '299')": {"data": pairs(299)},
    "seed ('0', now '1')": {"seed": 1},
    "damping ('0.5', now '0.4')": {"ridge": 0.4},
    "steps ('40', now '41')": {"recursion_depth": 41},
    "the loss of training instance 0": {"loss_fn": lambda z, y: 2 * F.cross_entropy(z, y)},
    "the parameters in use": {"params_to_freeze": ["bias"]},
}


@pytest.mark.parametrize("difference", OTHER_RUNS)
def test_a_state_of_another_run_is_refused_by_name(tmp_path, difference):
    tests = pairs(2, seed=1)
    influence(tmp_path).interpret_instances(tests, k=3)
    with pytest.raises(CheckpointError) as raised:
        influence(tmp_path, **OTHER_RUNS[difference]).interpret_instances(tests, k=3)
    assert difference in str(raised.value)
    assert str(tmp_path) in str(raised.value)


def test_other_calls_and_versions_are_refused_by_name(tmp_path, monkeypatch):
    tests = pairs(2, seed=1)
    influence(tmp_path).interpret_instances(tests, k=3)
    for call, difference in (
        (lambda run: run.interpret_instances(tests, k=4), r"argument k \('3', now '4'\)"),
        (lambda run: run.interpret_instances(pairs(2, seed=2), k=3), r"the test instances \(other content\)"),
        (lambda run: run.scores(tests), r"the call \('interpret_instances', now 'scores'\)"),
    ):
        with pytest.raises(CheckpointError, match=difference):
            call(influence(tmp_path))
    monkeypatch.setattr(torch, "__version__", "0.0")
    with pytest.raises(CheckpointError, match=r"torch's version \(.*, now '0.0'\)"):
        influence(tmp_path).interpret_instances(tests, k=3)


def test_without_a_directory_nothing_is_written_and_the_numbers_are_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    without = results(influence(None))
    assert not list(tmp_path.iterdir())
    # LiSSA and scores take the same steps and stacks with a record; other groupings of sums could differ in rounding.
    torch.testing.assert_close(results(influence(tmp_path / "kept"))[1], without[1], rtol=1e-12, atol=1e-14)


def test_allennlps_order_cannot_be_gone_back_to(tmp_path):
    with pytest.raises(ValueError, match="checkpoint_dir"):
        influence(tmp_path, compat="allennlp", ridge=None)


# ---------------------------------------------------------------------- kill -9

KILLED = """
import os, random, shutil, signal, sys, time, warnings
import torch
import torch.nn.functional as F
from bridge import SimpleInfluence
from tests.bridge.fakes import two_layers, pairs

torch.set_num_threads(1)
warnings.simplefilter("ignore")

def run(directory):
    influence = SimpleInfluence.from_dataset(
        two_layers(), pairs(1200), loss_fn=F.cross_entropy, ridge=0.5, scale=5.0, recursion_depth=120, num_samples=2,
        progress=False, checkpoint_dir=directory, checkpoint_every=0.005, score_batch_size=2)
    outputs = influence.interpret_both_ends(pairs(3, seed=1), k=5)
    ends = [[(e.score, e.loss) for e in (*o.most_helpful, *o.most_harmful)] for o in outputs]
    torch.save((ends, influence.scores(pairs(2, seed=2))), directory + ".result")

def child():  # a process of its own that is killed, without the seconds that importing torch takes
    pid = os.fork()
    if pid == 0:
        run("killed")
        os._exit(0)
    return pid

def written():
    return {name for name in os.listdir("killed") if name.endswith(".pt")} if os.path.isdir("killed") else set()

def check():
    (ends, scores), (expected_ends, expected_scores) = (
        torch.load(f"{name}.result", weights_only=True) for name in ("killed", "whole"))
    assert ends == expected_ends and torch.equal(scores, expected_scores)

def kill(pid, wanted):
    "Kills the process soon after it has written `wanted` states; False if it ended before."
    before = seen = written()
    while len(seen) < len(before) + wanted and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        seen = seen | written()
    time.sleep(chance.uniform(0, 0.02))
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == signal.SIGKILL

def phase():
    latest = max(written(), key=lambda name: name.split(".")[:2])
    try:
        keys = torch.load(os.path.join("killed", latest), weights_only=True)["values"]
    except Exception:
        return "writing"
    return "solving" if any("solved/" in key for key in keys) else "scoring"

run("whole")
chance = random.Random(int(sys.argv[1]))
phases = []
while len(phases) < 10 or not {"solving", "scoring"} <= set(phases):
    if kill(child(), wanted=chance.randint(1, 6)):  # one at least, so that each attempt gets further than the last
        phases.append(phase())
    else:  # how often a state is written depends on the machine: where the job outran us, it starts afresh
        check()
        shutil.rmtree("killed")
assert os.waitpid(child(), 0)[1] == 0
check()
print("same bits")
"""


def test_killed_ten_times_at_random_it_ends_with_the_same_bits(tmp_path):
    root = str(Path(bridge.__file__).parent.parent)
    # Where autograd has threads for a GPU, a process that was forked cannot use it.
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", KILLED, str(random.Random(0).randint(0, 10**6))]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "same bits\n"
