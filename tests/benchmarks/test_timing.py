import pytest
import torch

from benchmarks import timing


def test_ratios_are_taken_round_by_round():
    a, b = timing.summary([1.0, 10.0, 3.0]), timing.summary([2.0, 20.0, 3.0])

    assert a.median == 3.0
    assert timing.ratio(a, b).rounds == [0.5, 0.5, 1.0]
    assert timing.ratio(a, b).median == 0.5


def test_every_candidate_is_called_in_every_round():
    order = []
    times = timing.side_by_side({name: lambda name=name: order.append(name) for name in "ab"}, seconds=0.0, rounds=3)

    assert set(times) == {"a", "b"}
    assert all(len(t.rounds) == 3 and 0 < t.lower <= t.median <= t.upper for t in times.values())
    assert {"a", "b"} == set(order)


@pytest.mark.parametrize("kept", [1, 3])
def test_peak_memory_counts_what_is_alive_at_once(kept):
    def call():
        alive = [torch.ones(1000, dtype=torch.float64) for _ in range(kept)]
        torch.ones(1000, dtype=torch.float64)  # released at once, and its memory may be counted for a moment
        return alive

    assert kept * 8000 <= timing.peak_bytes(call) <= (kept + 1) * 8000 + 1000
