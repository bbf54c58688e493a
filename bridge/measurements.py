"""Measures what a solve `(H + damping I) x = v` is worth, on the training data themselves.

Knows a session's instances and `lissa`'s products; knows nothing of how `x` was found or what is said about it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import lissa
from bridge import products, progress, scored, strategies
from bridge.distributed import Ranks
from bridge.rows import Numbered
from bridge.session import Session
from lissa import Params, tree
from lissa.stacked import norms, vdots

CACHED = 2**17
"""Numbers of vectors that are passed over together, so that what is made of them stays in a cache."""

EIGENVALUE_RTOL = 0.1
"""The residual of the eigenvector, relative to its eigenvalue, whose error is about the square of that."""

SAMPLE = 64
"""Training instances that the largest eigenvalue and the correlation are measured on: for a warning, two digits do."""


def relative_residuals(
    session: Session,
    train: Sequence[Any],
    damping: float,
    vectors: Params,
    ihvps: Params,
    *,
    count: int,
    ranks: Ranks,
) -> Tensor:
    """`|v - (H + damping I) x| / |v|` on all training data for K stacked vectors, shape `(K,)`; 0 where v is 0.

    Only the first `count` are measured; the others are NaN.
    """
    found = next(iter(vectors.values())).new_full((strategies.length(vectors),), torch.nan)
    product = scored.with_products(session, train, ihvps, count) if count else None
    vectors, ihvps = (tree.map(lambda t: t[:count], x) for x in (vectors, ihvps))
    product = _product(session, train, ihvps, ranks) if product is None else product
    damped = tree.add_scaled(product, damping, ihvps)
    found[:count] = (norms(tree.sub(vectors, damped)) / norms(vectors)).nan_to_num(0.0)
    return found


def cosines(vectors: Params, ihvps: Params) -> Tensor:
    """Cosine of the angle between `v` and `x` for K stacked vectors, shape `(K,)`; 0 where one of them is 0."""
    K, size = strategies.length(vectors), max(1, CACHED * strategies.length(vectors) // tree.numel(vectors))
    parts = [[tree.map(lambda t, k=k: t[k : k + size], x) for x in (vectors, ihvps)] for k in range(0, K, size)]
    return torch.cat([vdots(v, x) / (norms(v) * norms(x)) for v, x in parts]).nan_to_num(0.0)


def largest_eigenvalue(session: Session, train: Sequence[Any], *, seed: int) -> float:
    """The largest eigenvalue of the Hessian on a sample of the training data, from below, by eight products at most."""
    chosen = _sample(len(train), seed)
    batch = session.batch(train, chosen)
    matvec = products.linearised_product(session.model, batch)
    generator = torch.Generator().manual_seed(seed)
    return float(lissa.largest_eigenvalue(matvec, session.model.params, generator=generator, rtol=EIGENVALUE_RTOL))


def correlations(
    session: Session, train: Sequence[Any], vectors: Params, ihvps: Params, which: Tensor, *, seed: int
) -> Tensor:
    """Pearson correlation, over a sample of the training data, of scores with plain gradient products.

    NaN where the sample's scores do not vary.

    Args:
        session: Of the public call.
        train: All training instances.
        vectors: K right-hand sides, stacked.
        ihvps: Their solutions.
        which: Indices of those to look at, as many as results.
        seed: Of the sample.
    """
    chosen = _sample(len(train), seed)

    def of_sample(some: Params) -> Tensor:
        found = scored.scores(session, train, some, chosen=chosen, description="sampling")
        return scored.columns(found, chosen).double()

    known = scored.found_before(session, ihvps)
    if known is None:
        plain, scores = of_sample(tree.map(lambda v, x: torch.cat([v[which], x[which]]), vectors, ihvps)).chunk(2)
    else:
        plain, scores = of_sample(tree.map(lambda v: v[which], vectors)), scored.columns(known, chosen)[which].double()
    plain, scores = (s - s.mean(1, keepdim=True) for s in (plain, scores))
    return (plain * scores).sum(1) / (plain.norm(dim=1) * scores.norm(dim=1))


def _product(session: Session, train: Sequence[Any], vectors: Params, ranks: Ranks) -> Params:
    """`H v` on all training data for K stacked vectors, in batches weighted by their size, each rank on its share."""
    n, share, rows = len(train), ranks.share(len(train)), session.rows(train)
    product, expanded = products.stacked_products(session.model), session.model.last_layer is not None
    total = tree.zeros_like(vectors)

    def add(some: list[Numbered]) -> None:
        indices = [i for i, _ in some]
        try:
            with session.naming("training", train, indices):
                batch = session.batch(train, indices) if expanded else rows.together(some)
                part = product(vectors, lambda: batch)
            for k, t in part.items():
                total[k].add_(t, alpha=len(indices) / n)
        except (RuntimeError, MemoryError) as error:
            if len(indices) == 1 or not strategies.is_out_of_memory(error):
                raise
            half = len(indices) // 2
            add(some[:half])
            add(some[half:])

    for some in _batches(session, train, share, strategies.length(vectors), show="measuring the residual"):
        add(some)
    return ranks.sum(total)


def _batches(
    session: Session, train: Sequence[Any], share: range, vectors: int, *, show: str
) -> Iterator[list[Numbered]]:
    """The instances of `share`, as many at a time as a product takes, those of about the same length together."""
    if session.model.last_layer is not None:
        size = session.rows_at_once(train, vectors)
        for start in progress.bar(range(share.start, share.stop, size), description=show, show=session.show):
            yield [(i, None) for i in range(start, min(start + size, share.stop))]
        return
    for _, window in session.windows(train, most=scored.WINDOW, description=show, role="training", chosen=share):
        size = scored.rows_at_once(session, train, window[-1], vectors)
        for start in range(0, len(window), size):
            yield window[start : start + size]


def _sample(n: int, seed: int) -> list[int]:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:SAMPLE].tolist()
