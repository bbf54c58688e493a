"""The commands `run`, `self` and `check`: influence of a job's training data, group by group, into files.

Knows jobs, `SimpleInfluence`, result files and the screen; does no numerics of its own. Each group of examples is
written when it is done, so that an interruption loses no more than the group it falls in.
"""

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from bridge import diagnostics, distributed, gauss_newton, progress, results, strategies
from bridge.data import collate
from bridge.diagnostics import Diagnostics, InfluenceWarning
from bridge.functional import evaluation, functional
from bridge.interpreter import CHECKPOINT_EVERY, InstanceInfluence
from bridge.job import Example, Job, Numbered, freezing_the_rest, kept
from bridge.plan import Network, Plan
from bridge.session import Session
from bridge.simple_influence import SimpleInfluence

GROUP = 16
"""Test examples solved together: the more, the less each costs, and the later the first results are there."""

SELF_GROUP = 256
"""The same for self-influence."""

SCORED_AT_ONCE = 128

PROBES = 4
"""Examples that `check` solves for."""

T = TypeVar("T")


class Settings(NamedTuple):
    """How influence is computed; the arguments of `SimpleInfluence` that fit the command line.

    Attributes:
        params: Patterns of the parameters to measure influence in; none is all.
        solver: As there.
        ridge: The damping in the units of the Hessian, or "auto".
        scale: As there.
        steps: `recursion_depth` there: a number of LiSSA steps, or "auto".
        rtol: As there.
        batch_size: Training examples a LiSSA step.
        seed: Of all that is random. Every group begins with it, so scores do not depend on the grouping.
        progress: Whether long work shows a bar.
        checkpoint_dir: As there.
        checkpoint_every: As there.
    """

    params: tuple[str, ...] = ()
    solver: str = "auto"
    ridge: float | str = "auto"
    scale: float | str = "auto"
    steps: int | str = "auto"
    rtol: float = 1e-2
    batch_size: int = 32
    seed: int = 0
    progress: bool = True
    checkpoint_dir: Path | None = None
    checkpoint_every: float = CHECKPOINT_EVERY


class Ranked(NamedTuple):
    """A training example, its loss and its score."""

    example: Example
    loss: float
    score: float


class Explained(NamedTuple):
    """A test example and both ends of the ranking of the training examples.

    Attributes:
        example: The test example.
        predicted: What the model takes it for; empty if that is not known.
        loss: Its loss.
        helpful: Largest scores first.
        harmful: Smallest scores first.
    """

    example: Example
    predicted: str
    loss: float
    helpful: list[Ranked]
    harmful: list[Ranked]


class Solved(NamedTuple):
    """What was found, and what is known of the solves behind it."""

    found: list[Any]
    diagnostics: Diagnostics


def explain(job: Job, settings: Settings, k: int, path: Path) -> Solved:
    """The `k` most helpful and most harmful training examples of each test example, as a table at `path`.

    Args:
        job: With test instances.
        settings: How.
        k: How many at each end; all there are if there are fewer.
        path: See `bridge.results.table`.

    Returns:
        An `Explained` for each test example.

    Raises:
        lissa.SolverError: If the solve fails; what was done before is kept.
        ValueError: If an example has no loss or one that is not finite.
    """
    names = kept(job.model, settings.params)
    tests = Numbered(job.test)
    explained: list[Explained] = []

    def rank(influence: SimpleInfluence, group: range) -> list[Explained]:
        return [
            Explained(
                job.show("test", t, instance),
                job.predict(instance) if job.predict else "",
                row.loss,
                [_ranked(job, entry) for entry in row.most_helpful],
                [_ranked(job, entry) for entry in row.most_harmful],
            )
            for row in influence.interpret_both_ends([tests[t] for t in group], k)
            for t, instance in [row.test_instance]
        ]

    with _kept(path, _columns(job.place), explained, f"{len(tests)} test examples") as table:
        parts = []
        size = len(tests) if settings.solver == gauss_newton.NAME else GROUP
        for found, part in _groups(job, settings, names, len(tests), size, "test examples", rank):
            table.write([row for one in found for row in _rows(one, job.place)])
            explained += found
            parts.append(part)
    return Solved(explained, diagnostics.joined(parts))


