"""`InfluenceInterpreter`: instances in, ranked training instances out. How `H^-1 v` is found is left to subclasses.

Knows instances, files read through readers, and which training example is which; knows nothing of solvers.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bridge import npy, settings, strategies
from bridge.archives import FromArchive
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
from bridge.functional import OutputLoss, evaluation, functional, unused
from bridge.outputs import BothEnds, InstanceInfluence, InstanceWithGrads, InterpretOutput
from bridge.rows import Rows
from bridge.session import Session, check_finite
from lissa import Params, checks, ranking_init, ranking_update, tree

GATHERED_BYTES = 2**28
"""Training instances that take at most this are held as tensors while a call needs them."""

SELF_BATCH_SIZE = 512
"""Most training examples whose self-influence is solved for together."""

Solve = Callable[[Params], Params]
"""`K stacked test gradients -> K stacked (H + damping I)^-1 v`."""


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
        score_batch_size: Training examples held together while scores or residuals are computed; the default is as
            many as fit into the memory that 16 million numbers take, at most 1024.

    Raises:
        ValueError: If there are no training instances or every parameter is frozen.
        TypeError: If an argument is of the wrong type.
    """

    default_implementation: ClassVar[str] = "simple-influence"
    _keep_rng = True

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
        score_batch_size: int | None = None,
        max_memory: int | None = None,
    ):
        call = type(self).__name__
        self._candidates = settings.trainable_names(call, model, params_to_freeze)
        self.device = settings.device_of(call, cuda_device, model)
        if score_batch_size is not None:
            checks.count(call, "score_batch_size", score_batch_size)
        if max_memory is not None:
            checks.count(call, "max_memory", max_memory)
        for name, value in (("loss_fn", loss_fn), ("collate_fn", collate_fn)):
            if value is not None and not callable(value):
                raise TypeError(f"`{call}({name}=...)` must be callable, got {type(value).__name__}.")
        self.model = model
        self.vocab = getattr(model, "vocab", None)
        self.progress = progress
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
            most_bytes=GATHERED_BYTES if max_memory is None else max_memory // 4,
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
        return [InterpretOutput(*row[:3]) for row in self._both_ends("interpret_instances", test_instances, k)]

    def interpret_from_file(self, test_data_path: Any, k: int = 20) -> list[InterpretOutput]:
        """`interpret_instances` for what the test reader reads from a path."""
        return self.interpret_instances(self._read(self._test_loader, self._test_reader, test_data_path), k)

    def interpret_both_ends(self, test_instances: Iterable[Any], k: int = 20) -> list[BothEnds]:
        """`interpret_instances` with the `k` most harmful training instances (smallest scores first) as well."""
        return self._both_ends("interpret_both_ends", test_instances, k)

    def scores(self, test_instances: Iterable[Any]) -> Tensor:
        """All scores, shape `(T, n)`: a row for each test instance, a column for each training instance, on the CPU."""
        tests = self._listed("scores", test_instances)
        with self._session() as session:
            self._train.gather()
            blocks = []
            for losses, parts in self._scored(session, tests):
                block = torch.zeros(len(losses), len(self._train))
                for indices, scores in parts:
                    block = block.to(scores.dtype)
                    block[:, indices] = scores.cpu()
                blocks.append(block)
        return torch.cat(blocks) if blocks else torch.zeros(0, len(self._train))

    def scores_to_file(self, test_instances: Iterable[Any], path: str | Path) -> None:
        """All scores into a `.npy` file, shape `(T, n)`, as they come: neither T n scores nor n gradients are held.

        Read it with `numpy.load(path, mmap_mode="r")`. The file appears when it is complete.

        Args:
            test_instances: With their labels.
            path: Where to write; what is there is replaced.

        Raises:
            ValueError: As `scores` does, or if there are no test instances.
            lissa.SolverError: If the solve fails.
        """
        tests = self._listed("scores_to_file", test_instances)
        if not len(tests):
            raise ValueError("`scores_to_file(test_instances=...)` must hold at least one instance.")
        with self._session() as session:
            self._train.gather()
            dtype = next(iter(session.model.params.values())).dtype
            with npy.being_written(Path(path), (len(tests), len(self._train)), dtype) as rows:
                start = 0
                for losses, parts in self._scored(session, tests):
                    block = rows[start : start + len(losses)]
                    for indices, scores in parts:
                        block[:, torch.tensor(indices)] = scores.cpu().to(dtype)
                    start += len(losses)

    def inverse_hvps(self, test_instances: Iterable[Any]) -> Params:
        """`(H + damping I)^-1 grad_test` of each test instance, stacked: tensors of shape `(T, *shape)`."""
        tests = self._listed("inverse_hvps", test_instances)
        with self._session() as session:
            none = {name: p.new_zeros(0, *p.shape) for name, p in session.model.params.items()}
            groups = [none, *(ihvps for _, ihvps in self._solved(session, tests))]
        return {name: torch.cat([group[name] for group in groups]) for name in none}

    def self_influence(self) -> Tensor:
        """`score_i = + grad_i . (H + damping I)^-1 grad_i` for each training instance, shape `(n,)`, on the CPU.

        Each training instance is its own test instance. Large values single out unusual examples: mislabelled ones,
        outliers. All of them are solved for with the same LiSSA batches.

        Raises:
            ValueError: If the loss of a training instance is missing or not finite.
            lissa.SolverError: If the solve fails.
        """
        found: dict[int, float] = {}
        with self._session() as session:
            self._train.gather()
            solve = self._solver(session)
            gradients = strategies.losses_and_gradients(session.model)
            size = min(SELF_BATCH_SIZE, self._vectors_at_once(session))
            for indices, stack in session.examples(self._train, size=size, description="self-influence"):
                with session.naming("training", self._train, indices):
                    vectors = gradients(stack)[1]
                found |= zip(indices, torch.vmap(tree.vdot)(vectors, solve(vectors)).tolist(), strict=True)
            self._close(session)
        dtype = next(iter(session.model.params.values())).dtype
        return torch.tensor([found[i] for i in range(len(self._train))], dtype=dtype)

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

    def _solver(self, session: Session) -> Solve:
        """A function that maps K stacked gradients to K stacked solutions; made once for each public call."""
        raise NotImplementedError

    def _close(self, session: Session) -> None:
        """Called once all that a public call asked for is solved."""

    def _vectors_at_once(self, session: Session) -> int:
        """Most right-hand sides held at a time."""
        return max(1, strategies.stack_limit(session.model) // tree.numel(session.model.params))

    def _find_used(self, session: Session) -> list[str]:
        """Of the parameters of `session.model`, the names of those that training uses."""
        unseen = session.model.params
        for start in range(0, len(self._train), self._scan_batch_size):
            indices = range(start, min(start + self._scan_batch_size, len(self._train)))
            with session.naming("training", self._train, indices):
                unseen = unused(session.model, unseen, session.batch(self._train, indices))
            if not unseen:
                break
        return [name for name in session.model.params if name not in unseen]

    def _train_scores(self, session: Session, ihvps: Params) -> Iterator[tuple[list[int], Tensor]]:
        """Indices of some training instances and their scores, shape `(K, B)`, until all had their turn."""
        score = strategies.scores(session.model)
        size = session.rows_at_once(self._train, vectors=1)  # `lissa` cuts these as its method needs it
        for indices, stack in session.examples(self._train, size=size, description="scoring"):
            with session.naming("training", self._train, indices):
                scores = score(ihvps, stack)
            check_finite("score", "training", indices, scores)
            yield indices, scores

    def _train_losses(self, session: Session, chosen: Iterable[int]) -> dict[int, float]:
        """The loss of each chosen training instance."""
        return session.losses("training", self._train, chosen)

    # ------------------------------------------------------------------ how it is done

    def _both_ends(self, call: str, test_instances: Iterable[Any], k: int) -> list[BothEnds]:
        checks.count(call, "k", k, at_least=0)
        tests = self._listed(call, test_instances)
        if not len(tests):
            return []
        with self._session() as session:
            self._train.gather()
            test_losses: list[float] = []
            helpful: list[list[tuple[int, float]]] = []
            harmful: list[list[tuple[int, float]]] = []
            for losses, parts in self._scored(session, tests):
                ranking = None
                for indices, scores in parts:
                    ranking = ranking or ranking_init(scores, k)
                    ranking = ranking_update(ranking, scores, torch.tensor(indices, device=scores.device), k=k)
                test_losses += losses.tolist()
                if ranking is not None:
                    helpful += _pairs(ranking.helpful_indices, ranking.helpful_scores)
                    harmful += _pairs(ranking.harmful_indices, ranking.harmful_scores)
            ranked = {i for rows in (helpful, harmful) for row in rows for i, _ in row}
            train_losses = self._train_losses(session, sorted(ranked))

        def named(row: list[tuple[int, float]]) -> list[InstanceInfluence]:
            return [InstanceInfluence(self._train[i], train_losses[i], score) for i, score in row]

        return [BothEnds(test, test_losses[t], named(helpful[t]), named(harmful[t])) for t, test in enumerate(tests)]

    def _scored(self, session: Session, tests: Rows) -> Iterator[tuple[Tensor, Iterator[tuple[list[int], Tensor]]]]:
        """Test losses, and indices and scores of training instances: a group of test instances at a time."""
        for losses, ihvps in self._solved(session, tests):
            yield losses, self._train_scores(session, ihvps)

    def _solved(self, session: Session, tests: Rows) -> Iterator[tuple[Tensor, Params]]:
        """Test losses, and solutions for the test gradients, stacked: a group of test instances at a time."""
        size = self._vectors_at_once(session)
        if len(tests) > size:  # a mistake in a later group must not wait for the first to be solved
            session.losses("test", tests, range(len(tests)))
        solve = None
        for start in range(0, len(tests), size):
            losses, gradients = session.gradients("test", tests, range(start, min(start + size, len(tests))))
            solve = solve or self._solver(session)
            yield losses, solve(gradients)
        if len(tests):
            self._close(session)

    @contextmanager
    def _session(self) -> Iterator[Session]:
        """What a public call works with; the caller's model and torch's global generator are as before on exit."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=self._keep_rng), evaluation(self.model) as module:

            def session(names: list[str]) -> Session:
                model = functional(module, names, output_loss=self._loss_fn, device=self.device)
                model = model._replace(max_memory=self._max_memory)
                return Session(model, self._collate, self.progress, rows=self._score_batch_size)

            if self._used_names is None:
                self._used_names = self._find_used(session(self._candidates))
                if not self._used_names:
                    self._used_names = None
                    raise ValueError(
                        f"`{type(self).__name__}`: the loss of no training instance depends on any of the parameters "
                        f"{self._candidates}."
                    )
            yield session(self._used_names)

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
