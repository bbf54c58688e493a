"""What an interpreter returns. Knows nothing of how it was found."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


class InstanceInfluence(NamedTuple):
    """A training instance, its loss, and its influence score.

    The score is `+ grad_train . (H + damping I)^-1 grad_test`, not divided by the number n of training examples.
    Positive = helpful: without this instance the test loss would be about `score / n` higher.
    """

    instance: Any
    loss: float
    score: float


class InterpretOutput(NamedTuple):
    """A test instance, its loss, and the training instances with the largest scores, largest first."""

    test_instance: Any
    loss: float
    top_k: list[InstanceInfluence]


class BothEnds(NamedTuple):
    """A test instance, its loss, and both ends of the ranking: most helpful first, most harmful first."""

    test_instance: Any
    loss: float
    most_helpful: list[InstanceInfluence]
    most_harmful: list[InstanceInfluence]


class InstanceWithGrads(NamedTuple):
    """A training instance, its loss, and its gradients in the order of `used_params`."""

    instance: Any
    loss: float
    grads: Sequence[Tensor]


class InfluenceEstimate(NamedTuple):
    """A training instance, its loss, its influence score, and how far that may be from the exact score.

    Attributes:
        instance: The training instance.
        loss: Its loss.
        score: As in `InstanceInfluence`.
        standard_error: Of the score, over `num_samples` independent solves; NaN where there was one, or none is random.
        bound: The exact score lies within this distance of `score`, whatever the solver did.
        settled: Whether the instance has its place in the ranking for certain: its interval meets no other instance's.
            The interval is that of the bound, or with a standard error the 95% interval of Student's t.
    """

    instance: Any
    loss: float
    score: float
    standard_error: float
    bound: float
    settled: bool


class EstimatedOutput(NamedTuple):
    """A test instance, its loss, and the training instances with the largest scores, largest first, with error bars."""

    test_instance: Any
    loss: float
    top_k: list[InfluenceEstimate]
