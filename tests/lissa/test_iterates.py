"""Iterates in each of their forms against the recursion on all entries: `h <- v + e h - S_j^T A_j S_j h / scale`."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lissa import LastLayer
from lissa.iterates import Inputs, LookedUp, Lookup, Multiplied, Pace, Whole

K, V, M = 3, 5, 2
"""Right-hand sides; the matrix W has V columns (multiplied) or rows (looked up) of M entries."""


def normal(generator, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def whole(generator, steps):
    """`S_j = I`: W itself is seen, M numbers in each of its V rows."""
    return [torch.eye(V, dtype=torch.float64)] * steps, Whole


def looked_up(generator, steps, padding=None):
    indices = [torch.randint(V, (4,), generator=generator) for _ in range(steps)]
    of_row = torch.eye(V, dtype=torch.float64)
    if padding is not None:
        of_row[padding] = 0
    readers = [of_row[i] for i in indices]
    lookups = [Lookup.of(i, padding) for i in indices]
    return readers, lambda *stack: LookedUp(lookups, *stack)


def multiplied(generator, steps):
    readers = [normal(generator, rows, V) for rows in torch.randint(1, 4, (steps,), generator=generator).tolist()]
    layer = LastLayer("W", None)
    inputs = Inputs(layer, readers)

    def make(h, v, onward, pace):
        of_layer = [{"W": t.mT.contiguous()} for t in (h, v)]
        into = {"W": onward.mT.contiguous()}
        found = Multiplied(layer, inputs, of_layer[0], of_layer[0] if h is v else of_layer[1], into, pace)
        end = found.end
        found.end = lambda: (end(), onward.copy_(into["W"].mT))[0]
        return found

    return readers, make


FORMS = {
    "whole": whole,
    "looked up": looked_up,
    "looked up, with padding": lambda generator, steps: looked_up(generator, steps, padding=2),
    "multiplied": multiplied,
}


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("form", FORMS)
@given(seed=st.integers(0, 2**32), steps=st.integers(1, 9), c=st.sampled_from([0.0, 0.01, 0.4]), fresh=st.booleans())
def test_a_stretch_is_the_steps_that_it_is_made_of(form, in_place, seed, steps, c, fresh):
    generator = torch.Generator().manual_seed(seed)
    rate = 0.1
    readers, make = FORMS[form](generator, steps)
    answers = [normal(generator, len(S) * M, len(S) * M) / len(S) for S in readers]  # of what is seen, not symmetric
    v = normal(generator, K, V, M)
    given_v = v.clone()
    h = v if fresh else normal(generator, K, V, M)
    onward = h.clone() if fresh or not in_place else h
    residuals, sizes, expected = [], [], h.clone()
    for S, A in zip(readers, answers, strict=True):
        p = ((S @ expected).flatten(1) @ A.T).unflatten(1, (-1, M))
        after = v + (1 - c) * expected - rate * (S.T @ p)
        residuals.append((after - expected).flatten(1).norm(dim=1))
        sizes.append(after.flatten(1).norm(dim=1))
        expected = after

    iterates = make(h, v, onward, Pace.of(steps, c, rate))
    for j, A in enumerate(answers):
        seen = iterates.seen(j)
        iterates.step(j, (seen.flatten(1) @ A.T).unflatten(1, (-1, M)))
    squares = iterates.end()

    largest = float(torch.stack(sizes).max())
    torch.testing.assert_close(onward, expected, rtol=1e-9, atol=1e-10 * largest)
    # Norms are told from inner products of numbers as large as the largest iterate: half the digits of small ones.
    for got, lengths in ((squares.residuals, residuals), (squares.iterates, sizes)):
        torch.testing.assert_close(got.sqrt(), torch.stack(lengths), rtol=1e-7, atol=1e-6 * largest)
    torch.testing.assert_close(v, given_v, rtol=0, atol=0)


def test_pace_adds_up():
    pace = Pace.of(3, 0.5, 0.1)
    assert pace.powers == [1.0, 0.5, 0.25, 0.125]
    assert pace.sums == [0.0, 1.0, 1.5, 1.75]
    assert len(pace) == 3
