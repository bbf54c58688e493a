"""The project's own products, solvers and scores, and plain PyTorch's, in the form that the laws call."""

from functools import partial

import torch

import lissa
from lissa.testing import Law, adapters, product_laws, sampling_solver_laws, score_laws, solver_laws


def lissa_solver(matvec, v, *, damping):
    """`solve_lissa` on one batch, with the scale and the number of steps that its eigenvalues ask for.

    A mode shrinks by `1 - eigenvalue / scale` a step: with `scale = (smallest + largest) / 2`, by at most
    `1 - smallest / scale` in size. The residual starts at most at `|1 - largest / scale| |v| < |v|`: 4.7 times
    `scale / smallest` steps bring it below `exp(-4.7) = 0.009`.
    """
    eigenvalues = torch.linalg.eigvalsh(lissa.dense_matrix(matvec, v).double()) + damping
    smallest, largest = float(eigenvalues[0]), float(eigenvalues[-1])
    scale = (smallest + largest) / 2
    steps = 1 + int(4.7 * scale / smallest)
    return lissa.solve_lissa(
        lambda _, x: matvec(x), v, range(steps), damping=damping, scale=scale, steps=steps, rtol=None
    )


def lissa_sampled(matvec, v, data, *, damping, batch_size, repeats):
    """`solve_lissa` on batches drawn with replacement, at a scale and depth for the promised errors.

    For rows x of length at most R, `E |x|^2 x x^T <= R^2 C`, so the mean-square error falls while
    `scale > (trace + damping + R^2 / batch_size) / 2`; this is twice that. The slowest mode starts within 1 of the
    solution and falls as `exp(-t damping / scale)`: its mean over the second half of `5 scale / damping` steps is
    `(exp(-2.5) - exp(-5)) / 2.5 = 0.03`, and the noise is averaged over as many.
    """
    squares = data.square().sum(1)
    scale = float(squares.mean() + squares.max() / batch_size) + damping
    steps = int(5 * scale / damping)
    generator = torch.Generator().manual_seed(0)
    batches = lissa.batch_stream(data, batch_size, generator=generator, replacement=True)
    return lissa.solve_lissa(
        matvec, v, batches, damping=damping, scale=scale, steps=steps, average_after=steps // 2, repeats=repeats
    )


def without_vmap(laws: tuple[Law, ...]) -> tuple[Law, ...]:
    return tuple(law for law in laws if law.name != "vmap is loop")


# One set of laws for each claim, so that their cases are drawn once.
hessian = product_laws(vmap=True)
loose = solver_laws(rtol=1e-3, vmap=True, takes_rtol=True)
loose_fixed = tuple(law for law in loose if law.name != "early stop")
loose_indefinite = solver_laws(rtol=1e-3, indefinite=True)
scores = score_laws(min_batch_size=0)

RIGHT: dict[str, tuple] = {
    "hvp auto": (lissa.hvp, without_vmap(hessian)),
    "hvp reverse-over-reverse": (lissa.hvp_reverse_over_reverse, hessian),
    "hvp forward-over-reverse": (lissa.hvp_forward_over_reverse, hessian),
    "hvp reverse-over-forward": (lissa.hvp_reverse_over_forward, hessian),
    "hvp double-backward": (lissa.hvp_double_backward, hessian),
    "hvp finite-difference": (lissa.hvp_finite_difference, product_laws(accuracy="difference", vmap=True)),
    "hvp of a graph": (adapters.of_double_backward(lissa.hvp_of_graph), without_vmap(hessian)),
    "torch.autograd.functional.hvp": (adapters.of_autograd_functional(), without_vmap(hessian)),
    "torch.autograd.functional.vhp": (
        adapters.of_autograd_functional(torch.autograd.functional.vhp),
        without_vmap(hessian),
    ),
    "ggnvp": (lissa.ggnvp, product_laws(curvature="gauss-newton", vmap=True)),
    "solve_cg": (partial(lissa.solve_cg, rtol=1e-3), loose_fixed),
    "solve_cg to a tolerance": (lissa.solve_cg, tuple(law for law in loose if law.name == "early stop")),
    "solve_minres": (partial(lissa.solve_minres, rtol=1e-3), loose_fixed),
    "solve_minres, indefinite": (partial(lissa.solve_minres, rtol=1e-3), loose_indefinite),
    "solve_dense": (lissa.solve_dense, solver_laws(vmap=True)),
    "solve_dense, indefinite": (lissa.solve_dense, solver_laws(indefinite=True)),
    "solve_lissa": (lissa_solver, solver_laws(rtol=1e-2)),
    "solve_lissa, sampled": (lissa_sampled, sampling_solver_laws()),
    "influence_scores by jvp": (partial(lissa.influence_scores, method="jvp"), scores),
    "influence_scores by double-vjp": (partial(lissa.influence_scores, method="double-vjp"), scores),
    "influence_scores by per-example gradients": (
        partial(lissa.influence_scores, method="per-example-gradients"),
        score_laws(),
    ),
}
"""Implementations by name, each with the laws that it claims."""

PAIRS: list[tuple[str, Law]] = [(name, law) for name, (_, laws) in RIGHT.items() for law in laws]
