"""`SimpleInfluence`: AllenNLP's interpreter on `lissa.solve_lissa`.

Knows how LiSSA's batches are drawn and what its result is worth; the numerics are `lissa`'s.
"""

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from bridge import compat as allennlp_order
from bridge import diagnostics as report
from bridge import gauss_newton, judgement, plan, precision, recursion, settings, solving
from bridge.checkpoint import Record
from bridge.data import CollateFn, DatasetReader, Lazy, LazyLoader, SimpleDataLoader, check_dataset
from bridge.diagnostics import Diagnostics, InfluenceWarning
from bridge.error_bars import error_bars
from bridge.functional import Functional, OutputLoss, evaluation, functional
from bridge.interpreter import CHECKPOINT_EVERY, SCORE_BATCH_SIZE, InfluenceInterpreter, InstanceWithGrads, Solve
from bridge.outputs import EstimatedOutput, InfluenceEstimate
from bridge.plan import Network, Plan
from bridge.rows import MOST_KEPT, Rows
from bridge.scoring import Reduced, Reduction
from bridge.session import Session
from bridge.solving import Choice
from lissa import Params, Solution, SolverError, Status, checks, index_stream, tree

VECTORS = 16
"""Right-hand sides that solvers on all the data are expected to multiply by together."""


@InfluenceInterpreter.register("simple-influence")
class SimpleInfluence(InfluenceInterpreter):
    """`score_i = + grad_i . (H + damping I)^-1 grad_test`, the inverse by LiSSA on mini-batches.

    AllenNLP's arguments mean what they mean there, damping d included: `(H + d scale I)^-1` is what is computed. Its
    default values amount to a damping of 30, far above most Hessians; such results are kept and warned of.

    Args:
        model: See `InfluenceInterpreter`.
        train_data_path: See `InfluenceInterpreter`.
        train_dataset_reader: See `InfluenceInterpreter`.
        test_dataset_reader: See `InfluenceInterpreter`.
        train_data_loader: See `InfluenceInterpreter`.
        test_data_loader: See `InfluenceInterpreter`.
        params_to_freeze: See `InfluenceInterpreter`.
        cuda_device: See `InfluenceInterpreter`.
        lissa_batch_size: Training instances a LiSSA step.
        damping: AllenNLP's damping: in units of `1 / scale`, so the damping in the units of the Hessian is
            `damping * scale`. `ridge` says it directly.
        num_samples: LiSSA runs averaged.
        recursion_depth: Steps of a run, as an int; or as a float, a fraction of the batches of one pass. `"auto"`:
            as many as the slowest mode needs.
        scale: The step size is `1 / scale`; it must exceed `(lambda_max + damping * scale + trace / batch size) / 2`.
            `"auto"`: twice that, from the spectrum on a sample of the training data. With `recursion_depth="auto"`
            too, LiSSA also averages or reduces its variance until the residual on all the data is at most `rtol`.
        loss_fn: See `InfluenceInterpreter`.
        collate_fn: See `InfluenceInterpreter`.
        ridge: The damping in the units of the Hessian; instead of `damping`. `"auto"`: a tenth of the mean eigenvalue,
            see `lissa.suggest_damping`; so too where a solver or scale of ours is asked for and no damping is given.
        solver: `"lissa"`; `"cg"`, `"minres"` (for Hessians with negative eigenvalues) or `"dense"` (for small models),
            which see all the data and ignore scale and depth; `"gauss-newton"`: the Gauss-Newton matrix in place of
            the Hessian, for all test instances at once in the space of the model's outputs (`lissa.dual_influence`),
            which suits large models and a few thousand training instances; `"auto"`: the cheapest of LiSSA's ways and
            CG, for many test instances with products that they share (`lissa.solve_block_cg`).
        rtol: The relative residual on all the data that solvers stop at, where they choose their own steps.
        seed: Where the order of the LiSSA batches comes from.
        compat: `"allennlp"` for AllenNLP's own numbers run for run: order by Python's global `random`, training
            gradients in train mode and kept in memory, scores rounded to torch's default dtype (float32), a solve for
            each test instance.
        progress: See `InfluenceInterpreter`.
        score_batch_size: See `InfluenceInterpreter`.
        max_memory: See `InfluenceInterpreter`.
        measure_residual: Whether to measure the residual on the full training data after each LiSSA solve, which costs
            a Hessian-vector product of each training instance and takes the loss to be a mean over the batch. The
            default measures those of the first test instances: as many as add a quarter to the solve's cost, one at
            least.
        mixed_precision: Whether LiSSA's products are made in bfloat16, with sums and iterates in float32. Their
            relative error is measured on a batch (`diagnostics.product_error`); gradients, residuals and scores stay in
            float32. It pays where matrices are large. For LiSSA with its scale and depth given.
        checkpoint_dir: See `InfluenceInterpreter`. LiSSA goes on in the middle of a run; other solvers with the next
            right-hand sides, `"gauss-newton"` with the next call.
        checkpoint_every: See `InfluenceInterpreter`.
        process_group: See `InfluenceInterpreter`. A LiSSA batch is the same however many processes there are: each
            multiplies by the part of it that falls into its share, and products are summed. With
            `solver="gauss-newton"` each process does all the work.

    Raises:
        ValueError: If a number is out of range, `damping` and `ridge` are both given, every parameter is frozen, or
            there are no training instances.
        TypeError: If an argument is of the wrong type.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(40, 2)
        >>> data = [(x, y) for x, y in zip(x, (x[:, 0] > 0).long())]
        >>> influence = SimpleInfluence.from_dataset(
        ...     nn.Linear(2, 2), data, loss_fn=nn.functional.cross_entropy, ridge=0.1, scale=3.0, recursion_depth=100,
        ...     lissa_batch_size=40)
        >>> output = influence.interpret(data[0], k=3)
        >>> output.top_k[0].score >= output.top_k[1].score >= output.top_k[2].score
        True
    """

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
        lissa_batch_size: int = 8,
        damping: float = settings.DEFAULT_DAMPING,
        num_samples: int = 1,
        recursion_depth: float | int | str = 0.25,
        scale: float | str = 1e4,
        loss_fn: OutputLoss | None = None,
        collate_fn: CollateFn | None = None,
        ridge: float | str | None = None,
        solver: str = "lissa",
        rtol: float = 1e-2,
        seed: int = 0,
        compat: str | None = None,
        progress: bool = True,
        score_batch_size: int = SCORE_BATCH_SIZE,
        max_memory: int | None = None,
        measure_residual: bool | None = None,
        mixed_precision: bool = False,
        checkpoint_dir: str | Path | None = None,
        checkpoint_every: float = CHECKPOINT_EVERY,
        process_group: Any = "all",
    ):
        lissa_settings = partial(
            settings.lissa_settings,
            lissa_batch_size=lissa_batch_size,
            damping=damping,
            ridge=ridge,
            scale=scale,
            recursion_depth=recursion_depth,
            num_samples=num_samples,
            solver=solver,
            rtol=rtol,
        )
        lissa_settings(examples=1)  # wrong settings must not wait for the data to be read
        if compat is not None:
            checks.one_of("SimpleInfluence", "compat", compat, ("allennlp",))
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"`SimpleInfluence(seed=...)` must be an int, got {type(seed).__name__}.")
        if compat is not None and (solver != "lissa" or "auto" in (scale, recursion_depth, ridge)):
            raise ValueError("`SimpleInfluence(compat='allennlp')` takes numbers and solver='lissa', as AllenNLP does.")
        if mixed_precision and (solver != "lissa" or "auto" in (scale, recursion_depth) or compat is not None):
            raise ValueError(
                "`SimpleInfluence(mixed_precision=True)` is for solver='lissa' with numbers for scale and "
                f"recursion_depth, without compat: got solver={solver!r}, scale={scale!r}, "
                f"recursion_depth={recursion_depth!r}, compat={compat!r}."
            )
        if compat is not None and checkpoint_dir is not None:
            raise ValueError(
                "`SimpleInfluence(compat='allennlp', checkpoint_dir=...)`: AllenNLP's order comes from the global "
                "random state, which cannot be gone back to. Leave out one of the two."
            )
        super().__init__(
            model,
            train_data_path,
            train_dataset_reader,
            test_dataset_reader=test_dataset_reader,
            train_data_loader=train_data_loader,
            test_data_loader=test_data_loader,
            params_to_freeze=params_to_freeze,
            cuda_device=cuda_device,
            loss_fn=loss_fn,
            collate_fn=collate_fn,
            progress=progress,
            score_batch_size=score_batch_size,
            max_memory=max_memory,
            checkpoint_dir=checkpoint_dir,
            checkpoint_every=checkpoint_every,
            process_group=process_group,
        )
        n = len(self._train)
        kinds = {p.dtype for name, p in model.named_parameters() if name in self._candidates}
        if mixed_precision and kinds != {torch.float32}:
            raise ValueError(f"`SimpleInfluence(mixed_precision=True)` is for parameters in float32, got {kinds}.")
        if compat is not None and self._ranks.size > 1:
            raise ValueError(
                "`SimpleInfluence(compat='allennlp')` runs in one process, as AllenNLP does: pass process_group=None."
            )
        self.settings = lissa_settings(examples=n)
        self._diagnostics: Diagnostics | None = None
        self._parts: list[Diagnostics] = []
        self._measure_residual = measure_residual
        self._mixed_precision = mixed_precision
        self._seed = seed
        self._scan_batch_size = self.settings.batch_size
        self._compat = compat is not None
        self._keep_rng = not self._compat
        self._expands = not self._compat and solver != gauss_newton.NAME
        self._compat_instances: list[InstanceWithGrads] | None = None
        self._stream: Iterator[list[int]]
        self._drawn = 0
        self.restart_batches()

    @classmethod
    def from_dataset(
        cls,
        model: nn.Module,
        train_dataset: Dataset[Any] | Iterable[Any],
        *,
        loss_fn: OutputLoss | None = None,
        cuda_device: int | torch.device | None = None,
        **settings: Any,
    ) -> "SimpleInfluence":
        """The interpreter of a plain PyTorch model and dataset.

        Args:
            model: Any module.
            train_dataset: Yields `(x, y)` pairs, with `loss_fn`; or mappings, with a model whose output has a loss.
            loss_fn: `loss_fn(model(x), y) -> ()`, the mean loss of a batch.
            cuda_device: See the class; the default is where the model is.
            **settings: All others of the class, from `params_to_freeze` on; `collate_fn`, as for a `DataLoader`, is
                needed where examples differ in shape.

        Returns:
            The interpreter. Its `interpret_from_file` takes a dataset as well.

        Raises:
            ValueError: See the class.
            TypeError: See the class.
        """
        check_dataset("SimpleInfluence.from_dataset", "train_dataset", train_dataset)
        return cls(model, train_dataset, _ReadAsItIs(), loss_fn=loss_fn, cuda_device=cuda_device, **settings)

    def restart_batches(self) -> None:
        """The next call draws the LiSSA batches that the first one drew; otherwise it draws those that come next."""
        n, size = len(self._train), self.settings.batch_size
        if self._compat:
            self._stream = allennlp_order.shuffled_passes(n, size)
        else:
            batches = index_stream(n, size, generator=torch.Generator().manual_seed(self._seed))
            self._stream = (indices.tolist() for indices in batches)

    @property
    def train_instances(self) -> list[InstanceWithGrads]:
        """Each training instance with its loss and gradients: n P numbers, computed each time this is read.

        With `compat="allennlp"` they are computed once, in train mode, and kept, as there.
        """
        if not self._compat:
            return super().train_instances
        with self._session():
            return list(self._compat_instances or ())

    @property
    def diagnostics(self) -> Diagnostics:
        """What the latest call solved, in numbers; `diagnostics.in_words()` says it.

        Raises:
            ValueError: If nothing was solved yet.
        """
        if self._diagnostics is None:
            raise ValueError("`SimpleInfluence.diagnostics` are of the latest call, and there was none yet.")
        return self._diagnostics

    def interpret_with_error_bars(
        self, test_instances: Iterable[Any], k: int = 20, *, smallest: float = 0.0
    ) -> list[EstimatedOutput]:
        """`interpret_instances`, with `|score - exact| <= |grad_i| |r| / (lambda_min + damping)` for each score.

        The residual r is measured on all the training data. With `num_samples` of two or more and a solver that draws
        batches, each score also carries its standard error over the independent solves. All n scores of a test instance
        are held, and n gradients are computed, so it costs more than `interpret_instances`.

        Args:
            test_instances: With their labels.
            k: How many training instances; all there are if there are fewer.
            smallest: A lower bound of the Hessian's eigenvalues, for the bound: 0 if the loss is convex in the
                parameters that are used; else a negative number, which the damping must exceed.

        Returns:
            For each test instance the `k` largest scores, each an `InfluenceEstimate`; `settled` marks those whose
            place in the ranking the errors leave no doubt of.

        Raises:
            ValueError: As `interpret` does, or if `smallest` plus the damping is not > 0, or with `compat`.
            lissa.SolverError: If the solve fails.
        """
        call = "interpret_with_error_bars"
        checks.count(call, "k", k, at_least=0)
        checks.finite(call, "smallest", smallest)
        if self._compat:
            raise ValueError(f"`{call}` has no counterpart in AllenNLP: leave out compat='allennlp'.")
        tests = self._listed(call, test_instances)
        found: list[EstimatedOutput] = []
        if not len(tests):
            return found
        with self._session() as session, self._recorded(session, call, tests, k=k, smallest=smallest) as record:
            session.rows(self._train).gather(self._share)
            choice, solve = self._solutions(session, record, measure_all=True)
            if not smallest + choice.damping > 0:
                raise ValueError(
                    f"`{call}(smallest=...)` must have smallest + damping > 0, got {smallest:g} + {choice.damping:g}."
                )
            size = max(1, self._vectors_at_once(session) // (1 + self.settings.num_samples))
            for start in range(0, len(tests), size):
                chosen = range(start, min(start + size, len(tests)))
                losses, vectors = self._gradients(session, "test", tests, chosen)
                solution, known = solve(vectors, record.part(f"group {start}"))
                self._hear(known)
                bars = error_bars(
                    session, self._train, vectors, solution, damping=choice.damping, smallest=smallest,
                    ranks=self._ranks,
                )  # fmt: skip
                rankings = bars.ranked(k)
                train_losses = self._train_losses(session, sorted({known[0] for row in rankings for known in row}))
                for t, row in enumerate(rankings):
                    top = [
                        InfluenceEstimate(self._train[known[0]], train_losses[known[0]], *known[1:]) for known in row
                    ]
                    found.append(EstimatedOutput(tests[start + t], float(losses[t]), top))
            self._close(session)
        return found

    def plan(
        self,
        test_instances: Iterable[Any],
        *,
        ranks: Sequence[int] = (1,),
        n: int | None = None,
        tests: int | None = None,
        together: int | None = None,
        network: Network | None = None,
    ) -> list[Plan]:
        """Time, memory and traffic of `interpret_instances`, for several numbers of processes, from a short probe.

        The probe takes some seconds: it reads a part of the training data and takes a few steps of each kind on this
        machine, whose processes stand for all.

        Args:
            test_instances: A few, with their labels.
            ranks: Numbers of processes.
            n: Training instances; the default is as many as there are.
            tests: Test instances; the default is as many as are given.
            together: Test instances that are solved for together; the default is as many as this class would.
            network: What connects the processes; the default is measured between those that share the work of this
                call, or 1 GB/s and 50 microseconds if there is only this one.

        Returns:
            A `bridge.plan.Plan` for each of `ranks`.

        Raises:
            ValueError: If the steps are not known, because the solver chooses them, or a number is out of range.
        """
        n, wanted = len(self._train) if n is None else n, self.settings
        given = self._listed("plan", test_instances)
        tests = len(given) if tests is None else tests
        for name, count in (("n", n), ("tests", tests), *(("ranks", count) for count in ranks)):
            checks.count("plan", name, count)
        if not len(given) or wanted.solver != "lissa" or wanted.steps is None or self._compat:
            raise ValueError(
                "`plan` needs a test instance, and solver='lissa' with recursion_depth=..., a number of steps, got "
                f"{len(given)} test instances, solver={wanted.solver!r} and {wanted.steps} steps."
            )
        with self._session() as session:
            K = min(tests, self._vectors_at_once(session), together or tests)
            work = plan.Work(
                n=n,
                tests=tests,
                together=K,
                batch_size=wanted.batch_size,
                steps=wanted.steps,
                repeats=wanted.num_samples,
                measured=self._measured(K, wanted.steps, n, all_of_them=bool(self._measure_residual)),
                ranks=1,
            )
            works = [work._replace(ranks=count) for count in ranks]
            network = plan.network_of(self._ranks, network or Network())
            rates = plan.measured(
                replace(session, will_score=self._keeping is None), self._train, given, works, self._ranks, network,
                stepping=self._stepping(session),
            )  # fmt: skip
        return [
            plan.predicted(work, measured, network, most_kept=MOST_KEPT)
            for work, measured in zip(works, rates, strict=True)
        ]

    def self_influence(self, chosen: Sequence[int] | None = None) -> Tensor:
        """See `InfluenceInterpreter.self_influence`; with `solver="gauss-newton"`, all are solved for at once."""
        if self.settings.solver != gauss_newton.NAME:
            return super().self_influence(chosen)
        chosen = range(len(self._train)) if chosen is None else chosen

        with self._session() as session, self._recorded(session, "self_influence", None) as record:
            of_all = partial(gauss_newton.self_influence, session, self._train, damping=self.settings.damping)
            found = self._heard(record.once("all", lambda _: of_all()))
            self._close(session)
        return found["scores"].cpu()[list(chosen)]

    # ------------------------------------------------------------------ the solve

    def _scored(
        self, session: Session, tests: Rows, reduction: Reduction, record: Record
    ) -> Iterator[tuple[Tensor, Reduced]]:
        if self.settings.solver != gauss_newton.NAME or not len(tests):
            at_once = not self._compat and not record.kept and self._ranks.size == 1
            yield from super()._scored(replace(session, will_score=at_once), tests, reduction, record)
            return

        of_all = partial(
            gauss_newton.scored, session, self._train, tests, damping=self.settings.damping, reduction=reduction
        )
        group = self._heard(record.once("all", lambda _: of_all()))
        self._close(session)
        yield group["losses"], group["reduced"]

    def _solver(self, session: Session, record: Record) -> Solve:
        _, solve = self._solutions(session, record, measure_all=bool(self._measure_residual))

        def solve_for_value(vectors: Params, part: Record) -> tuple[Params, Any]:
            solution, known = solve(vectors, part)
            return solution.value, known

        return solve_for_value

    def _solutions(
        self, session: Session, record: Record, *, measure_all: bool
    ) -> tuple[Choice, Callable[[Params, Record], tuple[Solution, dict[str, Any]]]]:
        """How it is solved, and the function that does: K stacked gradients to K solutions, and what they are worth."""
        if self.settings.solver == gauss_newton.NAME:
            raise ValueError(
                f"`SimpleInfluence(solver={gauss_newton.NAME!r})` finds scores without the solutions behind them: use "
                "`interpret`, `scores` or `self_influence`, or another solver."
            )
        choice = solving.choose(session, self._train, self.settings, seed=self._seed, ranks=self._ranks, record=record)
        if choice.plan is None and choice.solver == "lissa":
            solve_all = self._by_recursion(session, choice, measure_all, record)
        else:
            solve_all = solving.on_all_data(
                session, self._train, choice, size=session.rows_at_once(self._train, VECTORS),
                rtol=self.settings.rtol, seed=self._seed, ranks=self._ranks,
            )  # fmt: skip

        def solve(vectors: Params, part: Record) -> tuple[Solution, dict[str, Any]]:
            solution = solve_all(vectors, part)
            worst = Status(int(solution.status.max()))
            if worst is Status.NOT_FINITE:
                self._ranks.raise_first(partial(session.first_not_finite, "training", self._train, self._share))
            if worst.failed:
                raise SolverError(report.failure_advice(worst, choice.solver, choice.damping, choice.scale), solution)
            used = choice.of(len(solution.status))
            return solution, self._judge(session, used, vectors, solution)._asdict()

        return choice, solve

    def _hear(self, known: Any) -> None:
        self._parts.append(report.from_plain(known))

    def _settings_of_run(self) -> dict[str, str]:
        return {
            **{name: str(value) for name, value in self.settings._asdict().items()},
            "seed": str(self._seed),
            "measure_residual": str(self._measure_residual),
            "mixed_precision": str(self._mixed_precision),
        }

    @contextmanager
    def _recorded(self, session: Session, call: str, tests: Rows | None, **arguments: Any) -> Iterator[Record]:
        self._parts = []
        before = self._drawn
        with super()._recorded(session, call, tests, batches_before=before, **arguments) as record:
            yield record
            # An earlier run may have drawn for what did not have to be solved for again; the next call goes on after.
            self._next_batches(max(0, (record.get("drawn") or 0) - (self._drawn - before)))

    def _by_recursion(
        self, session: Session, choice: Choice, measure_all: bool, record: Record
    ) -> Callable[[Params, Record], Solution]:
        drawn = None if self._compat else self._draw(choice.steps)
        record.note("drawn", choice.steps * self.settings.num_samples)

        def runs() -> list[recursion.Run]:
            return self._draw(choice.steps) if drawn is None else drawn

        def measured(vectors: int) -> int:
            return self._measured(vectors, choice.steps, len(self._train), all_of_them=measure_all)

        return recursion.solver(
            session, self._train, choice, runs, measured=measured, ranks=self._ranks, model=self._stepping(session)
        )

    def _stepping(self, session: Session) -> Functional:
        """What LiSSA multiplies by; the closed forms of a last layer are few and small products."""
        low = self._mixed_precision and session.model.last_layer is None
        return precision.lowered(session.model) if low else session.model

    def _measured(self, vectors: int, steps: int, n: int, *, all_of_them: bool) -> int:
        """How many residuals: those whose products cost at most a quarter of the solve's, one at least; see class."""
        if all_of_them or self._measure_residual is False:
            return vectors if all_of_them else 0
        multiplied = vectors * steps * self.settings.batch_size * self.settings.num_samples
        return min(vectors, max(1, multiplied // (4 * n)))

    def _draw(self, steps: int) -> list[recursion.Run]:
        """The batches of each run, as indices: the next ones of passes that go on from call to call."""
        return [self._next_batches(steps) for _ in range(self.settings.num_samples)]

    def _next_batches(self, count: int) -> recursion.Run:
        self._drawn += count
        return list(itertools.islice(self._stream, count))

    # ------------------------------------------------------------------ what it is worth

    def _judge(self, session: Session, choice: Choice, vectors: Params, solution: Solution) -> Diagnostics:
        found = judgement.of_solution(
            session, self._train, choice, vectors, solution, num_samples=self.settings.num_samples, seed=self._seed
        )
        stepping = self._stepping(session)
        if stepping is session.model:
            return found
        batch = index_stream(len(self._train), choice.batch_size, generator=torch.Generator().manual_seed(self._seed))
        error = precision.product_error(session, stepping, self._train, next(batch).tolist(), vectors)
        return found._replace(product_error=error)

    def _close(self, session: Session) -> None:
        found = judgement.of_call(session, self._train, report.joined(self._parts), seed=self._seed)
        problems = found.problems()
        if problems:
            warnings.warn(" ".join(problems), InfluenceWarning, stacklevel=2)
        self._diagnostics = found

    # ------------------------------------------------------------------ AllenNLP's own numbers

    def _vectors_at_once(self, session: Session) -> int:
        return 1 if self._compat else super()._vectors_at_once(session)

    def _find_used(self, session: Session) -> list[str]:
        if not self._compat:
            return super()._find_used(session)
        with evaluation(self.model, training=True) as module:
            model = functional(module, self._candidates, output_loss=self._loss_fn, device=self.device)
            in_train_mode = Session(model, self._collate, self.progress)
            found, names = [], []
            batches = (in_train_mode.batch(self._train, [i]) for i in range(len(self._train)))
            for i, (loss, gradient) in enumerate(allennlp_order.train_mode_gradients(model, batches)):
                names = list(gradient)
                found.append(InstanceWithGrads(self._train[i], float(loss), tuple(gradient.values())))
        self._compat_instances = found
        return names

    def _train_scores(self, session: Session, ihvps: Params, chosen: range) -> Iterator[tuple[list[int], Tensor]]:
        if self._compat_instances is None:
            yield from super()._train_scores(session, ihvps, chosen)
            return
        for i, instance in enumerate(self._compat_instances):
            gradient = dict(zip(ihvps, instance.grads, strict=True))
            score = torch.vmap(tree.vdot, in_dims=(0, None))(ihvps, gradient)
            yield [i], score.to(torch.get_default_dtype()).unsqueeze(1)

    def _train_losses(self, session: Session, chosen: Iterable[int]) -> dict[int, float]:
        if self._compat_instances is None:
            return super()._train_losses(session, chosen)
        return {i: self._compat_instances[i].loss for i in chosen}


class _ReadAsItIs:
    """The reader of a dataset that is already there."""

    def read(self, file_path: Any) -> Any:
        return file_path
