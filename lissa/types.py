"""The vocabulary of the library: what a parameter dict, a batch, a loss, a product and a solution are.

Knows nothing of algorithms. Every other module may import this one.
"""

import enum
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

Params: TypeAlias = dict[str, Tensor]
"""Named tensors, as `torch.func.functional_call` takes them. Vectors have the same keys and shapes.

Detach them, `{k: p.detach() for k, p in model.named_parameters()}`: products of parameters that require grad are
differentiable, and a solver that makes a thousand of them would keep the graph of all."""

Batch: TypeAlias = Any
"""Any object; only the loss looks inside."""

LossFn: TypeAlias = Callable[[Params, Batch], Tensor]
"""`loss_fn(params, batch) -> ()`, the MEAN over the batch."""

ExampleLossFn: TypeAlias = Callable[[Params, Batch], Tensor]
"""`example_loss_fn(params, batch) -> (B,)`, one loss per example."""

OutputFn: TypeAlias = Callable[[Params, Batch], Tensor]
"""`output_fn(params, batch) -> outputs`, a tensor that the output loss turns into the mean loss."""

OutputLossFn: TypeAlias = Callable[[Tensor, Batch], Tensor]
"""`output_loss_fn(outputs, batch) -> ()`, the mean loss as a function of the outputs alone."""

BatchMatvec: TypeAlias = Callable[[Batch, Params], Params]
"""`matvec(batch, v) -> H_batch v`, for instance `partial(hvp, loss_fn, params)`."""

Matvec: TypeAlias = Callable[[Params], Params]
"""`matvec(v) -> H v`, for instance `partial(hvp, loss_fn, params, batch)`."""


class Status(enum.IntEnum):
    """How a solve ended. Stored in `Solution.status` as an integer tensor, so that it survives `vmap`."""

    FINISHED = 0
    CONVERGED = 1
    DIVERGED = 2
    NOT_FINITE = 3
    INDEFINITE = 4

    @property
    def failed(self) -> bool:
        """Whether the solution holds no usable value."""
        return self >= Status.DIVERGED

    @property
    def explanation(self) -> str:
        """What happened, why, and what to do about it."""
        return _EXPLANATIONS[self]


_EXPLANATIONS = {
    Status.FINISHED: (
        "All requested steps were taken. This says nothing of accuracy: "
        "compare `relative_residual` with the accuracy you need; an `rtol`, if there was one, was not reached."
    ),
    Status.CONVERGED: "The relative residual fell to `rtol`.",
    Status.DIVERGED: (
        "The iterates grow instead of settling. Either `scale` is too small: it must exceed "
        "(lambda_max + damping + trace / batch_size) / 2, with the eigenvalues of the curvature matrix; "
        "or the matrix plus damping has a negative eigenvalue: then raise `damping` above the most negative one, "
        "or use the Gauss-Newton product (ggnvp), which has none."
    ),
    Status.NOT_FINITE: (
        "A product or the right-hand side holds NaN or infinity. Look for NaN in the data and the parameters, "
        "and for an operation without a finite second derivative (sqrt or norm at 0, log of 0)."
    ),
    Status.INDEFINITE: (
        "The matrix plus damping has a direction of negative or no curvature, so the system is not positive definite. "
        "Raise `damping` above minus the smallest eigenvalue (see `estimate_spectrum`), use the Gauss-Newton product "
        "(ggnvp), which has no negative one, or use solve_minres or solve_dense, which need none of this."
    ),
}


class Solution(NamedTuple):
    """`x ~ (H + damping I)^-1 v` and what is known about it. Tensors only, so it survives vmap, save and pickle.

    Attributes:
        value: The solution `x`, shaped like `v`. All NaN where `status` says that the solve failed.
        status: A `Status` as an integer tensor, shape `()`.
        residual_norm: `|v - (H + damping I) x|`, in the units of `v`, shape `()`. The solver's docstring says on
            which data.
        relative_residual: `residual_norm / |v|`; 0 if `v` is 0.
        steps: Number of steps taken, shape `()`.
        residual_trace: The residual norm that the solver saw at each step, shape `(T,)`; NaN after the right-hand side
            has ended. The solver's docstring says on which data.
        standard_error: Length of the standard error of `value`, `sqrt(sum_j Var(x_j) / R)`, from R independent
            repeats, shape `()`. NaN if there was one repeat; 0 for a solver without randomness.
        samples: The R repeats' solutions, stacked; `value` is their mean. Empty if there was one repeat.
            `lissa.uncertainty` turns them into the standard errors of scores.
        state: From where the same call goes on, if the solver can; else empty.
    """

    value: Params
    status: Tensor
    residual_norm: Tensor
    relative_residual: Tensor
    steps: Tensor
    residual_trace: Tensor
    standard_error: Tensor
    samples: Params
    state: Any


class SolverError(RuntimeError):
    """A solve failed and `throw=True`. The message names cause and remedy; `solution` holds the data."""

    def __init__(self, message: str, solution: Solution):
        super().__init__(message)
        self.solution = solution
