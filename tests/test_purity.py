"""Nothing of the caller's changes: bit for bit around every public call of lissa that computes."""

import random
from functools import partial

import numpy
import pytest
import torch

import lissa
from lissa.hvp import MODES
from tests.problems import mlp


def seeded():
    return torch.Generator().manual_seed(0)


PROBLEM = mlp(seed=0)
PARAMS = {k: p.clone().requires_grad_(i % 2 == 0) for i, (k, p) in enumerate(PROBLEM.params.items())}
V = lissa.tree.normal_like(PROBLEM.params, generator=seeded())
BATCH = PROBLEM.batch
MATVEC = partial(lissa.ggnvp, PROBLEM.output_fn, PROBLEM.output_loss_fn, PARAMS)  # positive semidefinite
ON_BATCH = partial(MATVEC, BATCH)

CALLS = {
    **{f"hvp {mode}": partial(lissa.hvp, PROBLEM.loss_fn, PARAMS, BATCH, V, mode=mode) for mode in MODES},
    "ggnvp": partial(ON_BATCH, V),
    "lissa_update": lambda: lissa.lissa_update(MATVEC, V, lissa.lissa_init(V), BATCH, scale=100.0),
    "solve_lissa": lambda: lissa.solve_lissa(MATVEC, V, [BATCH] * 3, damping=1.0, scale=100.0),
    "solve_svrg": lambda: lissa.solve_svrg(
        MATVEC, V, [BATCH] * 60, full_matvec=ON_BATCH, inner_steps=3, damping=1.0, scale=100.0
    ),
    "solve_tuned": lambda: lissa.solve_tuned(MATVEC, V, BATCH, damping=1.0, generator=seeded()),
    "solve_cg": lambda: lissa.solve_cg(ON_BATCH, V, damping=1.0),
    "solve_minres": lambda: lissa.solve_minres(ON_BATCH, V, damping=1.0),
    "solve_dense": lambda: lissa.solve_dense(ON_BATCH, V, damping=1.0),
    "estimate_spectrum": lambda: lissa.estimate_spectrum(ON_BATCH, PARAMS, generator=seeded()),
    "influence_scores by jvp": lambda: lissa.influence_scores(PROBLEM.example_loss_fn, PARAMS, V, BATCH, method="jvp"),
    "influence_scores by gradients": lambda: lissa.influence_scores(
        PROBLEM.example_loss_fn, PARAMS, V, BATCH, method="per-example-gradients"
    ),
    "influence_scores by double-vjp": lambda: lissa.influence_scores(
        PROBLEM.example_loss_fn, PARAMS, V, BATCH, method="double-vjp"
    ),
    "batch_stream": lambda: next(lissa.batch_stream(BATCH, 2, generator=seeded())),
}


def tensors(value):
    return torch.utils._pytree.tree_leaves(value)


@pytest.mark.parametrize("name", CALLS)
def test_nothing_of_the_callers_changes(name):
    owned = [*tensors(PARAMS), *tensors(V), *tensors(BATCH)]
    before = [t.detach().clone() for t in owned]
    flags = [t.requires_grad for t in owned]
    states = random.getstate(), numpy.random.get_state()[1].copy(), torch.get_rng_state()
    switches = (
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.is_grad_enabled(),
    )

    CALLS[name]()

    assert all(torch.equal(a, b) for a, b in zip(before, owned, strict=True))
    assert [t.requires_grad for t in owned] == flags
    assert all(t.grad is None for t in owned)
    assert random.getstate() == states[0]
    assert (numpy.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])
    assert switches == (
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.is_grad_enabled(),
    )
