"""Scores of instances in large batches, padded where that changes nothing, and one by one within stacks otherwise.

That an instance has the same loss and gradient in company as alone is tried on the shortest and the longest of each few
thousand. Knows a session's instances and how they are batched; knows nothing of what scores are for.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bridge import strategies
from bridge.functional import loss_and_gradient
from bridge.row_losses import row_losses
from bridge.rows import Numbered
from bridge.session import Session, check_finite
from lissa import Params, tree
from lissa.host import to_device
from lissa.influence import Scored
from lissa.stacked import norms

logger = logging.getLogger(__name__)

WINDOW = 4096
"""Instances that are sorted by length together."""


def scores(
    session: Session,
    instances: Sequence[Any],
    ihvps: Params,
    *,
    chosen: Sequence[int] | None = None,
    description: str = "scoring",
    role: str = "training",
) -> Iterator[tuple[list[int], Tensor]]:
    """Indices of some of the chosen instances and their scores `grad_i . ihvp_k`, shape `(K, B)`, until all had a turn.

    Args:
        session: Of the public call.
        instances: The instances.
        ihvps: K vectors, stacked.
        chosen: Indices; all if not given.
        description: For a progress bar.
        role: For messages.
    """
    chosen = range(len(instances)) if chosen is None else chosen
    found = found_before(session, ihvps)
    if found is not None and chosen == range(len(instances)):
        del session.known["scores found"]
        yield from found
        return
    if session.model.last_layer is not None:
        yield from _from_stacks(session, instances, ihvps, chosen, description, role)
        return
    for indices, window in session.windows(instances, most=WINDOW, description=description, role=role, chosen=chosen):
        if not _go_together(session, instances, window, strategies.length(ihvps)):
            yield from _from_stacks(session, instances, ihvps, indices, None, role)
            continue
        size = rows_at_once(session, instances, window[-1], vectors=1)
        for start in range(0, len(window), size):
            for indices, of_batch in _from_batch(session, instances, ihvps, window[start : start + size], role):
                yield indices, of_batch.scores


class _Found(NamedTuple):
    """Scores of all training instances, found on the way to something else."""

    ihvps: Params
    parts: list[tuple[Tensor, Tensor]]


class _Losses(NamedTuple):
    """The losses of all of some instances, that go together."""

    instances: Sequence[Any]
    values: Tensor


def with_products(
    session: Session, train: Sequence[Any], ihvps: Params, count: int, *, chosen: Sequence[int] | None = None
) -> Params | None:
    """`H x_k` on all training instances for the first `count` of K vectors; on the way, the scores of all K are found.

    Both need the forward pass and the gradient's graph, and `scores` will find what this pass has found. None, where
    that is no use: nothing will be scored, another way is faster, or there would be too much to keep.

    Args:
        session: Of the public call.
        train: All training instances.
        ihvps: K vectors, stacked.
        count: How many of them are multiplied, at least one.
        chosen: Indices of those to take instead of all, of which no scores are kept.
    """
    of_all, chosen = chosen is None, range(len(train)) if chosen is None else chosen
    n, K = len(chosen), strategies.length(ihvps)
    if not session.will_score or session.model.last_layer is not None or K * n > MOST_FOUND:
        return None
    parts: list[tuple[Tensor, Tensor]] = []
    total = tree.map(lambda t: torch.zeros_like(t[:count]), ihvps)
    losses = next(iter(ihvps.values())).new_empty(len(train))
    watched = {"description": "residual and scores", "role": "training", "chosen": chosen}
    for _, window in session.windows(train, most=WINDOW, **watched):
        if not _go_together(session, train, window, K):
            return None
        size = rows_at_once(session, train, window[-1], vectors=count)
        for start in range(0, len(window), size):
            some = window[start : start + size]
            for indices, of_batch in _from_batch(session, train, ihvps, some, "training", products=count):
                parts.append((torch.tensor(indices), of_batch.scores))
                losses[to_device(parts[-1][0], losses.device)] = of_batch.losses
                for name, t in of_batch.products.items():
                    total[name].add_(t, alpha=1 / n)
    if of_all:
        session.known.update({"scores found": _Found(ihvps, parts), "losses found": _Losses(train, losses)})
    return total


def _known_losses(session: Session, instances: Sequence[Any]) -> Tensor | None:
    found: _Losses | None = session.known.get("losses found")
    return found.values if found is not None and found.instances is instances else None


def found_before(session: Session, ihvps: Params) -> Iterator[tuple[list[int], Tensor]] | None:
    """The scores of all training instances, if `with_products` has found them for these very vectors."""
    found: _Found | None = session.known.get("scores found")
    if found is None or found.ihvps is not ihvps:
        return None
    return ((indices.tolist(), scores) for indices, scores in found.parts)


def columns(found: Iterable[tuple[list[int], Tensor]], chosen: Sequence[int]) -> Tensor:
    """Of scores as they come those of the chosen instances, in their order, shape `(K, len(chosen))`.

    Example:
        >>> columns([([2, 0], torch.tensor([[5.0, 3.0]])), ([1], torch.tensor([[4.0]]))], [0, 2])
        tensor([[3., 5.]])
    """
    place = {i: column for column, i in enumerate(chosen)}
    parts, columns = [], list[int]()
    for indices, scores in found:
        rows = [row for row, i in enumerate(indices) if i in place]
        parts.append(scores[:, rows])
        columns += [place[indices[row]] for row in rows]
    order = torch.tensor(columns).argsort()
    return torch.cat(parts, dim=1)[:, order.to(parts[0].device)]


MOST_FOUND = 2**22
"""Most scores that are kept until they are asked for."""


def losses(
    session: Session, instances: Sequence[Any], chosen: Sequence[int], *, role: str = "training"
) -> dict[int, float]:
    """The loss of each chosen instance, checked to be finite: of texts too many at a time, where that is right."""
    known, rows = _known_losses(session, instances), session.rows(instances)
    if known is not None:
        values = known[list(chosen)]
        check_finite("loss", role, chosen, values)
        return dict(zip(chosen, values.tolist(), strict=True))
    alone = rows.gathered or session.model.last_layer is not None or session.known.get("instances go alone", False)
    if alone or len(chosen) < FEW:
        return session.losses(role, instances, chosen)
    found: dict[int, float] = {}
    watched = {"description": f"{role} losses", "role": role, "chosen": chosen}
    for indices, window in session.windows(instances, most=WINDOW, **watched):
        size = rows_at_once(session, instances, window[-1], vectors=1)
        parts = [window[start : start + size] for start in range(0, len(window), size)]
        try:
            right = _have_losses_alike_alone(session, instances, [window[0], *window[1:][-1:]])
            values = torch.cat([_row_losses(session, instances, part) for part in parts]) if right else None
        except Exception as error:  # an instance that fails alone too will be named below
            logger.info("Losses are those of instances alone: %s", error)
            values = None
        if values is None:
            found |= session.losses(role, instances, indices)
            continue
        check_finite("loss", role, indices, values)
        found |= zip(indices, values.tolist(), strict=True)
    return found


FEW = 8
"""Fewer instances than this have their losses computed alone, as the shortest and the longest would be anyway."""


def _row_losses(session: Session, instances: Sequence[Any], some: list[Numbered]) -> Tensor:
    """Of instances in one batch."""
    model = session.model
    with torch.no_grad():
        return row_losses(model.loss_fn, model.params, session.rows(instances).together(some), len(some))


def _have_losses_alike_alone(session: Session, instances: Sequence[Any], ends: list[Numbered]) -> bool:
    """Whether these have the losses in one batch that they have alone."""
    alone = torch.cat([_row_losses(session, instances, [one]) for one in ends])
    return _are_close(_row_losses(session, instances, ends), alone)


def _are_close(losses: Tensor, alone: Tensor) -> bool:
    rtol = torch.finfo(losses.dtype).eps ** 0.5
    return bool(((losses - alone).abs() <= rtol * alone.abs().clamp(min=1)).all())


def _from_stacks(
    session: Session,
    instances: Sequence[Any],
    ihvps: Params,
    chosen: Sequence[int],
    description: str | None,
    role: str,
) -> Iterator[tuple[list[int], Tensor]]:
    """Each instance is a batch of one, whatever else is scored with it; `lissa` cuts the stacks as its method needs."""
    score = session.once("scores", lambda: strategies.scores(session.model))
    size = session.rows_at_once(instances, vectors=1)
    for indices, stack in session.examples(instances, size=size, description=description, role=role, chosen=chosen):
        with session.naming(role, instances, indices):
            found = score(ihvps, stack)
        check_finite("score", role, indices, found)
        yield indices, found


def _from_batch(
    session: Session, instances: Sequence[Any], ihvps: Params, some: list[Numbered], role: str, *, products: int = 0
) -> Iterator[tuple[list[int], Scored]]:
    """Of one batch, or two halves of it where memory does not suffice."""
    indices = [i for i, _ in some]
    try:
        with session.naming(role, instances, indices):
            batch = session.rows(instances).together(some)
            found = strategies.row_scores(session.model, ihvps, batch, len(some), products=products)
    except (RuntimeError, MemoryError) as error:
        if len(some) == 1 or not strategies.is_out_of_memory(error):
            raise
        logger.warning("Out of memory for %d examples: going on with %d at a time.", len(some), -(-len(some) // 2))
        half = -(-len(some) // 2)
        yield from _from_batch(session, instances, ihvps, some[:half], role, products=products)
        yield from _from_batch(session, instances, ihvps, some[half:], role, products=products)
        return
    check_finite("score", role, indices, found.scores)
    yield indices, found


def rows_at_once(session: Session, instances: Sequence[Any], longest: Numbered, vectors: int) -> int:
    """How many instances, none longer than this, go into one batch for a product with so many vectors."""
    with session.naming("training", instances, [longest[0]]):
        example = session.rows(instances).together([longest])
    most = strategies.rows_at_once(session.model, example, vectors)
    return most if session.most_rows is None else min(most, session.most_rows)


def _go_together(session: Session, instances: Sequence[Any], window: list[Numbered], vectors: int) -> bool:
    """Whether batches of the instances in this window are the quicker way, and a right one."""
    if session.known.get("instances go alone"):
        return False
    rows = session.rows(instances)
    try:
        longest = rows.together(window[-1:])
        if strategies.by_gradients(session.model, longest, len(window), vectors) and session.once(
            "gradients are taken at once", lambda: strategies.takes_vmap(session.model, longest)
        ):
            return False
        right = _known_losses(session, instances) is not None or _are_alike_alone(
            session, instances, [window[0], *window[1:][-1:]]
        )
    except Exception as error:  # an instance that fails alone too will be named by whoever needs it
        logger.info("Instances are scored alone: %s", error)
        right = False
    if not right:
        session.known["instances go alone"] = True
    return right


def _are_alike_alone(session: Session, instances: Sequence[Any], ends: list[Numbered]) -> bool:
    """Whether these have the losses and the inner products of gradients in one batch that they have alone."""
    rows, model = session.rows(instances), session.model
    alone = [loss_and_gradient(model.loss_fn, model.params, rows.together([one])) for one in ends]
    losses, gradients = torch.stack([loss for loss, _ in alone]), strategies.stack_vectors([g for _, g in alone])
    together, products, _ = strategies.row_scores(model, gradients, rows.together(ends), len(ends))
    lengths = norms(gradients)
    expected = torch.stack([tree.vdot(a, b) for _, a in alone for _, b in alone]).reshape(products.shape)
    rtol = torch.finfo(losses.dtype).eps ** 0.5
    of_gradients = ((products - expected).abs() <= rtol * lengths * lengths.unsqueeze(1)).all()
    right = bool(of_gradients) and _are_close(together, losses)
    if not right:
        logger.info("Instances are scored alone: in company, their losses or gradients are others.")
    return right
