"""One public call's work on instances: batches on the device, stacks of examples, and errors that name the instance.

Knows instances and a functional model; knows nothing of solvers, rankings or the caller's module.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from bridge import progress, strategies
from bridge.functional import Functional, loss_and_gradient
from bridge.last_layer import ExpandedRows, Expander
from bridge.rows import Numbered, Rows
from lissa import Batch, Params, SolverError, tree
from lissa.stacked import norms

T = TypeVar("T")

GRADIENTS_AT_ONCE, LOSSES_AT_ONCE = 128, 512
"""Most examples whose gradients or losses are computed together."""


@dataclass(frozen=True)
class Session:
    """What the computations of one public call share.

    Attributes:
        model: The model as functions of the parameters in use.
        collate: Makes a batch of a list of instances.
        show: Whether long work shows a progress bar.
        most_rows: Most training instances to take at a time, if the caller said so.
        expand: Makes expansions of batches, where `model` works on these.
        will_score: Whether what is solved for will be scored on all training instances.
        known: What was found out and made for this call.
    """

    model: Functional
    collate: Callable[[list[Any]], Batch]
    show: bool
    most_rows: int | None = None
    expand: Expander | None = None
    will_score: bool = False
    known: dict[str, Any] = field(default_factory=dict)
    _expanded: dict[int, tuple[Any, ExpandedRows]] = field(default_factory=dict)

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What `make` makes, made when it is first asked for."""
        if name not in self.known:
            self.known[name] = make()
        return self.known[name]

    def rows_at_once(self, instances: Sequence[Any], vectors: int) -> int:
        """How many instances, like the first, go into one batch for a product with so many vectors."""
        with self.naming("training", instances, [0]):
            first = self.batch(instances, [0])
        most = strategies.rows_at_once(self.model, first, vectors)
        return most if self.most_rows is None else min(most, self.most_rows)

    def batch(self, instances: Sequence[Any], indices: Iterable[int]) -> Batch:
        """One batch of the instances `indices`, on the device."""
        return self.rows(instances).batch(indices)

    def examples(
        self,
        instances: Sequence[Any],
        *,
        size: int,
        description: str | None,
        role: str = "training",
        chosen: Sequence[int] | None = None,
    ) -> Iterator[tuple[list[int], Batch]]:
        """The chosen instances (all if not given), each a batch of one, in stacks of at most `size`, with indices."""
        chosen = range(len(instances)) if chosen is None else chosen
        make = partial(self.rows(instances).examples, size)
        yield from self._watched(make, instances, description, role, chosen)

    def windows(
        self, instances: Sequence[Any], *, most: int, description: str, role: str, chosen: Sequence[int]
    ) -> Iterator[tuple[list[int], list[Numbered]]]:
        """The chosen instances in lists of at most `most`, with indices, each from the shortest to the longest."""
        make = partial(self.rows(instances).windows, most)
        yield from self._watched(make, instances, description, role, chosen)

    def _watched(
        self,
        make: Callable[[Iterator[int]], Iterator[tuple[list[int], T]]],
        instances: Sequence[Any],
        description: str | None,
        role: str,
        chosen: Sequence[int],
    ) -> Iterator[tuple[list[int], T]]:
        """What is made of the chosen indices, with a progress bar, and errors that name the instance."""
        pending: dict[int, None] = {}

        def read() -> Iterator[int]:
            shown = progress.bar(chosen, description=description or "", show=self.show and description is not None)
            for i in shown:
                pending[i] = None
                yield i

        groups = make(read())
        while True:
            with self.naming(role, instances, pending):
                found = next(groups, None)
            if found is None:
                return
            if len(found[0]) == len(pending):
                pending.clear()
            for i in found[0] if pending else ():
                del pending[i]
            yield found

    def gradients(self, role: str, instances: Sequence[Any], indices: Sequence[int]) -> tuple[Tensor, Params]:
        """`L_t, grad L_t` of the instances `indices`, in their order, stacked and checked to be finite."""
        losses_and_gradients = strategies.losses_and_gradients(self.model)
        size = GRADIENTS_AT_ONCE if self.expand is None else LOSSES_AT_ONCE
        place = {i: row for row, i in enumerate(indices)}
        params = self.model.params
        losses, gradients = next(iter(params.values())).new_empty(len(indices)), {}
        for found, stack in self.examples(
            instances, size=size, description=f"{role} gradients", role=role, chosen=indices
        ):
            with self.naming(role, instances, found):
                some_losses, some_gradients = losses_and_gradients(stack)
            check_finite("loss", role, found, some_losses)
            check_finite("gradient", role, found, norms(some_gradients))
            if found == list(indices):  # all at once, nothing to put together
                return some_losses, some_gradients
            gradients = gradients or {name: p.new_empty(len(indices), *p.shape) for name, p in params.items()}
            rows = torch.tensor([place[i] for i in found], device=losses.device)
            losses[rows] = some_losses
            for name, gradient in gradients.items():
                gradient[rows] = some_gradients[name]
        return losses, gradients or {name: p.new_empty(0, *p.shape) for name, p in params.items()}

    def loss_and_gradient(self, role: str, instances: Sequence[Any], i: int) -> tuple[Tensor, Params]:
        """`L, grad L` of instance i, checked to be finite."""
        with self.naming(role, instances, [i]):
            loss, gradient = loss_and_gradient(self.model.loss_fn, self.model.params, self.batch(instances, [i]))
        check_finite("loss", role, [i], loss)
        check_finite("gradient", role, [i], tree.norm(gradient))
        return loss, gradient

    def losses(self, role: str, instances: Sequence[Any], chosen: Iterable[int]) -> dict[int, float]:
        """The loss of each chosen instance, checked to be finite."""
        rows, chosen = self.rows(instances), list(chosen)
        held = rows.held_losses(chosen) if isinstance(rows, ExpandedRows) else None
        if held is not None:
            check_finite("loss", role, chosen, held)
            return dict(zip(chosen, held.tolist(), strict=True))
        losses = strategies.losses(self.model)
        found = {}
        for indices, stack in self.examples(
            instances, size=LOSSES_AT_ONCE, description=f"{role} losses", role=role, chosen=chosen
        ):
            with self.naming(role, instances, indices):
                values = losses(stack)
            check_finite("loss", role, indices, values)
            found |= zip(indices, values.tolist(), strict=True)
        return found

    @contextmanager
    def naming(self, role: str, instances: Sequence[Any], indices: Iterable[int]) -> Iterator[None]:
        """If the work inside fails, and one of the instances fails by itself, an error that names it."""
        try:
            yield
        except SolverError:
            raise
        except Exception:
            indices = list(indices)
            for i in indices:
                self._try(role, instances, i)
            self._try_together(role, instances, indices)
            raise

    def rows(self, instances: Sequence[Any]) -> Rows:
        """The instances as the model of this session takes them."""
        rows = instances if isinstance(instances, Rows) else Rows(instances, self.collate, self.model.device, pads=True)
        if self.expand is None or isinstance(rows, ExpandedRows):
            return rows
        if id(instances) not in self._expanded:
            self._expanded[id(instances)] = instances, ExpandedRows(rows, self.expand)
        return self._expanded[id(instances)][1]

    def first_not_finite(self, role: str, instances: Sequence[Any], chosen: Iterable[int] | None = None) -> None:
        """Raises a ValueError that names the first instance whose loss or gradient is not finite, if there is one."""
        for i in range(len(instances)) if chosen is None else chosen:
            self.loss_and_gradient(role, instances, i)

    def _try_together(self, role: str, instances: Sequence[Any], indices: list[int]) -> None:
        chosen = indices[:_MOST_TOGETHER]
        try:
            loss_and_gradient(self.model.loss_fn, self.model.params, self.batch(instances, chosen))
        except Exception as error:
            raise ValueError(
                f"The {role} instances {_listed(chosen)} work one by one but not in one batch. If they differ in "
                f"shape, pass a `collate_fn` that pads them. {type(error).__name__}: {error}"
            ) from error

    def _try(self, role: str, instances: Sequence[Any], i: int) -> None:
        try:
            loss_and_gradient(self.model.loss_fn, self.model.params, self.batch(instances, [i]))
        except Exception as error:
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise ValueError(f"{role.capitalize()} instance {i}: {kind}{error}") from error


def check_finite(what: str, role: str, indices: Sequence[int], values: Tensor) -> None:
    """`values`, whose last dimension runs over `indices`, must be finite; the error names the first that is not."""
    if not values.numel() or bool(torch.stack(values.aminmax()).isfinite().all()):  # in one pass; NaN is passed on
        return
    finite = values.isfinite().reshape(-1, len(indices)).all(0)
    if not bool(finite.all()):
        i = indices[int(finite.logical_not().nonzero()[0])]
        raise ValueError(
            f"{role.capitalize()} instance {i}: its {what} is not finite. Look for NaN or infinity in its data, and "
            "nothing was ranked."
        )


_MOST_TOGETHER = 256
"""Most instances put in one batch to see whether that is what fails."""


def _listed(indices: list[int], most: int = 8) -> str:
    return ", ".join(map(str, indices[:most])) + (", ..." if len(indices) > most else "")
