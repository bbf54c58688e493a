"""Inverse-Hessian-vector products by other people's tools, each through an adapter of a few lines and on a grid.

Tools that know Hessians alone get the model with its outputs linearised in the parameters, whose Hessian is the
Gauss-Newton matrix of the model. Knows the tools' calls; knows nothing of ours but an estimate of the spectrum, around
which the grids are laid.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.utils.data import DataLoader, TensorDataset

import lissa
from benchmarks.simple_influence.problem import AIM, TESTS, Problem, Run, timed
from lissa import tree
from tests.bridge.allennlp_standins import import_allennlp

FEW = 3
"""Right-hand sides on which a tool is timed that solves for one after the other."""

LONGEST = 60.0
"""Processor seconds for one right-hand side after which a recursion is given up."""

LOOK = 1.03
"""Recursions stop at their best step, looked for off the clock whenever their number has grown by this factor."""

Solvers = Iterator[tuple[str, Callable[[], Tensor]]]
Vectors = Sequence[Tensor]
LissaProduct = Callable[[tuple[Tensor, Tensor], Vectors], Vectors]


class Linearised(nn.Module):
    """`f(w_0) + J(w_0) (w - w_0)`, with `w_0` the parameters of `model` now."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.free = copy.deepcopy(model)
        self.at = [copy.deepcopy(model).requires_grad_(False)]  # in a list, which hides its parameters

    def forward(self, x: Tensor) -> Tensor:
        model = self.at[0]
        params = dict(model.named_parameters())
        change = {k: p - params[k] for k, p in self.free.named_parameters()}
        outputs, derivative = jvp(lambda params: functional_call(model, params, (x,)), (params,), (change,))
        return outputs + derivative


def convex(problem: Problem) -> nn.Module:
    """A model whose Hessian is the matrix in question."""
    return Linearised(problem.model) if "Gauss-Newton" in problem.name else copy.deepcopy(problem.model)


def until_reached(problem: Problem, solvers: Solvers, warm_up: float) -> Iterator[Run]:
    """Runs of solvers for all right-hand sides, from coarse to fine, up to the first that is accurate enough."""
    for setting, solve in solvers:
        seconds, x = timed(solve)
        run = Run(setting, warm_up, seconds, problem.error(x), len(x))
        yield run
        if run.error <= AIM:
            return


# ---------------------------------------------------------------------- recursions of one right-hand side


def recursion(problem: Problem, product: LissaProduct) -> Iterator[Run]:
    """`h <- v + (1 - damping / scale) h - H_t h / scale`, at each batch size and scale, stopped at its best step.

    The scales are multiples of the least at which it converges in mean square. The best is run on a few right-hand
    sides; what is slower than the best so far is given up.
    """
    full = partial(lissa.traced(problem.matvec), problem.train)
    spectrum = lissa.estimate_spectrum(full, problem.params, generator=torch.Generator().manual_seed(0))
    n, grid = len(problem.train[1]), []
    for B, factors in ((512, (2.5, 1.5, 5.0)), (n, (1.1, 1.5)), (64, (2.5, 5.0, 10.0)), (8, (5.0, 10.0))):
        bound = float(spectrum.largest + problem.damping + spectrum.trace * (1 / B - 1 / n)) / 2
        grid += [(B, factor * bound) for factor in factors]
    best, best_setting, warm_up = LONGEST, None, timed(lambda: one_step(problem, product))[0]
    for B, scale in grid:
        seconds, error, steps = one_recursion(problem, product, B, scale, 0, most=best)
        yield Run(in_words(B, scale, steps), warm_up, seconds * TESTS, error, 1)
        if error <= AIM and seconds <= best:
            best, best_setting = seconds, (B, scale)
    if best_setting:
        found = [one_recursion(problem, product, *best_setting, k, most=LONGEST) for k in range(FEW)]
        seconds, errors, steps = zip(*found, strict=True)
        yield Run(in_words(*best_setting, max(steps)), warm_up, sum(seconds) / FEW * TESTS, max(errors), FEW)


def in_words(batch_size: int, scale: float, steps: int) -> str:
    return f"batches of {batch_size}, scale {scale:.3g}, {steps} steps"


def one_step(problem: Problem, product: LissaProduct) -> Vectors:
    x, y = problem.train
    return product((x[:8], y[:8]), list(problem.params.values()))


def one_recursion(
    problem: Problem, product: LissaProduct, batch_size: int, scale: float, k: int, most: float
) -> tuple[float, float, int]:
    """Processor seconds, error and number of steps when right-hand side `k` is accurate enough, or was given up."""
    vs = list(problem.unflatten(problem.rhs[k]).values())
    right, h, c = problem.right[k], vs, problem.damping / scale
    batches = lissa.batch_stream(problem.train, batch_size, generator=torch.Generator().manual_seed(0), drop_last=True)
    whole = batch_size == len(problem.train[1])
    spent, look, least = 0.0, 1.0, math.inf
    for step in itertools.count(1):
        batch = problem.train if whole else next(batches)

        def advance(h: Vectors = h, batch: Any = batch) -> Vectors:
            products = product(batch, h)
            return [v + (1 - c) * h_k - H_h / scale for v, h_k, H_h in zip(vs, h, products, strict=True)]

        seconds, h = timed(advance)
        spent += seconds
        if step >= look:
            look = step * LOOK
            x = torch.cat([t.flatten() for t in h]) / scale
            error = float((x - right).norm() / right.norm())
            least = min(least, error)
            if error <= AIM or spent > most or not error < 1e3:
                return spent, error if error <= AIM else least, step
    raise AssertionError("the loop above has no end")


