"""The project's own products, solvers and scores, and plain PyTorch's, in the form that the laws call."""

from functools import partial

import torch

import lissa
from lissa.testing import Law, adapters, product_laws, sampling_solver_laws, score_laws, solver_laws


def lissa_solver(matvec, v, *, damping):
    """`solve_lissa` on one batch, a scale of 3/4 of the largest eigenvalue and enough steps for rtol 1e-2.

    The residual shrinks by at least `1 - smallest / scale` a step, and no eigenvalue here plus damping is below 1/4.
    """
    largest = float(torch.linalg.eigvalsh(lissa.dense_matrix(matvec, v).double())[-1])
    scale = 0.75 * (largest + damping)
    steps = 1 + int(scale / 0.25 * 4.7)
    return lissa.solve_lissa(
        lambda _, x: matvec(x), v, range(steps), damping=damping, scale=scale, steps=steps, rtol=None
    )


def lissa_sampled(matvec, v, data, *, damping, batch_size, repeats):
    """`solve_lissa` on batches drawn with replacement, at a scale and depth for the promised errors."""
    scale = 32.0 * data.shape[1] / batch_size + 8
    steps = int(3.25 * scale / damping)  # what is left in the slowest mode: exp(-3.25) = 0.04
    generator = torch.Generator().manual_seed(0)
    batches = lissa.batch_stream(data, batch_size, generator=generator, replacement=True)
    return lissa.solve_lissa(matvec, v, batches, damping=damping, scale=scale, steps=steps, repeats=repeats)


RIGHT: dict[str, tuple] = {
    "hvp auto": (lissa.hvp, product_laws()),
    "hvp reverse-over-reverse": (lissa.hvp_reverse_over_reverse, product_laws(vmap=True)),
    "hvp forward-over-reverse": (lissa.hvp_forward_over_reverse, product_laws(vmap=True)),
    "hvp reverse-over-forward": (lissa.hvp_reverse_over_forward, product_laws(vmap=True)),
    "hvp double-backward": (lissa.hvp_double_backward, product_laws(vmap=True)),
    "hvp finite-difference": (lissa.hvp_finite_difference, product_laws(accuracy="difference", vmap=True)),
    "hvp of a graph": (adapters.of_double_backward(lissa.hvp_of_graph), product_laws()),
    "torch.autograd.functional.hvp": (adapters.of_autograd_functional(), product_laws()),
    "torch.autograd.functional.vhp": (
        adapters.of_autograd_functional(torch.autograd.functional.vhp),
        product_laws(),
    ),
    "ggnvp": (lissa.ggnvp, product_laws(curvature="gauss-newton", vmap=True)),
    "solve_cg": (partial(lissa.solve_cg, rtol=1e-3), solver_laws(rtol=1e-3, vmap=True)),
    "solve_cg to a tolerance": (
        lissa.solve_cg,
        tuple(law for law in solver_laws(rtol=1e-3, takes_rtol=True) if law.name == "early stop"),
    ),
    "solve_minres": (partial(lissa.solve_minres, rtol=1e-3), solver_laws(rtol=1e-3, vmap=True)),
    "solve_minres, indefinite": (partial(lissa.solve_minres, rtol=1e-3), solver_laws(rtol=1e-3, indefinite=True)),
    "solve_dense": (lissa.solve_dense, solver_laws(vmap=True)),
    "solve_dense, indefinite": (lissa.solve_dense, solver_laws(indefinite=True)),
    "solve_lissa": (lissa_solver, solver_laws(rtol=1e-2)),
    "solve_lissa, sampled": (lissa_sampled, sampling_solver_laws()),
    "influence_scores by jvp": (partial(lissa.influence_scores, method="jvp"), score_laws(min_batch_size=0)),
    "influence_scores by per-example gradients": (
        partial(lissa.influence_scores, method="per-example-gradients"),
        score_laws(),
    ),
}
"""Implementations by name, each with the laws that it claims."""

PAIRS: list[tuple[str, Law]] = [(name, law) for name, (_, laws) in RIGHT.items() for law in laws]
