"""Influence functions you can trust: Hessian-vector products, LiSSA and scores over parameter dicts.

Pure functions on `torch.func`. Damping is in the units of the Hessian: `solve_*` solve `(H + damping I) x = v`.
"""

from lissa import tree
from lissa.curvature import ggnvp
from lissa.hvp import (
    choose_mode,
    hvp,
    hvp_auto,
    hvp_double_backward,
    hvp_finite_difference,
    hvp_forward_over_reverse,
    hvp_of_graph,
    hvp_reverse_over_forward,
    hvp_reverse_over_reverse,
)
from lissa.influence import influence_scores, per_example_gradients
from lissa.ranking import Ranking, ranking_init, ranking_update
from lissa.recursion import LissaState, lissa_init, lissa_update, solve_lissa
from lissa.sampling import batch_stream, index_stream, take
from lissa.types import Batch, ExampleLossFn, LossFn, Params, Solution, SolverError, Status

__all__ = [
    "Batch",
    "ExampleLossFn",
    "LissaState",
    "LossFn",
    "Params",
    "Ranking",
    "Solution",
    "SolverError",
    "Status",
    "batch_stream",
    "choose_mode",
    "ggnvp",
    "hvp",
    "hvp_auto",
    "hvp_double_backward",
    "hvp_finite_difference",
    "hvp_forward_over_reverse",
    "hvp_of_graph",
    "hvp_reverse_over_forward",
    "hvp_reverse_over_reverse",
    "index_stream",
    "influence_scores",
    "lissa_init",
    "lissa_update",
    "per_example_gradients",
    "ranking_init",
    "ranking_update",
    "solve_lissa",
    "take",
    "tree",
]