def allennlp(problem: Problem) -> Iterator[Run]:
    """Its recursion and its product, on tensors that are already batches; Gauss-Newton through the linearised model."""
    import_allennlp()
    from allennlp.interpret.influence_interpreters.simple_influence import get_hvp

    model = convex(problem)
    params = list(model.parameters())

    def product(batch: tuple[Tensor, Tensor], h: Vectors) -> Vectors:
        return get_hvp(F.cross_entropy(model(batch[0]), batch[1]), params, h)

    yield from recursion(problem, product)


def hand_written(problem: Problem) -> Iterator[Run]:
    """What tutorials have: the gradient's graph, its product with h, and the gradient of that."""
    model = copy.deepcopy(problem.model)
    params = list(model.parameters())

    def product(batch: tuple[Tensor, Tensor], h: Vectors) -> Vectors:
        grads = torch.autograd.grad(F.cross_entropy(model(batch[0]), batch[1]), params, create_graph=True)
        return torch.autograd.grad(sum((g * v).sum() for g, v in zip(grads, h, strict=True)), params)

    def gauss_newton(batch: tuple[Tensor, Tensor], h: Vectors) -> Vectors:
        """`J v` as the derivative of `u -> J^T u` times v, which is linear in u."""
        z = model(batch[0])
        u = torch.zeros_like(z, requires_grad=True)
        J_u = torch.autograd.grad(z, params, u, create_graph=True)
        (J_v,) = torch.autograd.grad(J_u, u, h, retain_graph=True)
        p = z.softmax(1).detach()
        return torch.autograd.grad(z, params, p * (J_v - (p * J_v).sum(1, keepdim=True)) / len(z))

    yield from recursion(problem, gauss_newton if "Gauss-Newton" in problem.name else product)


# ---------------------------------------------------------------------- all right-hand sides in one call


def curvlinops(problem: Problem) -> Iterator[Run]:
    from curvlinops import CGInverseLinearOperator, GGNLinearOperator
    from curvlinops.examples import IdentityLinearOperator

    x, y = problem.train
    params = list(problem.model.parameters())
    chunks = list(zip(x.split(1000), y.split(1000), strict=True))
    G = GGNLinearOperator(problem.model, nn.CrossEntropyLoss(), params, chunks, check_deterministic=False)
    identity = IdentityLinearOperator([tuple(p.shape) for p in params], x.device, x.dtype)
    V = problem.rhs.mT.contiguous()
    warm_up = timed(lambda: G @ V[:, :1])[0]

    def solvers() -> Solvers:
        for tolerance in (1e-2, 7e-3, 5e-3, 3e-3):
            inverse = CGInverseLinearOperator(
                G + problem.damping * identity, tolerance=tolerance, eps=0, max_iter=200, max_tridiag_iter=0
            )
            yield f"tolerance {tolerance:g}", lambda inverse=inverse: (inverse @ V).mT

    yield from until_reached(problem, solvers(), warm_up)


def dattri_cg(problem: Problem) -> Iterator[Run]:
    from dattri.func.hessian import ihvp_cg

    loss, w = flat_loss(problem)
    full = partial(loss, x=problem.train[0], y=problem.train[1])
    warm_up = timed(lambda: ihvp_cg(full, max_iter=1)((w,), problem.rhs[:1]))[0]

    def solvers() -> Solvers:
        for steps in (25, 30, 40):
            solve = ihvp_cg(full, max_iter=steps, tol=1e-9, regularization=problem.damping)
            yield f"{steps} steps", lambda solve=solve: solve((w,), problem.rhs)

    yield from until_reached(problem, solvers(), warm_up)


def dattri_lissa(problem: Problem) -> Iterator[Run]:
    """Its damping is AllenNLP's. It draws a batch for each right-hand side, and asks for labels that are floats."""
    from dattri.func.hessian import ihvp_lissa

    loss, w = flat_loss(problem)
    x, y = problem.train
    n = len(y)

    def solve(batch_size: int, scale: float, steps: int) -> Tensor:
        settings = {"batch_size": batch_size, "recursion_depth": steps, "scaling": scale}
        solver = ihvp_lissa(loss, damping=problem.damping / scale, **settings)
        return solver((w, x, y.float()), problem.rhs[:FEW], in_dims=(None, 0, 0))

    warm_up = timed(lambda: solve(8, 20.0, 1))[0]
    for setting in ((512, 2.6, 1400), (n, 1.15, 500)):
        seconds, found = timed(partial(solve, *setting))
        yield Run(in_words(*setting), warm_up, seconds / FEW * TESTS, problem.error(found), FEW)