def rank_by_self_influence(job: Job, settings: Settings, path: Path) -> Solved:
    """All training examples by `grad_i . (H + damping I)^-1 grad_i`, largest first, as a table at `path`.

    Args:
        job: Its training data.
        settings: How.
        path: See `bridge.results.table`. While it is partial, its rows are in the order of the data.

    Returns:
        A `Ranked` for each training example, largest score first.

    Raises:
        lissa.SolverError: If the solve fails; what was done before is kept.
        ValueError: If an example has no loss or one that is not finite.
    """
    names = kept(job.model, settings.params)
    train = Numbered(job.train)
    ranked: list[Ranked] = []

    def score(influence: SimpleInfluence, group: range) -> list[Ranked]:
        scores = influence.self_influence(group).tolist()
        with evaluation(job.model) as module:
            session = Session(functional(module, [], output_loss=job.loss_fn), _collate(job), settings.progress)
            losses = session.losses("training", train, group)
        found = zip(group, scores, strict=True)
        return [Ranked(job.show("train", i, train[i][1]), losses[i], score) for i, score in found]

    at_once = settings.solver == gauss_newton.NAME
    size = len(train) if at_once else max(1, min(SELF_GROUP, strategies.STACK_LIMIT // _numel(job, names)))
    columns = ["rank", job.place, "label", "loss", "self_influence", "text"]
    with _kept(path, columns, ranked, f"{len(train)} training examples") as table:
        parts = []
        for found, part in _groups(job, settings, names, len(train), size, "training examples", score):
            table.write([_self_row(job.place, None, one) for one in found])
            ranked += found
            parts.append(part)
    ranked.sort(key=lambda one: -one.score)
    if distributed.first_here():
        with results.table(path, columns) as table:
            table.write([_self_row(job.place, rank, one) for rank, one in enumerate(ranked, 1)])
    return Solved(ranked, diagnostics.joined(parts))


def check(job: Job, settings: Settings) -> Diagnostics:
    """What the solves for a few test examples (training examples, if there are none) are worth; scores nothing.

    Args:
        job: The job.
        settings: How.

    Returns:
        The diagnostics.

    Raises:
        lissa.SolverError: If the solve fails.
        ValueError: If an example has no loss or one that is not finite.
    """
    names = kept(job.model, settings.params)
    examples = Numbered(job.test or job.train)

    def solve(influence: SimpleInfluence, group: range) -> list[Any]:
        chosen = [examples[i] for i in group]
        _ = influence.scores(chosen) if settings.solver == gauss_newton.NAME else influence.inverse_hvps(chosen)
        return []

    count = min(PROBES, len(examples))
    (_, found), *_ = _groups(job, settings, names, count, count, "examples", solve)
    return found


def plan(
    job: Job, settings: Settings, *, ranks: Sequence[int], n: int | None, tests: int | None, network: Network
) -> list[Plan]:
    """What `explain` would cost; see `SimpleInfluence.plan`.

    Args:
        job: With a few test instances.
        settings: How, with a number of steps.
        ranks: Numbers of processes.
        n: Training examples; None for those of the job.
        tests: Test examples; None for those of the job.
        network: What connects the processes.

    Returns:
        A plan for each of `ranks`.
    """
    names = kept(job.model, settings.params)
    examples = Numbered(job.test)
    influence = _influence(job, settings, names, n)
    few = [examples[t] for t in range(min(GROUP, len(examples)))]
    tests = len(examples) if tests is None else tests
    return influence.plan(few, ranks=ranks, n=n, tests=tests, together=GROUP, network=network)


def parameters(job: Job, settings: Settings) -> int:
    """How many numbers influence is measured in, at most."""
    return _numel(job, kept(job.model, settings.params))


# ---------------------------------------------------------------------- how it is done


def _groups(
    job: Job,
    settings: Settings,
    names: list[str],
    count: int,
    size: int,
    description: str,
    work: Callable[[SimpleInfluence, range], list[T]],
) -> Iterator[tuple[list[T], Diagnostics]]:
    """`work` on `range(count)` in groups of `size`: what was found in each, and its diagnostics."""
    groups = [range(start, min(start + size, count)) for start in range(0, count, size)]
    influence = _influence(job, settings, names)
    for group in progress.bar(groups, description=f"groups of {size} {description}", show=settings.progress):
        influence.restart_batches()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InfluenceWarning)  # said once, at the end
            found = work(influence, group)
        yield found, influence.diagnostics


def _influence(job: Job, settings: Settings, names: list[str], n: int | None = None) -> SimpleInfluence:
    return SimpleInfluence.from_dataset(
        job.model,
        Numbered(job.train),
        loss_fn=job.loss_fn,
        collate_fn=_collate(job),
        params_to_freeze=freezing_the_rest(job.model, names),
        lissa_batch_size=min(settings.batch_size, n or len(job.train)),
        solver=settings.solver,
        recursion_depth=settings.steps,
        scale=settings.scale,
        rtol=settings.rtol,
        ridge=settings.ridge,
        seed=settings.seed,
        progress=settings.progress,
        checkpoint_dir=settings.checkpoint_dir,
        checkpoint_every=settings.checkpoint_every,
        score_batch_size=max(1, min(SCORED_AT_ONCE, strategies.STACK_LIMIT // _numel(job, names))),
    )


def _collate(job: Job) -> Callable[[list[Any]], Any]:
    """The job's collation, of numbered instances."""
    make = partial(collate, vocab=getattr(job.model, "vocab", None), collate_fn=job.collate_fn)
    return lambda numbered: make([instance for _, instance in numbered])


def _numel(job: Job, names: list[str]) -> int:
    return sum(p.numel() for name, p in job.model.named_parameters() if name in names)


@contextmanager
def _kept(path: Path, columns: Sequence[str], done: list[Any], of: str) -> Iterator[results.Table]:
    """A table; if the work inside is cut short, it says what is kept and where."""
    if not distributed.first_here():
        yield results.Nowhere()
        return
    try:
        with results.table(path, columns) as table:
            yield table
    except (KeyboardInterrupt, Exception):
        partial_path = results.partial(path)
        if done:
            print(f"Kept: the results of {len(done)} of {of}, in {partial_path}.", file=sys.stderr)
        else:
            partial_path.unlink(missing_ok=True)
            print(f"No result was complete (0 of {of}).", file=sys.stderr)
        raise


def _ranked(job: Job, entry: InstanceInfluence) -> Ranked:
    i, instance = entry.instance
    return Ranked(job.show("train", i, instance), entry.loss, entry.score)


def _columns(place: str) -> list[str]:
    test = [f"test_{place}", "test_label", "predicted", "test_loss"]
    return [
        *test,
        "direction",
        "rank",
        f"train_{place}",
        "train_label",
        "train_loss",
        "score",
        "test_text",
        "train_text",
    ]


def _rows(one: Explained, place: str) -> Iterator[dict[str, Any]]:
    """A row for each ranked training example; `direction` is helpful or harmful, `rank` counts from 1."""
    for direction, entries in (("helpful", one.helpful), ("harmful", one.harmful)):
        for rank, entry in enumerate(entries, 1):
            yield {
                f"test_{place}": one.example.place,
                "test_label": one.example.label,
                "predicted": one.predicted,
                "test_loss": one.loss,
                "direction": direction,
                "rank": rank,
                f"train_{place}": entry.example.place,
                "train_label": entry.example.label,
                "train_loss": entry.loss,
                "score": entry.score,
                "test_text": one.example.text,
                "train_text": entry.example.text,
            }


def _self_row(place: str, rank: int | None, one: Ranked) -> dict[str, Any]:
    return {
        "rank": rank,
        place: one.example.place,
        "label": one.example.label,
        "loss": one.loss,
        "self_influence": one.score,
        "text": one.example.text,
    }
