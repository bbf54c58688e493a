"""Any number of processes give one process's numbers; one that fails or dies ends all, with its name."""

import csv
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import bridge
from bridge import SimpleInfluence, distributed
from bridge.distributed import Ranks
from tests.bridge.fakes import linear, pairs

ROOT = str(Path(bridge.__file__).parent.parent)


def environment(**more):
    return {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", **more}


def launched(code, count, cwd, *arguments):
    """`count` processes of the same code in one process group, started."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            cwd=cwd,
            env=environment(RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def ended(processes, timeout=300):
    """What each process wrote to its two outputs."""
    try:
        return [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()


# ---------------------------------------------------------------------- one process


@pytest.mark.parametrize(("n", "size"), [(0, 3), (1, 3), (7, 3), (9, 3), (2, 5)])
def test_shares_are_even_and_hold_each_row_once(n, size):
    shares = []
    for rank in range(size):
        ranks = Ranks()
        ranks.rank, ranks.size = rank, size
        shares.append(ranks.share(n))
        assert ranks.of_share(range(n), n) == list(shares[-1])
    assert [i for share in shares for i in share] == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_sums_to_what_it_has():
    alone, tensors = Ranks(), {"a": torch.ones(2)}
    assert alone.sum(tensors) is tensors
    assert (alone.gathered(3), alone.agreed(3), alone.most(3)) == ([3], 3, 3)
    with pytest.raises(ValueError, match="wrong"):
        alone.raise_first(lambda: (_ for _ in ()).throw(ValueError("wrong")))


def test_a_group_must_be_one():
    assert distributed.ranks_of("f", None, torch.device("cpu")).size == 1
    assert distributed.ranks_of("f", "all", torch.device("cpu")).size == 1  # torch.distributed is not initialised
    with pytest.raises(TypeError, match=r"`f\(process_group=...\)` must be"):
        distributed.ranks_of("f", 3, torch.device("cpu"))


def test_wrapped_models_are_refused():
    wrapper = type("DistributedDataParallel", (torch.nn.Module,), {})()
    with pytest.raises(ValueError, match=r"pass `model.module`"):
        distributed.check_whole("f", wrapper)


# ---------------------------------------------------------------------- the same numbers

PARITY = """
import sys, warnings
import torch
import torch.distributed as dist
import torch.nn.functional as F
from bridge import SimpleInfluence, distributed
from tests.bridge.fakes import BagOfWords, Reader, linear, pairs, sentences

torch.set_num_threads(1)
warnings.simplefilter("ignore")
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
groups = {size: dist.new_group(range(size)) for size in range(2, world + 1)}

class Watched(list):  # which rows were read
    def __init__(self, rows):
        super().__init__(rows)
        self.read = set()
    def __getitem__(self, i):
        self.read.add(i)
        return super().__getitem__(i)

# 26 rows twice over: shares are uneven, and scores of equal rows tie. Batches of 3 have no row of some of 4 ranks.
ROWS = [*pairs(26), *pairs(26), *pairs(1, seed=5)]
WAYS = {
    "lissa": {"lissa_batch_size": 3, "num_samples": 2, "measure_residual": True},
    "cg": {"solver": "cg"},
    "auto": {"solver": "auto"},
}

def calls(influence, tests):
    both = influence.interpret_both_ends(tests, k=7)
    found = [[(e.score, e.loss) for e in (*one.most_helpful, *one.most_harmful)] for one in both]
    # By content: the scores of equal rows may differ in their last bit, as the shares are multiplied by apart.
    which = [[str(e.instance) for e in (*one.most_helpful, *one.most_harmful)] for one in both]
    bars = influence.interpret_with_error_bars(tests[:1], k=60)[0].top_k
    numbers = [torch.tensor(found), influence.scores(tests), influence.self_influence(), influence.inverse_hvps(tests),
               torch.tensor([(e.score, e.bound) for e in bars]), influence.diagnostics.relative_residual]
    return numbers, which

def of_pairs(group, **kw):
    rows = Watched(ROWS)
    influence = SimpleInfluence.from_dataset(
        linear(), rows, loss_fn=F.cross_entropy, ridge=0.5, progress=False, process_group=group, score_batch_size=4,
        **{"scale": 5.0, "recursion_depth": 20, **kw})
    return influence, pairs(5, seed=1), rows

def of_text(group):
    influence = SimpleInfluence(
        BagOfWords(), sentences(31), Reader(), ridge=0.5, scale=5.0, recursion_depth=20, progress=False,
        lissa_batch_size=5, process_group=group, score_batch_size=4)
    return influence, list(Reader().read(sentences(5, seed=1)))

for way, kw in WAYS.items():
    expected, which = calls(*of_pairs(None, **kw)[:2])
    for size, group in groups.items():
        if rank < size and (way == "lissa" or size == 3):
            got, found = calls(*of_pairs(group, **kw)[:2])
            # Sums over ranks round in another order, by some 1e-16 in float64; the solves do not amplify that much.
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
            assert way != "lissa" or found == which

expected = calls(*of_text(None))[0]
got = calls(*of_text(dist.group.WORLD))[0]
torch.testing.assert_close(got[:-1], expected[:-1], rtol=1e-10, atol=1e-10)

# Each process reads its share, and beside it what was ranked, no more.
influence, tests, rows = of_pairs("all", lissa_batch_size=8)
influence.interpret_instances(tests[:1], k=2)
share = influence._ranks.share(len(ROWS))
assert set(share) <= rows.read, rows.read
assert len(rows.read - set(share)) <= 2 * 2, rows.read  # both ends

# What differs between the processes is told, by name.
try:
    of_pairs("all", seed=rank)[0].scores(tests)
    raise AssertionError
except ValueError as error:
    assert "rank 1 does not make the call of rank 0" in str(error) and "seed" in str(error), error

from torch.distributed.tensor import distribute_tensor, init_device_mesh
model = linear()
mesh = init_device_mesh("cpu", (world,))
model.weight = torch.nn.Parameter(distribute_tensor(model.weight.detach(), mesh))
try:
    SimpleInfluence.from_dataset(model, ROWS, loss_fn=F.cross_entropy)
    raise AssertionError
except ValueError as error:
    assert "whole parameters" in str(error) and "'weight'" in str(error)
dist.barrier()
dist.destroy_process_group()
print("ok")
"""


def test_two_three_and_four_processes_give_the_numbers_of_one(tmp_path):
    for out, err in ended(launched(PARITY, 4, tmp_path)):
        assert out == "ok\n", err


# ---------------------------------------------------------------------- failures

FAILING = """
import os, signal, sys, warnings
import torch
import torch.distributed as dist
import torch.nn.functional as F
from bridge import SimpleInfluence
from bridge.checkpoint import Directory
from tests.bridge.fakes import linear, pairs

torch.set_num_threads(1)
warnings.simplefilter("ignore")
dist.init_process_group("gloo")
how, rank = sys.argv[1], dist.get_rank()

class Rows(list):
    reads = 0
    def __getitem__(self, i):
        Rows.reads += 1
        if how == "raises" and rank == 2 and i == 70 and Rows.reads > 150:
            raise OSError("the disk is gone")
        return super().__getitem__(i)

write, writes = Directory.write, []
def counted(*args):  # of rank 0, and it tells rank 1 when to die
    write(*args)
    writes.append(1)
    if len(writes) == 12:
        open("now", "w").close()
Directory.write = counted

class Model(torch.nn.Linear):
    def forward(self, x):
        if how == "killed" and rank == 1 and os.path.exists("now"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)

model = Model(4, 3, dtype=torch.float64)
model.load_state_dict(linear().state_dict())
influence = SimpleInfluence.from_dataset(
    model, Rows(pairs(100)), loss_fn=F.cross_entropy, ridge=0.5, scale=5.0 if how != "diverges" else 0.05,
    recursion_depth=600, progress=False, checkpoint_dir=None if how == "raises" else "state", checkpoint_every=0.0,
    collate_fn=torch.utils.data.default_collate)
scores = influence.scores(pairs(3, seed=1))
if rank == 0:
    torch.save(scores, f"{how}.pt")
dist.barrier()
dist.destroy_process_group()
print("ok")
"""


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("killed", r"RankError: Rank 1 of 3 \(process \d+ on .*\) died"),
        (
            "raises",
            r"RankError: Rank 2 of 3 \(process \d+ on .*\) failed with ValueError: Training instance 70: OSError",
        ),
    ],
)
def test_a_process_that_dies_or_fails_ends_all_with_its_name_and_the_run_goes_on(tmp_path, how, says):
    processes = launched(FAILING, 3, tmp_path, how)
    culprit = 1 if how == "killed" else 2
    processes[culprit].wait(timeout=200)
    start = time.monotonic()
    told = ended(processes)
    assert time.monotonic() - start < 60
    assert processes[culprit].returncode == (-signal.SIGKILL if how == "killed" else 1)
    for rank in {0, 1, 2} - {culprit}:
        assert processes[rank].returncode == 1
        last = [line for line in told[rank][1].splitlines() if "RankError" in line][-1]
        assert re.search(says, last), told[rank][1]
    if how == "killed":
        assert list((tmp_path / "state").glob("*.pt"))
        for out, err in ended(launched(FAILING, 2, tmp_path, "continued")):  # by another number of processes
            assert out == "ok\n", err
        expected = SimpleInfluence.from_dataset(
            linear(), pairs(100), loss_fn=F.cross_entropy, ridge=0.5, scale=5.0, recursion_depth=600, progress=False
        ).scores(pairs(3, seed=1))
        # Sums over another number of processes round in another order.
        torch.testing.assert_close(torch.load(tmp_path / "continued.pt"), expected, rtol=1e-10, atol=1e-10)


def test_the_command_under_torchrun_writes_what_one_process_writes(tmp_path):
    (tmp_path / "thejob.py").write_text(
        "from tests.bridge.fakes import linear, pairs\nimport torch\n"
        "def job():\n"
        "    torch.set_num_threads(1)\n"
        "    return {'model': linear(), 'train_dataset': pairs(60), 'test_dataset': pairs(18, seed=1),\n"
        "            'loss_fn': torch.nn.functional.cross_entropy}\n"
    )
    settings = ["--model", "thejob:job", "--solver", "lissa", "--ridge", "0.5", "--scale", "5", "--steps", "50"]
    command = ["-m", "bridge", "run", *settings, "--no-report"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    tables = []
    for launcher, out in (([], "one"), (torchrun, "two")):
        run = [sys.executable, *launcher, *command, "--out", out]
        done = subprocess.run(run, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Wrote") == 1
        tables.append(list(csv.DictReader((tmp_path / out / "influence.csv").read_text().splitlines())))
    assert len(tables[0]) == 18 * 2 * 10
    for one, two in zip(*tables, strict=True):
        assert float(two.pop("score")) == pytest.approx(float(one.pop("score")), rel=1e-10)
        assert one == two