def flat_loss(problem: Problem) -> tuple[Callable[[Tensor, Tensor, Tensor], Tensor], Tensor]:
    """`loss(w, x, y)` of flat parameters with the Hessian in question, and where it is taken."""
    model = convex(problem)
    names = [name for name, _ in model.named_parameters()]

    def loss(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
        params = dict(zip(names, problem.unflatten(w).values(), strict=True))
        return F.cross_entropy(functional_call(model, params, (x,)), y.long())

    return loss, tree.flatten(problem.params)


def captum(problem: Problem) -> Iterator[Run]:
    """`R R^T v` with its low-rank factor `R` of the inverse of `n H`: directions beyond the rank get nothing."""
    from captum.influence._core.arnoldi_influence_function import ArnoldiInfluenceFunction

    model, n = convex(problem), len(problem.train[1])
    for rank, dimension in ((50, 200), (190, 200), (390, 400)):

        def solve(rank: int = rank, dimension: int = dimension) -> Tensor:
            found = ArnoldiInfluenceFunction(
                model, TensorDataset(*problem.train), "", lambda *_: 1.0, loss_fn=nn.CrossEntropyLoss(reduction="none"),
                batch_size=1000, projection_dim=rank, arnoldi_dim=dimension, arnoldi_tol=1e-6,
                hessian_reg=n * problem.damping,
            )  # fmt: skip
            R = torch.stack([torch.cat([t.flatten() for t in r]) for r in found.R])
            return n * problem.rhs @ R.mT @ R

        seconds, x = timed(solve)
        yield Run(f"rank {rank} of {dimension}", 0.0, seconds, problem.error(x), TESTS)


def pydvl(
    problem: Problem, make: Callable[..., Any], grid: Sequence[dict[str, Any]], few: int = TESTS
) -> Iterator[Run]:
    """Its influence factors are the solutions; the gradients of the test losses, a little of the time, are its own."""
    x, y = (t[:few] for t in problem.test)
    warm_up = None
    for settings in grid:
        rest = {k: v for k, v in settings.items() if k != "batch_size"}
        loader = DataLoader(TensorDataset(*problem.train), batch_size=settings.get("batch_size", 1000))
        model = convex(problem)

        def solve(model: nn.Module = model, rest: Any = rest, loader: Any = loader) -> Tensor:
            influence = make(model, F.cross_entropy, regularization=problem.damping, **rest)
            return influence.fit(loader).influence_factors(x, y).detach()

        first, found = timed(solve)
        seconds = timed(solve)[0] if warm_up is None and few > 1 else first
        warm_up = first - seconds if warm_up is None else warm_up
        setting = ", ".join(f"{k} {v:g}" for k, v in settings.items())
        run = Run(setting, warm_up, seconds / few * TESTS, problem.error(found), few)
        yield run
        if run.error <= AIM:
            return


def pydvl_cg(problem: Problem) -> Iterator[Run]:
    """One right-hand side after the other, to a tolerance below the `rtol` it is given."""
    from pydvl.influence.torch import CgInfluence

    make = partial(CgInfluence, atol=1e-8, warn_on_max_iteration=False)
    yield from pydvl(problem, make, [{"rtol": rtol} for rtol in (0.7, 0.5, 0.3, 0.1)], FEW)


def pydvl_block_cg(problem: Problem) -> Iterator[Run]:
    """All in one Krylov space. Its tolerance is `rtol^2 |v|`."""
    from pydvl.influence.torch import CgInfluence

    make = partial(CgInfluence, atol=1e-8, solve_simultaneously=True, warn_on_max_iteration=False)
    yield from pydvl(problem, make, [{"rtol": rtol} for rtol in (0.1, 0.07, 0.05)])


def pydvl_lissa(problem: Problem) -> Iterator[Run]:
    """Its damping is ours, by its regularization."""
    from pydvl.influence.torch import LissaInfluence

    make = partial(LissaInfluence, rtol=1e-6, warn_on_max_iteration=False)
    grid = [(len(problem.train[1]), 1.15, steps) for steps in (500, 650)]
    names = "batch_size", "scale", "maxiter"
    yield from pydvl(problem, make, [dict(zip(names, values, strict=True)) for values in grid], few=1)


def pydvl_nystroem(problem: Problem) -> Iterator[Run]:
    from pydvl.influence.torch import NystroemSketchInfluence

    yield from pydvl(problem, NystroemSketchInfluence, [{"rank": rank} for rank in (100, 1000)])


TOOLS: dict[str, Callable[[Problem], Iterator[Run]]] = {
    "AllenNLP, LiSSA": allennlp,
    "hand-written LiSSA": hand_written,
    "pyDVL, block CG": pydvl_block_cg,
    "pyDVL, CG": pydvl_cg,
    "pyDVL, Nystroem": pydvl_nystroem,
    "pyDVL, LiSSA": pydvl_lissa,
    "curvlinops, CG": curvlinops,
    "dattri, CG": dattri_cg,
    "dattri, LiSSA": dattri_lissa,
    "captum, Arnoldi": captum,
}
