"""Does the tuned solver reach what it is asked for, on every model of the zoo, and at what cost?

With nothing set but the damping: a relative residual of 1e-2 on all the data, for every convex and every Gauss-Newton
problem, over seeds that change model, data, right-hand side and batches. Beside it stands plain LiSSA at the best batch
size, scale and depth of a grid that knows the residual of every step for nothing. Costs are counted in passes over the
data, of the solve with one look at the residual on all the data; what it takes to find the settings, the estimate of
the spectrum here and the other runs of the grid there, is counted apart.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lissa import LissaState, Status, choose_settings, lissa_update, solve_tuned, tree
from lissa.kernels import twice_differentiable
from lissa.sampling import index_stream
from tests.problems import ZOO, Problem, random_vector

N, RTOL = 128, 1e-2
METHODS = ("auto", "lissa")
CONDITIONS = (10.0, 100.0)
"""`(lambda_max + damping) / damping`: the damping is set by it, as problems differ in size."""

BATCH_SIZES = (N, 64, 16, 4, 1)
FACTORS = (0.6, 0.8, 1.0, 1.25, 1.6, 2.0)
"""Scales tried, in units of the predicted bound of stability."""

DEPTHS = 8
"""The longest run tried, in units of the steps that full batches need at their bound."""

LOOK = 1.02
"""The grid looks at the residual whenever the number of steps has grown by this factor."""


@dataclass(frozen=True)
class Curvature:
    """The Gauss-Newton matrix of each example, `J_i^T D_i J_i`, by its factor `D_i^(1/2) J_i`, of shape `(n, C, P)`."""

    factors: Tensor

    @cached_property
    def mean(self) -> Tensor:
        """The matrix of all data, for the many products with it."""
        rows = self.factors.flatten(0, 1)
        return rows.mT @ rows / len(self.factors)

    def __call__(self, index: Tensor, v: dict[str, Tensor]) -> dict[str, Tensor]:
        """The mean product over the examples `index`, each once, for one flat vector or several."""
        if len(index) == len(self.factors):
            return {"flat": v["flat"] @ self.mean}
        rows = self.factors[index].flatten(0, 1)
        return {"flat": (v["flat"] @ rows.mT) @ rows / len(index)}

    def relative_residual(self, v: dict[str, Tensor], damping: float, x: dict[str, Tensor]) -> Tensor:
        """`|v - (H + damping I) x| / |v|` on all the data, for each of several x."""
        r = v["flat"] - self(torch.arange(N), x)["flat"] - damping * x["flat"]
        return r.norm(dim=-1) / v["flat"].norm(dim=-1)


def run(seeds: int, save: Callable[[dict], object]) -> dict:
    """`save` gets the result after each row: all rows together take an hour."""
    result: dict = {"n": N, "rtol": RTOL, "rows": []}
    rows = result["rows"]
    for name in ZOO:
        problems = [ZOO[name](seed=seed, batch_size=N) for seed in range(seeds)]
        curvatures = [Curvature(factors(problem)) for problem in problems]
        vectors = [{"flat": tree.flatten(random_vector(problem, i))} for i, problem in enumerate(problems)]
        for condition in CONDITIONS:
            found = [one(*pair, condition, i) for i, pair in enumerate(zip(curvatures, vectors, strict=True))]
            rows.append({"model": name, "condition": condition, "seeds": seeds, **summary(found)})
            print(in_words(rows[-1]), flush=True)
            save(result)
    return result


def one(curvature: Curvature, v: dict, condition: float, seed: int) -> dict:
    largest, trace = extremes(curvature)
    damping = largest / (condition - 1)
    out = {method: tuned(curvature, v, damping, method, seed) for method in METHODS}
    return out | {"grid": grid(curvature, v, damping, largest, trace, seed)}


def tuned(curvature: Curvature, v: dict, damping: float, method: str, seed: int) -> dict:
    examples = 0

    def counted(index: Tensor, v: dict) -> dict:
        nonlocal examples
        examples += len(index)
        return curvature(index, v)

    data, generator = torch.arange(N), torch.Generator().manual_seed(seed)
    settings = choose_settings(counted, v, data, damping=damping, generator=generator, rtol=RTOL, method=method)
    tuning = examples / N
    solution = solve_tuned(
        counted, v, data, damping=damping, generator=generator, rtol=RTOL, settings=settings, throw=False
    )
    return {
        "method": settings.method,
        "status": Status(int(solution.status)).name,
        "residual": float(curvature.relative_residual(v, damping, solution.value)),
        "passes": examples / N - tuning,
        "search": tuning,
    }


def grid(curvature: Curvature, v: dict, damping: float, largest: float, trace: float, seed: int) -> dict:
    """The least cost of plain LiSSA, whose last iterate is looked at on the way: all scales of a batch size at once."""
    best, search = {"passes": math.inf}, 0.0
    longest = DEPTHS * math.log(1 / RTOL) * (largest + damping) / 2 / damping
    none = torch.zeros(())
    for B in BATCH_SIZES:
        scale = torch.tensor(FACTORS, dtype=v["flat"].dtype)[:, None] * (largest + damping + trace / B) / 2
        batches = index_stream(N, B, generator=torch.Generator().manual_seed(seed), drop_last=True)
        state = LissaState({"flat": v["flat"].expand(len(FACTORS), -1)}, none, none)
        look = 1.0
        # No more passes than the best so far, and no more steps than are of use.
        last = math.ceil(min(longest, (best["passes"] - 1) * N / B))
        for step in range(1, last + 1):
            state = lissa_update(curvature, v, state, next(batches), damping=damping, scale=scale)
            if step >= look:
                look = step * LOOK
                residuals = curvature.relative_residual(v, damping, {"flat": state.h["flat"] / scale})
                good = (residuals <= RTOL).nonzero()[:, 0].tolist()
                if good:
                    best = {"passes": step * B / N + 1, "batch_size": B, "factor": FACTORS[good[0]], "steps": step}
                    break
        search += len(FACTORS) * min(step, last) * B / N
    return best | {"search": search}


def summary(found: list[dict]) -> dict:
    out: dict = {"grid": median([f["grid"]["passes"] for f in found]), "batch_sizes": {}}
    for f in found:
        B = f["grid"].get("batch_size")
        out["batch_sizes"][B] = out["batch_sizes"].get(B, 0) + 1
    out["grid_search"] = median([f["grid"]["search"] for f in found])
    for method in METHODS:
        results = [f[method] for f in found]
        ratios = [f[method]["passes"] / f["grid"]["passes"] for f in found]
        out[method] = {
            "methods": sorted({r["method"] for r in results}),
            "converged": sum(r["status"] == "CONVERGED" for r in results),
            "largest_residual": max(r["residual"] for r in results),
            "search": median([r["search"] for r in results]),
            "median_cost_against_grid": median(ratios),
            "largest_cost_against_grid": max(ratios),
        }
    return out


def in_words(row: dict) -> str:
    def tuned(method: str) -> str:
        r = row[method]
        return (
            f"{method}: {'/'.join(r['methods'])}, {r['converged']} of {row['seeds']} converged, residual <= "
            f"{r['largest_residual']:.1e}, cost {r['median_cost_against_grid']:.2f} of the grid's best, at most "
            f"{r['largest_cost_against_grid']:.2f}"
        )

    return (
        f"{row['model']}, condition {row['condition']:.0f}: grid {row['grid']:.1f} passes after a search of "
        f"{row['grid_search']:.0f}; " + "; ".join(tuned(method) for method in METHODS)
    )


def median(values: list[float]) -> float:
    return float(torch.tensor(values).median())


def extremes(curvature: Curvature) -> tuple[float, float]:
    """The largest eigenvalue and the trace of the mean, exactly."""
    return float(torch.linalg.eigvalsh(curvature.mean)[-1]), float(curvature.mean.trace())


def factors(problem: Problem) -> Tensor:
    """`D_i^(1/2) J_i`, of shape `(n, outputs of an example, P)`."""
    outputs = problem.output_fn(problem.params, problem.batch).detach()
    J = jacobians(problem, outputs)
    p = torch.softmax(outputs, -1)
    D = torch.diag_embed(p) - p[..., :, None] * p[..., None, :]
    values, vectors = torch.linalg.eigh(D)
    roots = vectors * values.clamp_min(0).sqrt()[..., None, :]
    # An example with several logits (a sequence) has the mean of their losses.
    per_example = math.prod(outputs.shape[1:-1])
    return (roots.mT @ J).reshape(len(outputs), -1, J.shape[-1]) / math.sqrt(per_example)


def jacobians(problem: Problem, outputs: Tensor) -> Tensor:
    """`(*outputs.shape, P)`: by vmap over examples if the model takes it, else by a backward pass for each output."""

    def of_one(params: dict[str, Tensor], example: tuple[Tensor, ...]) -> Tensor:
        return problem.output_fn(params, tuple(t.unsqueeze(0) for t in example)).squeeze(0)

    try:
        with twice_differentiable():
            together = torch.vmap(of_one, in_dims=(None, 0))(problem.params, problem.batch)
            if torch.allclose(together, outputs):  # not so where examples share a branch
                J = torch.vmap(torch.func.jacrev(of_one), in_dims=(None, 0))(problem.params, problem.batch)
                return torch.cat([t.flatten(outputs.ndim) for t in J.values()], -1)
    except RuntimeError:  # packed sequences, sparse gradients, branches on the data
        pass
    leaves = {k: p.clone().requires_grad_() for k, p in problem.params.items()}

    def row(output: Tensor) -> Tensor:
        gradients = torch.autograd.grad(output, list(leaves.values()), retain_graph=True, materialize_grads=True)
        return torch.cat([g.to_dense().flatten() for g in gradients])

    J = torch.stack([row(output) for output in problem.output_fn(leaves, problem.batch).flatten()])
    return J.reshape(*outputs.shape, -1)
