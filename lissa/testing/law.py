"""What a law is, and the error that says it is broken: which law, on which problem, got, expected, likely cause.

Knows Hypothesis, which looks for the smallest case that breaks a law; knows nothing of products, solvers or scores.
"""

import functools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, Verbosity, configuration, strategies
from torch import Tensor

from lissa import checks, tree
from lissa.testing.environment import global_state_kept
from lissa.types import Params

MAX_SHRINKS = 100
"""Cases tried for a smaller one once a law is broken: it bounds the time at little cost in size."""


class LawBroken(AssertionError):  # noqa: N818  (an assertion, named for what it asserts)
    """A law does not hold for the implementation under test.

    Attributes:
        law: Name of the law.
        got: What the implementation gave.
        expected: What the law asks for.
        cause: The likely cause, or "".
        case: The problem or operator; its `repr` is runnable code.
        reason: The comparison in words.
    """

    def __init__(
        self,
        law: Callable[..., None],
        reason: str,
        *,
        got: Any = None,
        expected: Any = None,
        cause: str = "",
        case: Any,
    ):
        self.law, self.reason, self.cause, self.case = law_name(law), reason, cause, case
        self.got, self.expected = got, expected
        super().__init__(self._message(law))

    def _message(self, law: Callable[..., None]) -> str:
        lines = [f"law broken: {self.law}", f"  {self.reason}"]
        if self.got is not None:
            lines.append(f"  got:      {_show(self.got)}")
        if self.expected is not None:
            lines.append(f"  expected: {_show(self.expected)}")
        if self.cause:
            lines.append(f"  likely cause: {self.cause}")
        family, maker = law.__module__.rpartition(".")[2], repr(self.case).partition("(")[0]
        lines += [
            "  the case, as code:",
            "    import torch",
            f"    from lissa.testing import {family}, {maker}",
            f"    {family}.{law.__name__}(YOUR_FUNCTION, {self.case!r})",
        ]
        return "\n".join(lines)


class Law(NamedTuple):
    """A named law: a plain function and where its cases come from. `str(law)` is its name, for pytest's `ids=str`.

    Attributes:
        name: In words.
        holds: `holds(implementation, case)` raises `LawBroken` if the law is broken on this case.
        cases: A Hypothesis strategy. A case with a `maker` is built anew by it for each implementation.
    """

    name: str
    holds: Callable[[Any, Any], None]
    cases: strategies.SearchStrategy

    def __str__(self) -> str:
        return self.name

    def check(self, implementation: Any, *, max_examples: int = 100, seed: int = 0) -> None:
        """Looks for a case that breaks the law, shrinks it and raises its `LawBroken`; returns None if none is found.

        Args:
            implementation: The function under test.
            max_examples: Cases to try.
            seed: The same seed tries the same cases.
        """
        checks.count("Law.check", "max_examples", max_examples)
        _require_callable(implementation)
        kept: set[str] = set()
        for make in _makers(self.cases, max_examples, seed):
            case = make()
            try:
                self.on(implementation, case)
            except LawBroken as error:
                smallest = self._smallest(implementation, kept, {repr(case): error}, max_examples, seed)
                raise (smallest or error).with_traceback(None) from None
            kept.add(repr(case))

    def on(self, implementation: Any, case: Any) -> None:
        """The law on one case; whatever the implementation does to global states is undone."""
        with global_state_kept():
            self.holds(implementation, case)

    def _smallest(
        self, implementation: Any, kept: set[str], broken: dict[str, LawBroken], max_examples: int, seed: int
    ) -> LawBroken | None:
        """The error of the smallest case that Hypothesis finds from the one in `broken`; no case is tried twice."""
        tried = 0

        def holds(case: Any) -> None:
            nonlocal tried
            name = repr(case)
            if name in kept:
                return
            if name not in broken:
                tried += 1
                if tried > MAX_SHRINKS:
                    return
                try:
                    self.on(implementation, case)
                except LawBroken as error:
                    broken[name] = error
                else:
                    kept.add(name)
            if name in broken:
                raise broken[name]

        try:
            _search(holds, self.cases, max_examples, seed)
        except LawBroken as error:
            return error
        return None


class Checked(NamedTuple):
    """What a check that found nothing looked at.

    Attributes:
        laws: Names of the laws that held.
        max_examples: Cases tried for each.
    """

    laws: tuple[str, ...]
    max_examples: int


def check_laws(laws: tuple[Law, ...], implementation: Any, *, case: Any, max_examples: int, seed: int) -> Checked:
    """All `laws` in turn, stopping at the first that is broken; on `case` alone if it is given."""
    for law in laws:
        if case is None:
            law.check(implementation, max_examples=max_examples, seed=seed)
        else:
            law.on(implementation, case)
    return Checked(tuple(law.name for law in laws), max_examples if case is None else 1)


def law_name(law: Callable[..., None]) -> str:
    """`difference_of_gradients` -> `"difference of gradients"`."""
    return law.__name__.replace("_", " ")


