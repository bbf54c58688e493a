"""`InfluenceInterpreter`: instances in, ranked training instances out. How `H^-1 v` is found is left to subclasses.

Knows instances, files read through readers, and which training example is which; knows nothing of solvers.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bridge import distributed, fingerprint, last_layer, npy, progress, recording, scored, scoring, settings, strategies
from bridge.archives import FromArchive
from bridge.checkpoint import Directory, Record
from bridge.data import (
    CollateFn,
    DatasetReader,
    Lazy,
    LazyLoader,
    SimpleDataLoader,
    check_dataset,
    collate,
    is_sequence,
)
from bridge.distributed import Ranks
from bridge.functional import OutputLoss, evaluation, functional, unused
from bridge.outputs import BothEnds, InstanceInfluence, InstanceWithGrads, InterpretOutput
from bridge.recording import Keeping
from bridge.rows import MOST_KEPT, Rows
from bridge.scoring import Columns, Reduced, Reduction, TopK, Written
from bridge.session import Session
from lissa import Params, checks, tree
from lissa.stacked import vdots

CHECKPOINT_EVERY = 300.0
"""Seconds between two states of a long run, unless told otherwise."""

SCORE_BATCH_SIZE = 1024
"""Most training examples held together for scoring unless told otherwise."""

SELF_BATCH_SIZE = 512
"""Most training examples whose self-influence is solved for together."""

Solve = Callable[[Params, Record], tuple[Params, Any]]
"""`K stacked test gradients -> K stacked (H + damping I)^-1 v`, and what is known of them, in plain values.

