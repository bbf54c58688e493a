"""`SimpleInfluence`: AllenNLP's interpreter on `lissa.solve_lissa`.

Knows how LiSSA's batches are drawn and what its result is worth; the numerics are `lissa`'s.
"""

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from bridge import compat as allennlp_order
from bridge import diagnostics as report
from bridge import gauss_newton, measurements, progress, settings, solving, strategies
from bridge.data import CollateFn, DatasetReader, Lazy, LazyLoader, SimpleDataLoader, check_dataset
from bridge.diagnostics import Diagnostics, InfluenceWarning
from bridge.error_bars import error_bars
from bridge.functional import OutputLoss, evaluation, functional
from bridge.interpreter import InfluenceInterpreter, InstanceWithGrads, Solve
from bridge.outputs import EstimatedOutput, InfluenceEstimate
from bridge.rows import Rows
from bridge.session import Session
from bridge.solving import Choice
from lissa import DualInfluence, Params, Solution, SolverError, Status, checks, index_stream, tree

VECTORS = 16
"""Right-hand sides that solvers on all the data are expected to multiply by together."""

MOST_CORRELATED = 8
"""Right-hand sides whose scores are compared with plain gradient products, for a warning."""


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
            CG.
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
        score_batch_size: int | None = None,
        max_memory: int | None = None,
        measure_residual: bool | None = None,
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
        generator = torch.Generator().manual_seed(seed)
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
        )
        n = len(self._train)
        self.settings = lissa_settings(examples=n)
        self._diagnostics: Diagnostics | None = None
        self._parts: list[Diagnostics] = []
        self._measure_residual = measure_residual
        self._seed = seed
        self._scan_batch_size = self.settings.batch_size
        self._compat = compat is not None
        self._keep_rng = not self._compat
        self._compat_instances: list[InstanceWithGrads] | None = None
        self._stream: Iterator[list[int]]
        if self._compat:
            self._stream = allennlp_order.shuffled_passes(n, self.settings.batch_size)
        else:
            batches = index_stream(n, self.settings.batch_size, generator=generator)
            self._stream = (indices.tolist() for indices in batches)

    @classmethod
    def from_dataset(
        cls,
        model: nn.Module,
        train_dataset: Dataset[Any] | Iterable[Any],
        *,
        loss_fn: OutputLoss | None = None,
        collate_fn: CollateFn | None = None,
        params_to_freeze: list[str] | None = None,
        cuda_device: int | torch.device | None = None,
        lissa_batch_size: int = 8,
        damping: float = settings.DEFAULT_DAMPING,
        num_samples: int = 1,
        recursion_depth: float | int | str = 0.25,
        scale: float | str = 1e4,
        ridge: float | str | None = None,
        solver: str = "lissa",
        rtol: float = 1e-2,
        seed: int = 0,
        compat: str | None = None,
        progress: bool = True,
        score_batch_size: int | None = None,
        max_memory: int | None = None,
        measure_residual: bool | None = None,
    ) -> "SimpleInfluence":
        """The interpreter of a plain PyTorch model and dataset.

        Args:
            model: Any module.
            train_dataset: Yields `(x, y)` pairs, with `loss_fn`; or mappings, with a model whose output has a loss.
            loss_fn: `loss_fn(model(x), y) -> ()`, the mean loss of a batch.
            collate_fn: As for a `DataLoader`; needed where examples differ in shape.
            params_to_freeze: See the class.
            cuda_device: See the class; the default is where the model is.
            lissa_batch_size: See the class.
            damping: See the class.
            num_samples: See the class.
            recursion_depth: See the class.
            scale: See the class.
            ridge: See the class.
            solver: See the class.
            rtol: See the class.
            seed: See the class.
            compat: See the class.
            progress: See the class.
            score_batch_size: See the class.
            max_memory: See the class.
            measure_residual: See the class.

        Returns:
            The interpreter. Its `interpret_from_file` takes a dataset as well.

        Raises:
            ValueError: See the class.
            TypeError: See the class.
        """
        check_dataset("SimpleInfluence.from_dataset", "train_dataset", train_dataset)
        return cls(
            model,
            train_dataset,
            _ReadAsItIs(),
            params_to_freeze=params_to_freeze,
            cuda_device=cuda_device,
            lissa_batch_size=lissa_batch_size,
            damping=damping,
            num_samples=num_samples,
            recursion_depth=recursion_depth,
            scale=scale,
            loss_fn=loss_fn,
            collate_fn=collate_fn,
            ridge=ridge,
            solver=solver,
            rtol=rtol,
            seed=seed,
            compat=compat,
            progress=progress,
            score_batch_size=score_batch_size,
            max_memory=max_memory,
            measure_residual=measure_residual,
        )

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
        with self._session() as session:
            self._train.gather()
            choice, solve = self._solutions(session, measure_all=True)
            if not smallest + choice.damping > 0:
                raise ValueError(
                    f"`{call}(smallest=...)` must have smallest + damping > 0, got {smallest:g} + {choice.damping:g}."
                )
            size = max(1, self._vectors_at_once(session) // (1 + self.settings.num_samples))
            for start in range(0, len(tests), size):
                chosen = range(start, min(start + size, len(tests)))
                losses, vectors = session.gradients("test", tests, chosen)
                bars = error_bars(
                    session, self._train, vectors, solve(vectors), damping=choice.damping, smallest=smallest,
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

    def self_influence(self) -> Tensor:
        """See `InfluenceInterpreter.self_influence`; with `solver="gauss-newton"`, all are solved for at once."""
        if self.settings.solver != gauss_newton.NAME:
            return super().self_influence()
        with self._session() as session:
            found = gauss_newton.influence(session, self._train, None, damping=self.settings.damping)
            self._solved_by_gauss_newton(session, found)
            return found.self_influence.to(next(iter(session.model.params.values())).dtype).cpu()

    # ------------------------------------------------------------------ the solve

    def _scored(self, session: Session, tests: Rows) -> Iterator[tuple[Tensor, Iterator[tuple[list[int], Tensor]]]]:
        if self.settings.solver != gauss_newton.NAME or not len(tests):
            yield from super()._scored(session, tests)
            return
        losses = session.losses("test", tests, range(len(tests)))
        found = gauss_newton.influence(session, self._train, tests, damping=self.settings.damping)
        self._solved_by_gauss_newton(session, found)
        dtype = next(iter(session.model.params.values())).dtype
        yield torch.tensor(list(losses.values())), iter([(list(range(len(self._train))), found.scores.to(dtype))])

    def _solved_by_gauss_newton(self, session: Session, found: DualInfluence) -> None:
        unknown = torch.full_like(found.cosine, torch.nan).cpu()
        self._parts = [
            Diagnostics(
                solver=gauss_newton.NAME,
                damping=found.damping,
                scale=math.nan,
                steps=1,
                num_samples=1,
                examples=len(self._train),
                batch_size=len(self._train),
                status=torch.full_like(unknown, Status.CONVERGED, dtype=torch.long),
                relative_residual=found.relative_residual.cpu(),
                cosine_with_gradient=found.cosine.cpu(),
                correlation_with_plain=unknown,
                largest_eigenvalue=math.nan,
            )
        ]
        self._close(session)

    def _solver(self, session: Session) -> Solve:
        _, solve = self._solutions(session, measure_all=bool(self._measure_residual))
        return lambda vectors: solve(vectors).value

    def _solutions(self, session: Session, *, measure_all: bool) -> tuple[Choice, Callable[[Params], Solution]]:
        """How it is solved, and the function that does: K stacked gradients to K judged solutions."""
        self._parts = []
        if self.settings.solver == gauss_newton.NAME:
            raise ValueError(
                f"`SimpleInfluence(solver={gauss_newton.NAME!r})` finds scores without the solutions behind them: use "
                "`interpret`, `scores` or `self_influence`, or another solver."
            )
        choice = solving.choose(session, self._train, self.settings, seed=self._seed)
        if choice.plan is None and choice.solver == "lissa":
            solve_all = self._by_recursion(session, choice, measure_all)
        else:
            solve_all = solving.on_all_data(
                session,
                self._train,
                choice,
                size=session.rows_at_once(self._train, VECTORS),
                rtol=self.settings.rtol,
                seed=self._seed,
            )

        def solve(vectors: Params) -> Solution:
            solution = solve_all(vectors)
            worst = Status(int(solution.status.max()))
            if worst is Status.NOT_FINITE:
                session.first_not_finite("training", self._train)
            if worst.failed:
                raise SolverError(report.failure_advice(worst, choice.solver, choice.damping, choice.scale), solution)
            self._parts.append(self._judge(session, choice, vectors, solution))
            return solution

        return choice, solve

    def _by_recursion(self, session: Session, choice: Choice, measure_all: bool) -> Callable[[Params], Solution]:
        """AllenNLP's way: LiSSA on the next batches, the mean over runs, the last iterate of each."""
        steps_alike = choice.steps if self._train.gathered else 0
        solve_each = strategies.inverse_products(session.model, choice.damping, choice.scale, steps_alike=steps_alike)
        drawn = None if self._compat else self._draw(choice.steps)
        at_work: list[int] = []

        def solve(vectors: Params) -> Solution:
            runs = self._draw(choice.steps) if drawn is None else drawn
            with session.naming("training", self._train, at_work):
                solutions = [solve_each(vectors, partial(self._batches, session, run, at_work)) for run in runs]
            samples, value = {}, solutions[0].value
            if len(runs) > 1:
                samples = tree.map(lambda *t: torch.stack(t, 1), *(solution.value for solution in solutions))
                value = tree.map(lambda t: t.mean(1), samples)
            status = torch.stack([solution.status for solution in solutions]).amax(0)
            residual = torch.full_like(solutions[0].relative_residual, torch.nan)
            if measure_all or self._measure_residual is not False:
                residual = measurements.relative_residuals(
                    session, self._train, choice.damping, vectors, value,
                    count=len(residual) if measure_all else self._worth_measuring(len(residual), choice.steps),
                )  # fmt: skip
            return solutions[0]._replace(value=value, status=status, relative_residual=residual, samples=samples)

        return solve

    def _worth_measuring(self, vectors: int, steps: int) -> int:
        """How many residuals: those whose products cost at most a quarter of the solve's, one at least; see class."""
        multiplied = vectors * steps * self.settings.batch_size * self.settings.num_samples
        return min(vectors, max(1, multiplied // (4 * len(self._train))))

    def _draw(self, steps: int) -> list[list[list[int]]]:
        """The batches of each run, as indices: the next ones of passes that go on from call to call."""
        return [list(itertools.islice(self._stream, steps)) for _ in range(self.settings.num_samples)]

    def _batches(self, session: Session, run: list[list[int]], at_work: list[int]) -> Iterator[Any]:
        """The batches of a run; `at_work` holds the indices of the latest, so that an error can be traced to it."""
        for indices in progress.bar(run, description="LiSSA", show=self.progress):
            at_work[:] = indices
            yield session.batch(self._train, indices)

    # ------------------------------------------------------------------ what it is worth

    def _judge(self, session: Session, choice: Choice, vectors: Params, solution: Solution) -> Diagnostics:
        cosine = measurements.cosines(vectors, solution.value)
        correlation = torch.full_like(cosine, torch.nan, dtype=torch.float64)
        plain = (cosine >= report.PLAIN_GRADIENT).nonzero()[:MOST_CORRELATED, 0]
        if len(plain):
            v, x = (tree.map(lambda t: t[plain], stack) for stack in (vectors, solution.value))
            correlation[plain] = measurements.correlations(session, self._train, v, x, seed=self._seed)
        return Diagnostics(
            solver=choice.solver,
            damping=choice.damping,
            scale=choice.scale,
            steps=int(solution.steps.max()),
            num_samples=self.settings.num_samples,
            examples=len(self._train),
            batch_size=choice.batch_size,
            status=solution.status.cpu(),
            relative_residual=solution.relative_residual.cpu(),
            cosine_with_gradient=cosine.cpu(),
            correlation_with_plain=correlation.cpu(),
            largest_eigenvalue=math.nan,
        )

    def _close(self, session: Session) -> None:
        found = report.joined(self._parts)
        if found.problems():
            largest = measurements.largest_eigenvalue(session, self._train, seed=self._seed)
            found = found._replace(largest_eigenvalue=largest)
            warnings.warn(" ".join(found.problems()), InfluenceWarning, stacklevel=2)
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

    def _train_scores(self, session: Session, ihvps: Params) -> Iterator[tuple[list[int], Tensor]]:
        if self._compat_instances is None:
            yield from super()._train_scores(session, ihvps)
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
