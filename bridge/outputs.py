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
