"""A plan counts what a run does. How well it predicts is measured by `benchmarks.plan`, not here: machines differ."""

import random

import pytest
import torch
import torch.nn.functional as F

from bridge import SimpleInfluence, plan, products, scored
from bridge.cli import main
from bridge.plan import Network, Rates, Work, predicted
from tests.bridge.fakes import linear, pairs, two_layers

WORK = Work(n=1000, tests=20, together=10, batch_size=100, steps=50, repeats=2, measured=3, ranks=1)
RATES = Rates(0.0, 1e-5, 0.0, 1e-3, 1e-3, 1e-5, 1e-4, passes=2, row_bytes=4, vector_bytes=400, process_bytes=10**8)


def test_shares_of_work_shrink_with_the_processes_and_sums_between_them_grow():
    one = predicted(WORK, RATES, Network(), most_kept=10**9)
    network = Network(bytes_per_second=1e6, latency=1e-4)
    four = predicted(WORK._replace(ranks=4), RATES, network, most_kept=10**9)
    for part in ("reading", "gradients", "residual", "scoring"):
        assert four.seconds[part] == pytest.approx(one.seconds[part] / 4)
    # Two groups of 2 repeats of 50 steps; each sends 2 * 3/4 of 10 vectors of 400 bytes, in 6 messages in turn.
    assert four.seconds["LiSSA"] - one.seconds["LiSSA"] == pytest.approx(2 * 2 * 50 * (1.5 * 4000 / 1e6 + 6e-4))
    assert one.traffic == 0
    # Beside the steps, the residual and the gradients are summed once a group.
    assert four.traffic == pytest.approx((2 * 2 * 50 + 2 + 2) * 1.5 * 4000)


def test_rows_that_do_not_fit_are_read_each_time():
    kept = predicted(WORK, RATES, Network(), most_kept=4000)
    anew = predicted(WORK, RATES, Network(), most_kept=3999)
    assert kept.seconds["reading"] == pytest.approx(1000 * 1e-5)
    # For each of two groups: the batches of two repeats, the residual, and the scores.
    assert anew.seconds["reading"] == pytest.approx(2 * (2 * 50 * 100 + 2 * 1000) * 1e-5)
    assert kept.memory - anew.memory == 4000
    in_one = predicted(WORK, RATES._replace(passes=1), Network(), most_kept=3999)
    assert in_one.seconds["reading"] == pytest.approx(2 * (2 * 50 * 100 + 1000) * 1e-5)


@pytest.mark.parametrize(("batch_size", "ranks"), [(1024, 2), (1024, 8), (4096, 64), (100, 4)])
def test_the_slowest_process_has_more_rows_of_a_batch_than_the_mean(batch_size, ranks):
    chance = random.Random(0)
    largest = []
    for _ in range(200):
        counts = [0] * ranks
        for _ in range(batch_size):
            counts[chance.randrange(ranks)] += 1
        largest.append(max(counts))
    # sqrt(2 m log R) is the largest deviation for many R, and too much by half of itself at worst, for R = 2.
    mean = sum(largest) / len(largest)
    assert WORK._replace(batch_size=batch_size, ranks=ranks).rows == pytest.approx(mean, rel=0.15)


def influence(**kwargs):
    settings = {"loss_fn": F.cross_entropy, "ridge": 0.5, "scale": 5.0, "recursion_depth": 40, "progress": False}
    return SimpleInfluence.from_dataset(two_layers(), pairs(300), **{**settings, **kwargs})


