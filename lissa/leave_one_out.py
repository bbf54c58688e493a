"""Scores of single examples with their own curvature taken out: what a retraining without them does.

Knows losses, products and `solve_tuned`; knows nothing of how a product comes about.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import grad

from lissa import checks, sampling, tree
from lissa.tuned import choose_settings, solve_tuned
from lissa.tuning import Settings
from lissa.types import Batch, BatchMatvec, ExampleLossFn, Params


def leave_one_out_scores(
    matvec: BatchMatvec,
    example_loss_fn: ExampleLossFn,
    params: Params,
    test_gradient: Params,
    data: Batch,
    chosen: Sequence[int] | Tensor,
    *,
    damping: float,
    generator: torch.Generator,
    rtol: float = 1e-2,
    settings: Settings | None = None,
) -> Tensor:
    """`score_i = + grad_i . (H - H_i / n + damping I)^-1 grad_test`, for the chosen examples i of n.

    `H - H_i / n` is the Hessian that is left when example i is removed, so this is one Newton step of retraining
    without i, where `influence_scores` keep `H`. The two differ by the leverage of i: nothing for most examples, a
    tenth and more for those that come out on top. The cost is one solve for each chosen example, so rank by
    `influence_scores` and call this for the examples that matter.

    Args:
        matvec: As in `solve_tuned`.
        example_loss_fn: `example_loss_fn(params, batch) -> (B,)`, the loss of each example; `matvec` is that of its
            mean.
        params: Where the derivatives are taken: a minimum of the mean loss plus `damping / 2 |params|^2`.
        test_gradient: Of the test loss, shaped like `params`, or K of them stacked.
        data: As in `solve_tuned`: all n training examples.
        chosen: Their places in `data`.
        damping: In the units of `H`.
        generator: As in `solve_tuned`.
        rtol: The relative residual of each solve.
        settings: From `choose_settings`, for all solves; the default chooses once.

    Returns:
        Scores of shape `(len(chosen),)`, or `(K, len(chosen))`. Positive = helpful: removing example i from the sum
        raises the test loss by about `score_i / n`, the penalty staying as it is.

    Raises:
        ValueError: If there are fewer than two examples, a place is not in `[0, n)`, or as `solve_tuned` does.
        SolverError: If a solve failed.

    Example:
        >>> x, y = torch.tensor([[1.0], [1.0], [2.0]]), torch.tensor([1.0, 2.0, 2.0])
        >>> def losses(params, batch):
        ...     return (batch[0] @ params["w"] - batch[1]).square() / 2
        >>> def matvec(batch, v):
        ...     return {"w": batch[0].T @ (batch[0] @ v["w"]) / len(batch[1])}
        >>> params, test_gradient = {"w": torch.tensor([7 / 6])}, {"w": torch.tensor([1.0])}  # the least squares
        >>> leave_one_out_scores(matvec, losses, params, test_gradient, (x, y), [2],
        ...                      damping=0.0, generator=torch.Generator().manual_seed(0)) / 3
        tensor([0.3333])

    Without the third example, w = 1.5 = 7/6 + 1/3.

    Source: D. Pregibon, Logistic regression diagnostics, Annals of Statistics 9 (1981), section 4; P. W. Koh et al., On
    the accuracy of influence functions for measuring group effects, NeurIPS 2019, section 2.
    """
    call = "leave_one_out_scores"
    checks.point(call, params)
    stacked = checks.is_stacked(call, params, test_gradient, "test_gradient")
    n = sampling.batch_length(call, data, "data")
    places = _places(call, chosen, n)
    # The mean Hessian of the others is (H - H_i / n) n / (n - 1): damping and solution take that factor too.
    factor = n / (n - 1)
    raised = damping * factor
    settings = settings or choose_settings(matvec, params, data, damping=raised, generator=generator, rtol=rtol)
    settings = settings._replace(damping=raised, rtol=rtol)

    def score(i: int) -> Tensor:
        gradient = grad(lambda p: example_loss_fn(p, sampling.take(data, slice(i, i + 1))).sum())(params)
        others = torch.cat([torch.arange(i), torch.arange(i + 1, n)])
        step = solve_tuned(
            matvec, gradient, sampling.take(data, others),
            damping=raised, generator=generator, rtol=rtol, settings=settings,
        ).value  # fmt: skip
        dot = torch.vmap(tree.vdot, in_dims=(0, None)) if stacked else tree.vdot
        return factor * dot(test_gradient, step)

    return torch.stack([score(i) for i in places], -1)


def _places(call: str, chosen: Sequence[int] | Tensor, n: int) -> list[int]:
    if n < 2:
        raise ValueError(f"`{call}(data=...)` must hold at least 2 examples, got {n}.")
    places = [int(i) for i in chosen]
    wrong = [i for i in places if not 0 <= i < n]
    if wrong or not places:
        raise ValueError(f"`{call}(chosen=...)` must hold places in [0, {n}), got {wrong or 'none'}.")
    return places