def require_close(
    law: Callable[..., None],
    got: Params,
    expected: Params,
    tolerance: float,
    *,
    what: str,
    case: Any,
    cause: Callable[[], str] = lambda: "",
) -> None:
    """`|got - expected| <= tolerance`, or `LawBroken`."""
    distance = torch.linalg.vector_norm(tree.flatten(got).double() - tree.flatten(expected).double())
    if not distance <= tolerance:  # also if it is NaN
        raise LawBroken(
            law,
            f"{what}: they differ by {float(distance):.3g}, rounding explains {tolerance:.3g}",
            got=got,
            expected=expected,
            cause=cause(),
            case=case,
        )


def run(law: Callable[..., None], case: Any, fn: Callable[[], Any]) -> Any:
    """`fn()`, where an exception of the implementation's breaks the law."""
    try:
        return fn()
    except LawBroken:
        raise
    except Exception as error:
        cause = _cause_of_exception(law, error, case)
        reason = f"the implementation raised {type(error).__name__}: {error}"
        raise LawBroken(law, reason, got=type(error).__name__, expected="a result", cause=cause, case=case) from error
    except BaseException as error:  # Ctrl-C, where the implementation does not come back
        if hasattr(error, "add_note"):  # from Python 3.11
            error.add_note(  # type: ignore
                f"in the implementation, called by the law '{law_name(law)}' on {case!r}"
            )
        raise


def _cause_of_exception(law: Callable[..., None], error: Exception, case: Any) -> str:
    message = str(error)
    if isinstance(error, TypeError) and "argument" in message and "()" in message:
        return f"another signature: `lissa.testing.{law.__module__.rpartition('.')[2]}` says how it is called"
    if "does not require grad" in message or "not have been used in the graph" in message:
        return (
            "a parameter that the loss does not use, or is linear in, has no second derivative to follow: its row of "
            "the curvature is zero. Pass materialize_grads=True, and skip gradients that do not require grad"
        )
    if "modified by an inplace operation" in message:
        return "an argument or an intermediate result is changed in place"
    if getattr(case, "batch_size", 1) == 0:
        return "a batch of no example, whose loss is 0: divide by max(B, 1); or pass min_batch_size=1 if it is illegal"
    if "must match the size" in message or "shape" in message or "dtype" in message:
        return "a shape or a dtype is taken for granted: look at scalars, batches of size 0 and 1, and float32"
    return ""


def _require_callable(implementation: Any) -> None:
    if not callable(implementation):
        raise TypeError(f"The implementation under test must be callable, got {type(implementation).__name__}.")


@functools.lru_cache(maxsize=32)
def _makers(cases: strategies.SearchStrategy, max_examples: int, seed: int) -> list[Callable[[], Any]]:
    """What builds the cases that Hypothesis tries while none breaks a law: the same for every law and implementation.

    Drawing a case takes longer than most laws do. Each user gets cases of its own, so that code under test which
    changes its arguments spoils none but its own.
    """
    makers: list[Callable[[], Any]] = []

    def keep(case: Any) -> None:
        makers.append(getattr(case, "maker", lambda: case))

    _search(keep, cases, max_examples, seed)
    return makers


def _search(holds: Callable[[Any], None], cases: Any, max_examples: int, seed: int) -> None:
    """Runs Hypothesis, silent, without its database and without explanations, which would run each case again."""
    search = hypothesis.given(cases)(holds)
    search = hypothesis.seed(seed)(search)
    settings = hypothesis.settings(
        max_examples=max_examples,
        database=None,
        deadline=None,
        derandomize=False,
        print_blob=False,
        report_multiple_bugs=False,
        verbosity=Verbosity.quiet,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),  # type: ignore  (its iterator leaves out deprecated members)
    )
    with _nothing_written():
        settings(search)()


@contextmanager
def _nothing_written() -> Iterator[None]:
    """Points Hypothesis' home, where it keeps caches, to a directory that vanishes."""
    home = configuration.storage_directory("constants", intent_to_write=False).home_directory
    with tempfile.TemporaryDirectory() as directory:
        configuration.set_hypothesis_home_dir(directory)
        try:
            yield
        finally:
            configuration.set_hypothesis_home_dir(home)


def _show(value: Any) -> str:
    if isinstance(value, dict) and all(isinstance(t, Tensor) for t in value.values()):
        return "{" + ", ".join(f"{k!r}: {_numbers(t)}" for k, t in value.items()) + "}"
    return _numbers(value) if isinstance(value, Tensor) else str(value)


def _numbers(t: Tensor) -> str:
    t = t.detach()
    if t.numel() > 24:
        return f"tensor of shape {tuple(t.shape)}, length {float(torch.linalg.vector_norm(t.double())):.6g}"
    return str(_rounded(t.tolist()))


def _rounded(value: Any) -> Any:
    return [_rounded(v) for v in value] if isinstance(value, list) else float(f"{value:.6g}")