def test_the_probe_measures_what_the_run_does(monkeypatch):
    monkeypatch.setattr(plan, "PROBE_SECONDS", 0.0)
    now = [0.0]
    monkeypatch.setattr(plan.time, "perf_counter", lambda: now[0])
    inverse, score, both = products.inverse_products, scored.scores, scored.with_products

    def timed_inverse(*args, **kwargs):
        solve = inverse(*args, **kwargs)

        def solve_in_time(vectors, make):
            batches = list(make())
            now[0] += 7.0 + 0.5 * sum(len(y) for _, y in batches)  # half a second a row, and 7 to begin and end
            return solve(vectors, lambda: batches)

        return solve_in_time

    def timed_score(*args, **kwargs):
        for indices, scores in score(*args, **kwargs):
            now[0] += 0.25 * len(indices)
            yield indices, scores

    monkeypatch.setattr(products, "inverse_products", timed_inverse)

    def timed_both(session, train, vectors, count, *, chosen):
        now[0] += 0.4 * len(chosen)
        return both(session, train, vectors, count, chosen=chosen)

    monkeypatch.setattr(scored, "scores", timed_score)
    monkeypatch.setattr(scored, "with_products", timed_both)
    found = influence(lissa_batch_size=60).plan(pairs(3, seed=1), ranks=[1, 2], tests=6, together=3, n=1200)
    for one in found:
        assert one.seconds["LiSSA"] == pytest.approx(2 * 40 * (0.5 * one.work.rows), rel=1e-3)
        assert one.seconds["scoring"] == pytest.approx(2 * 0.25 * 1200 / one.work.ranks)
        assert one.memory > 10**7  # a process that has loaded torch
    assert [one.work.rows for one in found] == [60, 36]
    # One process finds products on the way to scores; two do not, and products alone take no time here.
    assert [one.seconds["residual"] for one in found] == [pytest.approx(2 * (0.4 - 0.25) * 1200), 0.0]


@pytest.mark.parametrize("what", ["too many scores", "a record is kept", "the losses of rows are not known"])
def test_residual_and_scores_are_planned_apart_where_they_are_found_apart(what, monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "PROBE_SECONDS", 0.0)
    if what == "too many scores":
        monkeypatch.setattr(scored, "MOST_FOUND", 3 * 1200 - 1)
    kept = {"checkpoint_dir": tmp_path} if what == "a record is kept" else {}
    loss = {"loss_fn": lambda z, y: z.square().sum() / len(z)} if what == "the losses of rows are not known" else {}
    session_rates, measured = [], plan.measured
    monkeypatch.setattr(plan, "measured", lambda *a, **k: session_rates.extend(measured(*a, **k)) or session_rates)
    influence(lissa_batch_size=60, **kept, **loss).plan(pairs(3, seed=1), tests=6, together=3, n=1200)
    assert [rates.passes for rates in session_rates] == [2]


def test_a_plan_needs_a_number_of_steps():
    with pytest.raises(ValueError, match="a number of steps"):
        influence(solver="cg").plan(pairs(2))
    with pytest.raises(ValueError, match=r"`plan\(ranks=...\)`"):
        influence().plan(pairs(2), ranks=[0])


def test_words_name_the_fewest_processes_that_do():
    plans = [predicted(WORK._replace(ranks=r), RATES, Network(), most_kept=0) for r in (1, 2, 4)]
    told = plan.in_words(plans, seconds=plans[1].total_seconds, memory=1e12)
    assert told.endswith("2 processes do.")
    assert "None of these" in plan.in_words(plans, memory=1.0)
    assert [plan.duration(s) for s in (1.234, 300, 7300, 2e5)] == ["1.23 s", "5 min", "2.03 h", "2.31 days"]
    assert [plan.size_in_words(s) for s in (0, 999.9, 2.5e9)] == ["0 B", "1 kB", "2.5 GB"]


def test_the_command_prints_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "PROBE_SECONDS", 0.0)
    module = type(torch)("planned")
    module.job = lambda: {
        "model": linear(),
        "train_dataset": pairs(50),
        "test_dataset": pairs(5),
        "loss_fn": F.cross_entropy,
    }
    monkeypatch.setitem(__import__("sys").modules, "planned", module)
    command = ["plan", "--model", "planned:job", "--examples", "100000", "--steps", "30", "--processes", "1,4"]
    assert main([*command, "--hours", "1000"]) == 0
    told = capsys.readouterr().out
    assert "5 test examples against 100,000 training examples" in told
    assert told.strip().endswith("1 process does.")
