"""The laws of influence scores. Each is a plain function `law(scores, problem)`.

The function under test is called as `scores(example_loss_fn, params, ihvp, batch)` and returns `(B,)`: the score
`+ grad_i . ihvp` of each example, positive = helpful, not divided by n. Here `ihvp` is `problem.v` unless a law says
otherwise; `tol` is `oracles.score_tolerance`: how far rounding may take honest scores.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lissa import tree
from lissa.testing.environment import first_change, nothing_global_changes, seeded
from lissa.testing.law import LawBroken, require_close, run
from lissa.testing.oracles import dense_curvature, example_gradients, score_tolerance
from lissa.testing.problems import Problem
from lissa.types import Params

Scores = Callable[..., Tensor]


def form(scores: Scores, problem: Problem) -> None:
    """Scores have shape `(B,)` and the dtype of the parameters, and are finite: exact."""
    _apply(form, scores, problem, problem.v)


def purity(scores: Scores, problem: Problem) -> None:
    """A call changes nothing: not its arguments, no `.grad`, no grad mode, no global random state. Exact."""
    params = tree.map(lambda t: t.clone().requires_grad_(), problem.params)
    ihvp, batch = (tree.map(torch.clone, x) for x in (problem.v, problem.batch))

    def broken(what: str, cause: str) -> LawBroken:
        return LawBroken(purity, f"the call changed {what}", cause=cause, case=problem)

    with nothing_global_changes(broken):
        _apply(purity, scores, problem._replace(params=params, batch=batch), ihvp)
    for name, now, then in (
        ("params", params, problem.params),
        ("ihvp", ihvp, problem.v),
        ("batch", batch, problem.batch),
    ):
        if (change := first_change(now, then)) is not None:
            raise broken(f"{name}: {change}", "an argument is updated in place: copy it first")
    if any(t.grad is not None or not t.requires_grad for t in params.values()):
        raise broken("a parameter's .grad or requires_grad", "use torch.autograd.grad on detached copies")


def determinism(scores: Scores, problem: Problem) -> None:
    """The same call gives the same bits, whatever the global random state: exact."""
    with seeded(1):
        one = _apply(determinism, scores, problem, problem.v)
    with seeded(2):
        two = _apply(determinism, scores, problem, problem.v)
    if not torch.equal(one, two):
        cause = "global random numbers are used: dropout left on, a random projection; or state is kept"
        raise LawBroken(determinism, "two equal calls differ", got=two, expected=one, cause=cause, case=problem)


def sign(scores: Scores, problem: Problem) -> None:
    """An example helps itself: `score_i = g_i . M g_i >= 0` for `ihvp = M g_i` with M definite, within tol.

    M is `(F + I)^-1` with F the Fisher matrix of the batch, and i the example with the longest gradient.
    """
    gradients = example_gradients(problem)
    if not len(gradients):
        return
    i = int(gradients.norm(dim=1).argmax())
    fisher = dense_curvature(problem._replace(curvature="fisher"))
    flat = torch.linalg.solve(fisher + torch.eye(len(fisher), dtype=fisher.dtype), gradients[i])
    ihvp = tree.unflatten(flat.to(problem.dtype), problem.params)
    score = float(_apply(sign, scores, problem, ihvp)[i])
    if not score >= -score_tolerance(problem, ihvp):
        raise LawBroken(
            sign,
            f"example {i} scores {score:.3g} < 0 for its own gradient",
            expected=float(gradients[i] @ flat),
            got=score,
            cause="the sign: positive must mean helpful, score = + grad . ihvp",
            case=problem,
        )


def linearity(scores: Scores, problem: Problem) -> None:
    """Scores are linear in `ihvp`: `s(2 u - v/2) = 2 s(u) - s(v)/2`, within tol of each; `s(0) = 0` exactly."""
    u, v = problem.u, problem.v
    w = tree.add_scaled(tree.scale(2.0, u), -0.5, v)
    s_u, s_v, s_w = (_apply(linearity, scores, problem, x).double() for x in (u, v, w))
    tolerance = score_tolerance(problem, w) + 2 * score_tolerance(problem, u) + score_tolerance(problem, v) / 2
    _require(
        linearity,
        s_w,
        2 * s_u - s_v / 2,
        tolerance,
        "scores are not linear in ihvp",
        problem,
        "scores are normalised or clipped",
    )
    zero = _apply(linearity, scores, problem, tree.zeros_like(v))
    _require(
        linearity, zero, torch.zeros_like(zero), 0.0, "scores of ihvp = 0 are not 0", problem, "0/0, or an added term"
    )


def example_order(scores: Scores, problem: Problem) -> None:
    """Turning the order of the examples turns that of their scores: within 2 tol, as sums may be ordered otherwise."""
    expected = _apply(example_order, scores, problem, problem.v).flip(0)
    turned = problem._replace(batch=problem.rows(torch.arange(problem.batch_size).flip(0)))
    got = _apply(example_order, scores, turned, problem.v)
    cause = "scores are sorted, or an example's score depends on its neighbours (batch statistics, shared noise)"
    _require(
        example_order,
        got,
        expected,
        2 * score_tolerance(problem, problem.v),
        "turning the examples does not turn the scores",
        problem,
        cause,
    )


def batching(scores: Scores, problem: Problem) -> None:
    """An example's score does not depend on the batch it is in: scores in ragged parts are those of the whole.

    Within 2 tol, as sums may be ordered otherwise.
    """
    B = problem.batch_size
    k = (B + 2) // 3
    if not 0 < k < B:
        return
    whole = _apply(batching, scores, problem, problem.v)
    parts = [
        _apply(batching, scores, problem._replace(batch=problem.rows(rows)), problem.v)
        for rows in (slice(k), slice(k, B))
    ]
    cause = "the score of an example is divided by the batch size, or depends on the rest of its batch"
    _require(
        batching,
        torch.cat(parts),
        whole,
        2 * score_tolerance(problem, problem.v),
        f"scores in batches of {k} and {B - k} are not those of the whole",
        problem,
        cause,
    )


def dense_agreement(scores: Scores, problem: Problem) -> None:
    """`scores = G ihvp` with G the dense example gradients in float64, shape `(B, P)`: within tol."""
    got = _apply(dense_agreement, scores, problem, problem.v)
    expected = example_gradients(problem) @ tree.flatten(problem.v).double()
    _require(
        dense_agreement,
        got,
        expected,
        score_tolerance(problem, problem.v),
        "scores are not the example gradients times ihvp",
        problem,
        _cause(problem, got.double(), expected),
    )


def leave_one_out(scores: Scores, problem: Problem) -> None:
    """`score_i / n` predicts how the test loss changes when example i is removed and the model is fitted again.

    On ridge regression, with mean loss `L = sum_i l_i / n + |w|^2 / 2`, `A = mean_i x_i x_i^T + I` and
    `ihvp = A^-1 grad l_test`, removing example i (and keeping 1/n) moves w by `d_i = A^-1 g_i / (n (1 - h_i))`, with
    leverage `h_i = x_i A^-1 x_i / n`, and the test loss by exactly `s_i / (n (1 - h_i)) + (x_test d_i)^2 / 2`. So n
    times the change misses the score by `|s_i| h_i / (1 - h_i) + n (x_test d_i)^2 / 2` and no more. The fits are made;
    the formula gives the tolerance, with `1e3 P u` relative for the rounding of scores in the dtype, and, for that of
    the two test losses in float64, whose difference is far smaller than they are, of n `(|x_test| |w| + |y_test|)^2`.

    Uses the sizes and the seed of `problem` alone.
    """
    dtype, seed = problem.dtype, problem.recipe["seed"]
    n, P = 8 + 2 * problem.batch_size, problem.recipe.get("features", 1)
    g = torch.Generator().manual_seed(seed)
    X = torch.randint(-16, 17, (n + 1, P), generator=g).double() / 16
    y = torch.randint(-32, 33, (n + 1,), generator=g).double() / 16
    (X, x_test), (y, y_test) = (X[:n], X[n]), (y[:n], y[n])

    def fit(weights: Tensor) -> Tensor:
        A = (X.mT * weights) @ X / n + torch.eye(P, dtype=torch.float64)
        return torch.linalg.solve(A, X.mT @ (weights * y) / n)

    def test_loss(w: Tensor) -> Tensor:
        return (x_test @ w - y_test).square() / 2

    def example_losses(params: Params, batch: dict[str, Tensor]) -> Tensor:
        return (batch["x"] @ params["w"] - batch["y"]).square() / 2

    everyone = torch.ones(n, dtype=torch.float64)
    w = fit(everyone)
    A = X.mT @ X / n + torch.eye(P, dtype=torch.float64)
    ihvp = torch.linalg.solve(A, x_test * (x_test @ w - y_test))
    without = [fit(everyone.index_fill(0, torch.tensor([i]), 0.0)) for i in range(n)]
    changes = n * torch.stack([test_loss(w_i) - test_loss(w) for w_i in without])

    gradients = X * (X @ w - y).unsqueeze(1)
    leverage = (X * torch.linalg.solve(A, X.mT).mT).sum(1) / n
    shift = (gradients @ torch.linalg.solve(A, x_test)) / (n * (1 - leverage))
    exact = gradients @ ihvp
    u = torch.finfo(dtype).eps / 2
    rounding = 1e3 * P * u * (gradients.abs() @ ihvp.abs() + X.abs() @ ihvp.abs() * (y.abs() + (X @ w).abs()))
    size = (x_test.abs() @ w.abs() + y_test.abs()).square()
    rounding += 1e3 * P * torch.finfo(torch.float64).eps / 2 * n * size
    room = exact.abs() * leverage / (1 - leverage) + n * shift.square() / 2 + rounding

    batch = {"x": X.to(dtype), "y": y.to(dtype)}
    params, vector = {"w": w.to(dtype)}, {"w": ihvp.to(dtype)}
    got = run(leave_one_out, problem, lambda: scores(example_losses, params, vector, batch))
    if got.shape != (n,) or not bool(((got.double() - changes).abs() <= room).all()):
        ratio = float(got.double().reshape(-1)[:n] @ exact / (exact @ exact)) if got.numel() == n else float("nan")
        raise LawBroken(
            leave_one_out,
            "score_i / n is not the change of the test loss when example i is removed",
            got=got,
            expected=changes,
            cause=f"the scores are {ratio:.3g} times the right ones: a sign, or a division by n",
            case=problem,
        )


def _apply(law: Callable[..., None], scores: Scores, problem: Problem, ihvp: Params) -> Tensor:
    got = run(law, problem, lambda: scores(problem.example_loss_fn, problem.params, ihvp, problem.batch))
    shape = (problem.batch_size,)
    if not isinstance(got, Tensor) or got.shape != shape or got.dtype != problem.dtype:
        what = (tuple(got.shape), got.dtype) if isinstance(got, Tensor) else type(got).__name__
        cause = "return one score per example, in the dtype of the parameters"
        raise LawBroken(law, "another form", got=what, expected=(shape, problem.dtype), cause=cause, case=problem)
    if not got.isfinite().all():
        cause = "0/0, or an operation without a finite derivative: the exact scores are finite"
        raise LawBroken(law, "a score is not finite", got=got, cause=cause, case=problem)
    return got.detach()


def _require(
    law: Callable[..., None], got: Tensor, expected: Tensor, tolerance: float, what: str, problem: Problem, cause: str
) -> None:
    require_close(law, {"scores": got}, {"scores": expected}, tolerance, what=what, case=problem, cause=lambda: cause)


def _cause(problem: Problem, got: Tensor, expected: Tensor) -> str:
    if not expected.norm() > 0:
        return ""
    ratio = float(got @ expected / (expected @ expected))
    if (got - ratio * expected).norm() > 1e-3 * got.norm():
        return "a gradient of something else: of the mean loss, of the outputs, of masked examples, or in float32"
    if abs(ratio - 1) < 1e-3:
        return "float32 somewhere in a float64 path, or a difference quotient"
    named = {-1.0: "the sign", 1 / problem.batch_size: "divided by the batch size", 2.0: "a factor of 2"}
    return next((what for factor, what in named.items() if abs(ratio / factor - 1) < 1e-3), f"a factor of {ratio:.4g}")
