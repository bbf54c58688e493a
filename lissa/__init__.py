"""Influence functions you can trust: Hessian-vector products, LiSSA and scores over parameter dicts.

Pure functions on `torch.func`. Damping is in the units of the Hessian: `solve_*` solve `(H + damping I) x = v`.
"""

from lissa import checks, tree
from lissa.block_cg import solve_block_cg
from lissa.curvature import fvp, ggnvp, linearised_hvp
from lissa.dual import DualInfluence, dual_influence, output_gram
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
from lissa.influence import influence_scores, per_example_gradients, scoring_plan
from lissa.last_layer import Expansion, LastLayer, expansion_of_graph
from lissa.leave_one_out import leave_one_out_scores
from lissa.operators import mean_matvec
from lissa.output_recursion import solve_lissa_in_outputs, solve_lissa_last_layer
from lissa.preconditioners import diagonal_preconditioner, nystroem_preconditioner
from lissa.ranking import Ranking, ranking_init, ranking_update
from lissa.recursion import LissaRun, LissaState, lissa_init, lissa_update, solve_lissa
from lissa.sampling import batch_stream, index_stream, take
from lissa.solvers import dense_matrix, solve_cg, solve_dense, solve_minres
from lissa.spectrum import Spectrum, batch_noise, estimate_spectrum, largest_eigenvalue
from lissa.stacked import solve_lissa_stacked, stacked_hvp
from lissa.svrg import solve_svrg
from lissa.tracing import compiled, traced
from lissa.tuned import choose_settings, solve_tuned, solve_tuned_stacked
from lissa.tuning import Settings, least_damping, suggest_damping, tune_lissa
from lissa.types import Batch, BatchMatvec, ExampleLossFn, LossFn, Matvec, Params, Solution, SolverError, Status
from lissa.uncertainty import ScoreInterval, score_bound, score_interval, settled_places

__all__ = [
    "Batch",
    "BatchMatvec",
    "DualInfluence",
    "ExampleLossFn",
    "Expansion",
    "LastLayer",
    "LissaRun",
    "LissaState",
    "LossFn",
    "Matvec",
    "Params",
    "Ranking",
    "ScoreInterval",
    "Settings",
    "Solution",
    "SolverError",
    "Spectrum",
    "Status",
    "batch_noise",
    "batch_stream",
    "checks",
    "choose_mode",
    "choose_settings",
    "compiled",
    "dense_matrix",
    "diagonal_preconditioner",
    "dual_influence",
    "estimate_spectrum",
    "expansion_of_graph",
    "fvp",
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
    "largest_eigenvalue",
    "least_damping",
    "leave_one_out_scores",
    "linearised_hvp",
    "lissa_init",
    "lissa_update",
    "mean_matvec",
    "nystroem_preconditioner",
    "output_gram",
    "per_example_gradients",
    "ranking_init",
    "ranking_update",
    "score_bound",
    "score_interval",
    "scoring_plan",
    "settled_places",
    "solve_block_cg",
    "solve_cg",
    "solve_dense",
    "solve_lissa",
    "solve_lissa_in_outputs",
    "solve_lissa_last_layer",
    "solve_lissa_stacked",
    "solve_minres",
    "solve_svrg",
    "solve_tuned",
    "solve_tuned_stacked",
    "stacked_hvp",
    "suggest_damping",
    "take",
    "traced",
    "tree",
    "tune_lissa",
]
