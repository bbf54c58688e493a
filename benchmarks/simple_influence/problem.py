"""What is solved for, as plain data and functions that all tools can start from, and how a run of one is recorded.

Knows models, right-hand sides and processes; knows no tool.
"""

import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lissa import Params, ggnvp, per_example_gradients, solve_block_cg, solve_cg, take, traced, tree

AIM, TESTS = 1e-2, 100
AGREEMENT = 1e-3
"""Between block CG and CG, both to a residual of 1e-5: their errors are at most kappa = 200 times as large."""

T = TypeVar("T")


class Run(NamedTuple):
    """A tool at one setting.

    Attributes:
        setting: In words.
        warm_up: Processor seconds of what only the first call costs; or those of the first product.
        seconds: Processor seconds for all right-hand sides.
        error: The largest relative error of those that were solved for.
        timed: Right-hand sides that were; `seconds` are in proportion.
    """

    setting: str
    warm_up: float
    seconds: float
    error: float
    timed: int

    def in_words(self) -> str:
        return f"{self.setting}: {self.seconds:.2f} s (warm-up {self.warm_up:.2f} s), error {self.error:.1e}"


class Problem(NamedTuple):
    """A model, its data, the right-hand sides `rhs` and their solutions `right`, both of shape `(TESTS, P)`."""

    name: str
    model: nn.Module
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    damping: float
    rhs: Tensor
    right: Tensor

    @property
    def params(self) -> Params:
        return {k: p.detach() for k, p in self.model.named_parameters()}

    def unflatten(self, flat: Tensor) -> Params:
        return tree.unflatten(flat, self.params)

    def output_fn(self, params: Params, batch: Any) -> Tensor:
        return functional_call(self.model, params, (batch[0],))

    def example_loss_fn(self, params: Params, batch: Any) -> Tensor:
        return F.cross_entropy(self.output_fn(params, batch), batch[1], reduction="none")

    def matvec(self, batch: Any, v: Params) -> Params:
        """The Gauss-Newton product; for softmax regression that is the Hessian's."""
        return ggnvp(self.output_fn, lambda z, batch: F.cross_entropy(z, batch[1]), self.params, batch, v)

    def error(self, x: Tensor) -> float:
        """The largest relative error of the solutions `x`, shape `(K, P)`, of the first K right-hand sides."""
        right = self.right[: len(x)]
        return float(((x - right).norm(dim=1) / right.norm(dim=1)).nan_to_num(nan=torch.inf).max())


def with_answers(name: str, model: nn.Module, train: Any, test: Any, damping: float) -> Problem:
    """The problem with its right-hand sides and their solutions, which two solvers agree on."""
    test = take(test, slice(0, TESTS))
    problem = Problem(name, model, train, test, damping, torch.empty(0), torch.empty(0))
    vectors = per_example_gradients(problem.example_loss_fn, problem.params, test)
    product = partial(traced(problem.matvec), train)
    answers = solve_block_cg(torch.vmap(product), vectors, damping=damping, rtol=1e-5).value
    one = tree.map(lambda t: t[0], vectors)
    check = solve_cg(product, one, damping=damping, rtol=1e-5).value
    gap = tree.norm(tree.sub(check, tree.map(lambda t: t[0], answers))) / tree.norm(check)
    if not gap <= AGREEMENT:
        raise SystemExit(f"{name}: CG and block CG differ by {float(gap):.1e}: nothing is measured.")
    return problem._replace(rhs=torch.vmap(tree.flatten)(vectors), right=torch.vmap(tree.flatten)(answers))


def timed(call: Callable[[], T]) -> tuple[float, T]:
    """Processor seconds and the result."""
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


@contextmanager
def memory() -> Iterator[list[int]]:
    """After the block, its first entry is how many bytes this process held at most above what it held before."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before, peak = _status("VmRSS"), [0]
    yield peak
    peak[0] = max(0, _status("VmHWM") - before)


def alone(measure: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """`measure(*arguments)` in a process of its own, of one thread; where it fails, in which words."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_quiet) as executor:
        try:
            return executor.submit(measure, *arguments).result()
        except Exception as failure:  # a peer's own, or that it is missing
            return {"failure": f"{type(failure).__name__}: {str(failure)[:150]}"}


def _quiet() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))
