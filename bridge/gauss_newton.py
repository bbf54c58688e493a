"""Gauss-Newton influence of all training instances on all test instances, solved in the space of outputs.

Knows instances, their order, and `lissa.dual_influence`; knows nothing of how scores become a result.
"""

import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bridge import progress
from bridge.diagnostics import Diagnostics
from bridge.scoring import Reduction
from bridge.session import Session
from lissa import Batch, DualInfluence, Status, dual_influence, output_gram, tree
from lissa.dual import MOST_ROWS

NAME = "gauss-newton"

BATCH = 64
"""Instances whose Jacobians are taken together."""

MOST_OUTPUTS = 2**14
"""Most outputs of all training instances: the matrix between them is kept some five times in float64, each 2 GiB."""

AGREES = 1e-3
"""The loss of the outputs must be the model's loss to this relative precision: float32 keeps more, bfloat16 not."""


def influence(
    session: Session, train: Sequence[Any], tests: Sequence[Any] | None, *, damping: float | None
) -> DualInfluence:
    """`lissa.dual_influence` of instances, in their order.

    Args:
        session: Of the public call.
        train: Training instances.
        tests: Test instances; None stands for the training instances.
        damping: In the units of the Gauss-Newton matrix; None for a tenth of its mean eigenvalue.

    Returns:
        Scores of shape `(T, n)` and the rest.

    Raises:
        TypeError: If the model's loss is not known as a function of its outputs.
        ValueError: If it is not the mean of the losses of the outputs of each instance, there are too many outputs, or
            something is not finite.
    """
    model = session.model
    order, batches = _batches(session, "training", train)
    _check(session, train, order, batches)
    test_order, test_batches = (order, None) if tests is None else _batches(session, "test", tests)
    most_rows = _rows_that_fit(model.device, next(iter(model.params.values())).itemsize)
    numbers = len(order) * _width(session, batches[0]) * tree.numel(model.params)
    chunks = -(-numbers // most_rows)
    # A chunk of rows meets itself and the batches after it; outputs, and test rows, meet each batch once more.
    uses = len(batches) * (chunks + 1) // 2 + len(batches) * (1 if tests is None else 2)
    watched = _Watched(batches, progress.bar(range(uses), description="Jacobians of the outputs", show=session.show))
    try:
        gram = output_gram(model.output_fn, model.params, watched, most_rows=most_rows)
        found = dual_influence(
            model.output_fn, model.output_loss_fn, model.params, watched, test_batches, damping=damping, gram=gram,
            most_rows=most_rows,
        )  # fmt: skip
    except ValueError:
        session.first_not_finite("training", train)
        session.first_not_finite("test", tests or ())
        raise
    places, test_places = torch.tensor(order).argsort(), torch.tensor(test_order).argsort()
    return found._replace(
        scores=found.scores[test_places][:, places],
        leave_one_out=found.leave_one_out[test_places][:, places],
        self_influence=found.self_influence[places],
        relative_residual=found.relative_residual[test_places],
        cosine=found.cosine[test_places],
    )


def self_influence(session: Session, train: Sequence[Any], *, damping: float | None) -> dict[str, Any]:
    """The self-influence of all training instances, `"scores"`, and what is `"known"` of it."""
    found = influence(session, train, None, damping=damping)
    return {"scores": found.self_influence.to(_dtype(session)), "known": _diagnostics(found, len(train))._asdict()}


def scored(
    session: Session, train: Sequence[Any], tests: Sequence[Any], *, damping: float | None, reduction: Reduction
) -> dict[str, Any]:
    """Test `"losses"`, what the reduction makes of all scores, `"reduced"`, and what is `"known"` of them."""
    losses = session.losses("test", tests, range(len(tests)))
    found = influence(session, train, tests, damping=damping)
    return {
        "losses": torch.tensor(list(losses.values())),
        "reduced": reduction.fold({}, range(len(train)), found.scores.to(_dtype(session))),
        "known": _diagnostics(found, len(train))._asdict(),
    }


def _diagnostics(found: DualInfluence, examples: int) -> Diagnostics:
    unknown = torch.full_like(found.cosine, torch.nan).cpu()
    return Diagnostics(
        solver=NAME,
        damping=found.damping,
        scale=math.nan,
        steps=1,
        num_samples=1,
        examples=examples,
        batch_size=examples,
        status=torch.full_like(unknown, Status.CONVERGED, dtype=torch.long),
        relative_residual=found.relative_residual.cpu(),
        cosine_with_gradient=found.cosine.cpu(),
        correlation_with_plain=unknown,
        largest_eigenvalue=math.nan,
    )


def _dtype(session: Session) -> torch.dtype:
    return next(iter(session.model.params.values())).dtype


def _batches(session: Session, role: str, instances: Sequence[Any]) -> tuple[list[int], list[Batch]]:
    """All instances in batches of equal shapes, nothing padded that is not padded alone, and their order in them."""
    order: list[int] = []
    batches = []
    stacks = session.examples(instances, size=BATCH, description=f"{role} batches", role=role)
    for indices, stack in stacks:
        leaves = [leaf for leaf in pytree.tree_leaves(stack) if isinstance(leaf, Tensor)]
        if any(leaf.shape[1:2] != (1,) for leaf in leaves):
            raise TypeError(f"solver={NAME!r} needs batches that are tensors with a row for each instance.")
        order += indices
        batches.append(pytree.tree_map(lambda leaf: leaf.squeeze(1) if isinstance(leaf, Tensor) else leaf, stack))
    return order, batches


def _check(session: Session, train: Sequence[Any], order: list[int], batches: list[Batch]) -> None:
    """What would make a wrong matrix, on the first batch."""
    model, first = session.model, batches[0]
    size = next(len(leaf) for leaf in pytree.tree_leaves(first) if isinstance(leaf, Tensor))
    with session.naming("training", train, order[:size]):
        outputs = model.output_fn(model.params, first)
        got = float(model.output_loss_fn(outputs, first))
    expected = sum(session.losses("training", train, order[:size]).values()) / size
    if not abs(got - expected) <= AGREES * max(abs(expected), 1.0):
        raise ValueError(
            f"solver={NAME!r} needs a loss that is the mean over examples of a loss of the model's outputs (of its "
            f"`logits` the cross-entropy): the first {size} training instances have a mean loss of {expected:.6g}, "
            f"their outputs {got:.6g}. Use solver='auto'."
        )
    count = len(order) * outputs.shape[1]
    if count > MOST_OUTPUTS:
        raise ValueError(
            f"solver={NAME!r} keeps a matrix of all outputs of all training instances: at most {MOST_OUTPUTS}, got "
            f"{count}. Use solver='auto', or fewer training instances."
        )


def _width(session: Session, batch: Batch) -> int:
    return session.model.output_fn(session.model.params, batch).shape[1]


def _rows_that_fit(device: torch.device, itemsize: int) -> int:
    """Numbers of the Jacobian to keep: a third of the memory that is free, and no less than `MOST_ROWS`."""
    try:
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0]
        else:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # a system that does not say
        return MOST_ROWS
    return max(MOST_ROWS, free // 3 // itemsize)


class _Watched(Sequence[Batch]):
    """Batches that move a progress bar each time one is used."""

    def __init__(self, batches: list[Batch], bar: Iterable[int]):
        self._batches = batches
        self._bar = iter(bar)

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, i: Any) -> Any:
        """A batch, or for a slice those in it, one by one."""
        if isinstance(i, slice):
            return (self[j] for j in range(*i.indices(len(self))))
        batch = self._batches[i]
        next(self._bar, None)
        return batch