What is found on the way may go into the record."""


class InfluenceInterpreter(FromArchive):
    """Ranks training instances by their influence on the loss of test instances.

    Subclasses implement `_solver`. Nothing of the model that is passed in changes, nor any global random state.

    Args:
        model: Called as `model(**batch)`, it returns a mapping (or an object) with a scalar mean `"loss"`; with
            `loss_fn`, called as `model(x)`.
        train_data_path: What the reader reads.
        train_dataset_reader: Has `read(path)`, which yields instances.
        test_dataset_reader: For `interpret_from_file`; the default is the train reader.
        train_data_loader: A `Lazy` that constructs a data loader; of that only its instances are used.
        test_data_loader: The same for `interpret_from_file`.
        params_to_freeze: Regular expressions; parameters whose names begin with a match are treated as constants.
        cuda_device: -1 is the CPU, i >= 0 that GPU, None where the model is. The model itself is not moved.
        loss_fn: `loss_fn(model(x), y) -> ()`, the mean loss, for instances that are `(x, y)` pairs.
        collate_fn: Makes a batch of a list of instances.
        progress: Whether work that takes more than a second shows a bar.
        score_batch_size: Most training examples held together while scores or residuals are computed; fewer where a
            pass over them would keep more than 8 million numbers, 16 million on a GPU.
        max_memory: About how many bytes the work of a call may take beside the model, the instances and the results.
            The default holds up to 512 MiB of right-hand sides a few times over. What does not fit is done in parts.
        checkpoint_dir: Where each call keeps its state, so that a run that was killed, made again with the same
            arguments and calls, goes on: on the same machine, threads and number of processes to the same bits. What
            the call solves and scores is kept; `train_instances` and other properties are not. A state of another
            model, data, setting or version is refused. Of two processes or more the first one writes.
        checkpoint_every: Seconds between two states; more where writing one takes long.
        process_group: The processes that share the work, all of which make the same calls: `"all"` that
            `torch.distributed` knows, if it is initialised or torchrun started this process; a group; or None, this
            process alone. Each process reads its share of the training data, one stretch in order of rank, a sample
            of some hundred instances, and those that are ranked. The loss of a batch must be the mean over its
            instances.

    Raises:
        ValueError: If there are no training instances or every parameter is frozen; a `bridge.checkpoint.
            CheckpointError` if the directory cannot be used or holds the state of another run.
        TypeError: If an argument is of the wrong type.
    """

    default_implementation: ClassVar[str] = "simple-influence"
    _keep_rng = True
    _expands = True

    def __init__(
        self,
        model: nn.Module,
        train_data_path: Any,
        train_dataset_reader: DatasetReader,
        *,
        test_dataset_reader: DatasetReader | None = None,
        train_data_loader: LazyLoader = Lazy(SimpleDataLoader.from_dataset_reader),  # noqa: B008
        test_data_loader: LazyLoader = Lazy(SimpleDataLoader.from_dataset_reader),  # noqa: B008
        params_to_freeze: list[str] | None = None,
        cuda_device: int | torch.device | None = -1,
        loss_fn: OutputLoss | None = None,
        collate_fn: CollateFn | None = None,
        progress: bool = True,
        score_batch_size: int = SCORE_BATCH_SIZE,
        max_memory: int | None = None,
        checkpoint_dir: str | Path | None = None,
        checkpoint_every: float = CHECKPOINT_EVERY,
        process_group: Any = "all",
    ):
        call = type(self).__name__
        self._candidates = settings.trainable_names(call, model, params_to_freeze)
        self.device = settings.device_of(call, cuda_device, model)
        checks.count(call, "score_batch_size", score_batch_size)
        if max_memory is not None:
            checks.count(call, "max_memory", max_memory)
        checks.non_negative(call, "checkpoint_every", checkpoint_every)
        distributed.check_whole(call, model)
        for name, value in (("loss_fn", loss_fn), ("collate_fn", collate_fn)):
            if value is not None and not callable(value):
                raise TypeError(f"`{call}({name}=...)` must be callable, got {type(value).__name__}.")
        self.model = model
        self.vocab = getattr(model, "vocab", None)
        self._ranks = distributed.ranks_of(call, process_group, self.device)
        self.progress = progress and self._ranks.first
        self._keeping: Keeping | None = None
        if checkpoint_dir is not None:
            states = Directory(Path(checkpoint_dir))
            self._ranks.raise_first(partial(states.check, call) if self._ranks.first else lambda: None)
            self._keeping = Keeping(call, states, float(checkpoint_every), self.device)
        self._calls = 0
        self._train_digest: str | None = None
        self._loss_fn = loss_fn
        self._score_batch_size = score_batch_size
        self._max_memory = max_memory
        self._collate = partial(collate, vocab=self.vocab, collate_fn=collate_fn)
        self._test_reader = test_dataset_reader or train_dataset_reader
        self._test_loader = test_data_loader
        self._used_names: list[str] | None = None
        self._scan_batch_size = 1
        self._rows = partial(
            Rows, collate=self._collate, device=self.device, vocab=self.vocab, pads=collate_fn is not None,
            most_bytes=MOST_KEPT if max_memory is None else max_memory // 4,
        )  # fmt: skip
        self._train = self._rows(self._read(train_data_loader, train_dataset_reader, train_data_path))
        if not len(self._train):
            raise ValueError(f"`{call}`: no training instances in {_shown(train_data_path)}.")

    # ------------------------------------------------------------------ what is asked for

    def interpret(self, test_instance: Any, k: int = 20) -> InterpretOutput:
        """The `k` training instances with the largest influence scores on one test instance.

        Args:
            test_instance: With its label: influence is on its loss.
            k: How many; all there are if there are fewer.

        Returns:
            The test instance, its loss, and `top_k`: by signed score, largest (most helpful) first.

        Raises:
            ValueError: If `k` < 0, or an instance has no loss or a loss that is not finite.
            lissa.SolverError: If the solve fails.
        """
        return self.interpret_instances([test_instance], k)[0]

    def interpret_instances(self, test_instances: Iterable[Any], k: int = 20) -> list[InterpretOutput]:
        """`interpret` for many test instances at once: they share each LiSSA batch, and their order has no effect."""
        return [
            InterpretOutput(*row[:3]) for row in self._ranked("interpret_instances", test_instances, k, of=("helpful",))
        ]

    def interpret_from_file(self, test_data_path: Any, k: int = 20) -> list[InterpretOutput]:
        """`interpret_instances` for what the test reader reads from a path."""
        return self.interpret_instances(self._read(self._test_loader, self._test_reader, test_data_path), k)

    def interpret_both_ends(self, test_instances: Iterable[Any], k: int = 20) -> list[BothEnds]:
        """`interpret_instances` with the `k` most harmful training instances (smallest scores first) as well."""
        return self._ranked("interpret_both_ends", test_instances, k, of=("helpful", "harmful"))

    def scores(self, test_instances: Iterable[Any]) -> Tensor:
        """All scores, shape `(T, n)`: a row for each test instance, a column for each training instance, on the CPU."""
        tests = self._listed("scores", test_instances)
        n = len(self._train)
        with self._session() as session, self._recorded(session, "scores", tests) as record:
            blocks = [
                Columns.matrix(columns, len(losses), n)
                for losses, columns in self._scored(session, tests, Columns(), record)
            ]
        return torch.cat(blocks) if blocks else torch.zeros(0, n)

    def scores_to_file(self, test_instances: Iterable[Any], path: str | Path) -> None:
        """All scores into a `.npy` file, shape `(T, n)`, as they come: neither T n scores nor n gradients are held.

        A checkpoint keeps nothing of this call: the file is made anew.

        Read it with `numpy.load(path, mmap_mode="r")`. The file appears when it is complete.

        Args:
            test_instances: With their labels.
            path: Where to write; what is there is replaced.

        Raises:
            ValueError: As `scores` does, if there are no test instances, or several processes share the work.
            lissa.SolverError: If the solve fails.
        """
        tests = self._listed("scores_to_file", test_instances)
        if not len(tests):
            raise ValueError("`scores_to_file(test_instances=...)` must hold at least one instance.")
        if self._ranks.size > 1:
            raise ValueError("`scores_to_file` writes what one process scores: pass process_group=None.")
        with self._session() as session:
            dtype = next(iter(session.model.params.values())).dtype
            with npy.being_written(Path(path), (len(tests), len(self._train)), dtype) as rows:
                written = Written(rows)
                for losses, _ in self._scored(session, tests, written, Record()):
                    written.start += len(losses)

    def inverse_hvps(self, test_instances: Iterable[Any]) -> Params:
        """`(H + damping I)^-1 grad_test` of each test instance, stacked: tensors of shape `(T, *shape)`."""
        tests = self._listed("inverse_hvps", test_instances)
        with self._session() as session, self._recorded(session, "inverse_hvps", tests) as record:
            none = {name: p.new_zeros(0, *p.shape) for name, p in session.model.params.items()}
            groups = [none, *self._solved(session, tests, record)]
        return {name: torch.cat([group[name] for group in groups]) for name in none}

    def self_influence(self, chosen: Sequence[int] | None = None) -> Tensor:
        """`score_i = + grad_i . (H + damping I)^-1 grad_i` for each training instance, shape `(n,)`, on the CPU.

        Each training instance is its own test instance. Large values single out unusual examples: mislabelled ones,
        outliers. All of them are solved for with the same LiSSA batches.

        Args:
            chosen: Indices of training instances; the default is all.

        Raises:
            ValueError: If the loss of a training instance is missing or not finite.
            lissa.SolverError: If the solve fails.
        """
        chosen = range(len(self._train)) if chosen is None else chosen
        with self._session() as session, self._recorded(session, "self_influence", None, chosen=chosen) as record:
            quiet = replace(session, show=False)
            session.rows(self._train).gather(self._share)
            size = min(SELF_BATCH_SIZE, self._vectors_at_once(session))
            solve = self._made_when_needed(session, record)

            def of_group(group: Sequence[int], part: Record) -> dict[str, Any]:
                vectors = self._gradients(quiet, "training", self._train, group)[1]
                ihvps, known = solve(vectors, part)
                return {"scores": vdots(vectors, ihvps).cpu(), "known": known}

            found = [torch.zeros(0, dtype=next(iter(session.model.params.values())).dtype)]
            starts = range(0, len(chosen), size)
            for start in progress.bar(starts, description="self-influence", show=session.show):
                of_this = partial(of_group, chosen[start : start + size])
                found.append(self._heard(record.once(f"group {start}", of_this))["scores"].cpu())
            if len(chosen):
                self._close(session)
        return torch.cat(found)

    # ------------------------------------------------------------------ what is known of training

    @property
    def used_param_names(self) -> list[str]:
        """Names of the parameters that influence is measured in, in the order of `model.named_parameters()`.

        Those that require grad, are not frozen, and that the loss of at least one training instance depends on.
        """
        with self._session() as session:
            return list(session.model.params)

    @property
    def used_params(self) -> list[nn.Parameter]:
        """The model's own parameters of these names."""
        parameters = dict(self.model.named_parameters())
        return [parameters[name] for name in self.used_param_names]

    @property
    def train_instances(self) -> list[InstanceWithGrads]:
        """Each training instance with its loss and gradients: n P numbers, computed each time this is read."""
        found = []
        with self._session() as session:
            for i, instance in enumerate(self._train):
                loss, gradient = session.loss_and_gradient("training", self._train, i)
                found.append(InstanceWithGrads(instance, float(loss), tuple(gradient.values())))
        return found

    # ------------------------------------------------------------------ for subclasses

    def _solver(self, session: Session, record: Record) -> Solve:
        """A function that maps K stacked gradients to K stacked solutions; made once for each public call."""
        raise NotImplementedError

    def _hear(self, known: Any) -> None:
        """Called with what the solver knows of each group, whether it was solved for now or by an earlier run."""

    def _settings_of_run(self) -> dict[str, str]:
        """What else must be the same for an earlier run's state to be of use, by name."""
        return {}

    def _close(self, session: Session) -> None:
        """Called once all that a public call asked for is solved."""

    def _vectors_at_once(self, session: Session) -> int:
        """Most right-hand sides held at a time."""
        return max(1, strategies.stack_limit(session.model) // tree.numel(session.model.params))

    def _find_used(self, session: Session) -> list[str]:
        """Of the parameters of `session.model`, the names of those that training uses."""
        unseen = session.model.params
        share = self._share
        for start in range(share.start, share.stop, self._scan_batch_size):
            indices = range(start, min(start + self._scan_batch_size, share.stop))
            with session.naming("training", self._train, indices):
                unseen = unused(session.model, unseen, session.batch(self._train, indices))
            if not unseen:
                break
        unseen_by_all = set.intersection(*self._ranks.gathered(set(unseen)))
        return [name for name in session.model.params if name not in unseen_by_all]

    def _train_scores(self, session: Session, ihvps: Params, chosen: range) -> Iterator[tuple[list[int], Tensor]]:
        """Indices of some of the chosen training instances and their scores, shape `(K, B)`, until all had a turn."""
        yield from scored.scores(session, self._train, ihvps, chosen=chosen)

    def _train_losses(self, session: Session, chosen: Iterable[int]) -> dict[int, float]:
        """The loss of each chosen training instance."""
        return scored.losses(session, self._train, list(chosen))

    # ------------------------------------------------------------------ how it is done

    def _ranked(self, call: str, test_instances: Iterable[Any], k: int, *, of: Sequence[str]) -> list[BothEnds]:
        """Both ends, of which those not asked for are empty."""
        checks.count(call, "k", k, at_least=0)
        tests = self._listed(call, test_instances)
        if not len(tests):
            return []
        with self._session() as session, self._recorded(session, call, tests, k=k) as record:
            test_losses: list[float] = []
            ends: dict[str, list[list[tuple[int, float]]]] = {"helpful": [], "harmful": []}
            for losses, ranking in self._scored(session, tests, TopK(k, of), record):
                test_losses += losses.tolist()
                for end, rows in ends.items():
                    rows += _pairs(ranking[f"{end}_indices"], ranking[f"{end}_scores"])
            ranked = {i for rows in ends.values() for row in rows for i, _ in row}
            train_losses = self._train_losses(session, sorted(ranked))

        def named(row: list[tuple[int, float]]) -> list[InstanceInfluence]:
            return [InstanceInfluence(self._train[i], train_losses[i], score) for i, score in row]

        return [
            BothEnds(test, test_losses[t], *(named(rows[t]) for rows in ends.values())) for t, test in enumerate(tests)
        ]

    def _scored(
        self, session: Session, tests: Rows, reduction: Reduction, record: Record
    ) -> Iterator[tuple[Tensor, Reduced]]:
        """Test losses, and what the reduction makes of the scores: a group of test instances at a time."""
        session.rows(self._train).gather(self._share)
        solve = self._made_when_needed(session, record)

        def of_group(chosen: range, part: Record) -> dict[str, Any]:
            solved = part.once("solved", partial(self._solved_group, session, tests, solve, chosen))
            reduced = scoring.reduced(
                partial(self._train_scores, session, solved.pop("ihvps")),
                self._share,
                block=scoring.BLOCK * self._score_batch_size,
                reduction=reduction,
                ranks=self._ranks,
                record=part,
            )
            return {**solved, "reduced": reduced}

        for chosen in self._groups(session, tests):
            found = self._heard(record.once(f"group {chosen.start}", partial(of_group, chosen)))
            yield found["losses"], found["reduced"]
        if len(tests):
            self._close(session)

    def _solved(self, session: Session, tests: Rows, record: Record) -> Iterator[Params]:
        """Solutions for the test gradients, stacked: a group of test instances at a time."""
        solve = self._made_when_needed(session, record)
        for chosen in self._groups(session, tests):
            of_group = partial(self._solved_group, session, tests, solve, chosen)
            yield self._heard(record.once(f"group {chosen.start}", of_group))["ihvps"]
        if len(tests):
            self._close(session)

    def _solved_group(
        self, session: Session, tests: Rows, solve: Solve, chosen: range, record: Record
    ) -> dict[str, Any]:
        losses, vectors = self._gradients(session, "test", tests, chosen)
        ihvps, known = solve(vectors, record)
        return {"losses": losses, "ihvps": ihvps, "known": known}

    def _groups(self, session: Session, tests: Rows) -> list[range]:
        """The test instances that are solved for together; a mistake in a later group is found before the first."""
        size = self._vectors_at_once(session)
        if len(tests) > size:
            session.losses("test", tests, range(len(tests)))
        return [range(start, min(start + size, len(tests))) for start in range(0, len(tests), size)]

    def _made_when_needed(self, session: Session, record: Record) -> Solve:
        """The solver, made when it is first called."""
        made: list[Solve] = []

        def solve(vectors: Params, part: Record) -> tuple[Params, Any]:
            if not made:
                made.append(self._solver(session, record))
            return made[0](vectors, part)

        return solve

    def _heard(self, group: dict[str, Any]) -> dict[str, Any]:
        self._hear(group["known"])
        return group

    @property
    def _share(self) -> range:
        """The training instances that this process reads."""
        return self._ranks.share(len(self._train))

    def _gradients(self, session: Session, role: str, instances: Rows, indices: Sequence[int]) -> tuple[Tensor, Params]:
        """`L_t, grad L_t` of the instances `indices`, stacked: each process computes its share, and all get all."""
        if self._ranks.size == 1:
            return session.gradients(role, instances, indices)
        share = self._share if role == "training" else [indices[t] for t in self._ranks.share(len(indices))]
        places = [place for place, i in enumerate(indices) if i in share]
        losses, gradients = session.gradients(role, instances, [indices[place] for place in places])
        whole = {"losses": losses.new_zeros(len(indices))} | {
            f"gradient {name}": t.new_zeros(len(indices), *t.shape[1:]) for name, t in gradients.items()
        }
        whole["losses"][places] = losses
        for name, gradient in gradients.items():
            whole[f"gradient {name}"][places] = gradient
        whole = self._ranks.sum(whole)
        return whole["losses"], {name: whole[f"gradient {name}"] for name in gradients}

    @contextmanager
    def _recorded(self, session: Session, call: str, tests: Rows | None, **arguments: Any) -> Iterator[Record]:
        """What is known of a public call from earlier runs, and where what is found goes."""
        self._calls += 1
        if self._keeping is None and self._ranks.size == 1:
            yield Record()
            return
        same = self._fingerprint(session, call, tests, arguments)
        recording.check_agreement(call, same, self._ranks)
        if self._keeping is None:
            yield Record()
            return
        self._train_digest = self._train_digest or recording.of_instances(self._train, self._ranks, self._share)
        same["the training data"] = self._train_digest
        same["the loss of training instance 0"] = recording.of_loss(session, self._train, self._ranks)
        held = min(self._vectors_at_once(session), SELF_BATCH_SIZE if tests is None else len(tests))
        needed = 2 * held * sum(p.nbytes for p in session.model.params.values())  # iterates, and what is solved
        with recording.opened(self._keeping, f"call-{self._calls:04d}", same, self._ranks, needed=needed) as record:
            yield record

    def _fingerprint(
        self, session: Session, call: str, tests: Rows | None, arguments: dict[str, Any]
    ) -> dict[str, str | float]:
        """What all processes, and all runs that go on from each other, must have in common."""
        alone = Ranks()
        of_tests = {} if tests is None else {
            "the test instances": recording.of_instances(tests, alone, alone.share(len(tests))),
            "how many of them": str(len(tests)),
        }  # fmt: skip
        return {
            "the call": call,
            **{f"its argument {name}": str(value) for name, value in arguments.items()},
            **of_tests,
            "the number of training instances": str(len(self._train)),
            "the parameters in use": ", ".join(session.model.params),
            "the kind of device": self.device.type,
            "score_batch_size": str(self._score_batch_size),
            **self._settings_of_run(),
            **fingerprint.of_versions(),
            **fingerprint.of_model(self.model),
        }

    @contextmanager
    def _session(self) -> Iterator[Session]:
        """What a public call works with; the caller's model and torch's global generator are as before on exit."""
        devices = [self.device] if self.device.type == "cuda" else []
        with (
            self._ranks.together(),
            torch.inference_mode(False),
            torch.random.fork_rng(devices, enabled=self._keep_rng),
            evaluation(self.model) as module,
        ):

            def session(names: list[str]) -> Session:
                model = functional(module, names, output_loss=self._loss_fn, device=self.device)
                model = model._replace(max_memory=self._max_memory)
                return Session(model, self._collate, self.progress, most_rows=self._score_batch_size)

            if self._used_names is None:
                self._used_names = self._find_used(session(self._candidates))
                if not self._used_names:
                    self._used_names = None
                    raise ValueError(
                        f"`{type(self).__name__}`: the loss of no training instance depends on any of the parameters "
                        f"{self._candidates}."
                    )
            yield self._expanded(session(self._used_names), module)

    def _expanded(self, session: Session, module: nn.Module) -> Session:
        """The session, on expansions of the instances where the parameters in use are those of one last layer."""
        if not self._expands:
            return session
        found = last_layer.expanded(session.model, module, self._train, self._share)
        by_all = all(self._ranks.gathered(found is not None))
        if found is None or not by_all:
            return session
        return replace(session, model=found[0], expand=found[1])

    def _read(self, lazy_loader: LazyLoader, reader: DatasetReader, path: Any) -> Sequence[Any]:
        """The instances that a loader reads; a dataset that our own loader was given is not copied."""
        call = type(self).__name__
        if not callable(getattr(lazy_loader, "construct", None)):
            raise TypeError(f"`{call}`: a data loader must be given as a `Lazy`, got {type(lazy_loader).__name__}.")
        ours = getattr(lazy_loader, "constructor", None) == SimpleDataLoader.from_dataset_reader
        quiet = {"quiet": not self.progress} if ours else {}
        loader = lazy_loader.construct(reader=reader, data_path=path, batch_size=1, **quiet)
        if not callable(getattr(loader, "iter_instances", None)):
            raise TypeError(f"`{call}`: a `Lazy` must construct a data loader, got {type(loader).__name__}.")
        loader.set_target_device(self.device)
        if self.vocab is not None:
            loader.index_with(self.vocab)
        return loader.instances if isinstance(loader, SimpleDataLoader) else list(loader.iter_instances())

    def _listed(self, call: str, test_instances: Any) -> Rows:
        check_dataset(call, "test_instances", test_instances)
        if is_sequence(test_instances):
            return self._rows([test_instances[i] for i in range(len(test_instances))])
        return self._rows(list(test_instances))


def _pairs(indices: Tensor, scores: Tensor) -> list[list[tuple[int, float]]]:
    """`(T, k)` indices and scores as a list of (index, score) for each row."""
    return [list(zip(*row, strict=True)) for row in zip(indices.tolist(), scores.tolist(), strict=True)]


def _shown(path: Any) -> str:
    return repr(path) if isinstance(path, (str, Path)) else f"the {type(path).__name__} given"
