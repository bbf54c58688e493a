"""Claim: the laws of `lissa.testing` find real faults in released libraries, in seconds and unaided.

Each library's own function is handed to a law through an adapter of a few lines; the script prints the smallest case
that breaks it, what was got and the likely cause. It checks first that the same law holds for this project's
counterpart. It installs nothing, and says what it needs where a library is missing:

    pip install --no-deps dattri==0.3.0       (ihvp_at_x_lissa passes num_repeat and batch_size in swapped places)
    pip install --no-deps allennlp==2.10.1    (get_hvp fails where the loss is linear in a parameter)

AllenNLP is too old to import beside a new torch: its `get_hvp` is read from its file and run by itself.

    python -m benchmarks.peer_faults
"""

import ast
import importlib.metadata
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import autograd

import lissa
from lissa import tree
from lissa.testing import Law, LawBroken, adapters, problems, products, sampling_solver_laws


def found_by(law: Law, implementation: Callable) -> LawBroken | None:
    """How the implementation breaks the law within 100 cases, if it does."""
    try:
        law.check(implementation, max_examples=100)
    except LawBroken as broken:
        return broken
    return None


def allennlp_get_hvp() -> Callable | None:
    """AllenNLP's `get_hvp`, as released."""
    try:
        path = Path(importlib.metadata.distribution("allennlp").locate_file("allennlp"))
    except importlib.metadata.PackageNotFoundError:
        return None
    path = path / "interpret" / "influence_interpreters" / "simple_influence.py"
    source = ast.parse(path.read_text(encoding="utf-8"))
    function = next(node for node in source.body if isinstance(node, ast.FunctionDef) and node.name == "get_hvp")
    names = {"torch": torch, "autograd": autograd, "Sequence": Sequence, "Tuple": tuple}
    exec(compile(ast.Module([function], []), str(path), "exec"), names)
    return names["get_hvp"]


def dattri_solver() -> Callable | None:
    """dattri's `ihvp_at_x_lissa`, as the laws call a solver that draws batches.

    The loss whose Hessian is the curvature of the rows is `<p, C_rows p> / 2`. Its damping is AllenNLP's, so that
    `damping / scaling` is passed for damping in the units of the Hessian.
    """
    if importlib.util.find_spec("dattri") is None:
        return None
    from dattri.func.hessian import ihvp_at_x_lissa

    def solve(matvec, v, data, *, damping, batch_size, repeats):
        scaling = 32.0 * data.shape[1] / batch_size + 8

        def loss(rows, flat):
            return flat @ tree.flatten(matvec(rows, tree.unflatten(flat, v))) / 2

        ihvp = ihvp_at_x_lissa(
            lambda x, flat: loss(x, flat), data, torch.zeros(tree.numel(v), dtype=data.dtype), in_dims=(0, None),
            argnums=1, batch_size=batch_size, num_repeat=repeats, recursion_depth=50,
            damping=damping / scaling, scaling=scaling,
        )  # fmt: skip
        return tree.unflatten(ihvp(tree.flatten(v)).reshape(-1), v)

    return solve


def lissa_solver(matvec, v, data, *, damping, batch_size, repeats):
    """This project's counterpart of `dattri_solver`, as few steps."""
    batches = lissa.batch_stream(data, batch_size, generator=torch.Generator().manual_seed(0), replacement=True)
    scale = 32.0 * data.shape[1] / batch_size + 8
    return lissa.solve_lissa(matvec, v, batches, damping=damping, scale=scale, steps=50, repeats=repeats)


def report(title: str, law: Law, theirs: Callable | None, ours: Callable, needs: str) -> bool:
    """Prints what the laws say of both; whether ours keeps them and theirs, if it is here, does not."""
    print(f"\n{title}: the law '{law}'")
    broken = found_by(law, ours)
    print(f"  this project's counterpart: {'holds' if broken is None else broken}")
    if theirs is None:
        print(f"  not installed: {needs}")
        return broken is None
    start = time.perf_counter()
    fault = found_by(law, theirs)
    print(f"  found in {time.perf_counter() - start:.1f} s:" if fault else "  no fault found")
    if fault:
        print("\n".join("    " + line for line in str(fault).splitlines()))
    return broken is None and fault is not None


def main() -> int:
    # AllenNLP itself leaves out parameters that the loss does not use, so only problems that use them all are fair.
    form = Law("form", products.form, problems(min_batch_size=1).filter(lambda p: "unused" not in p.params))
    size = next(law for law in sampling_solver_laws() if law.name == "batch size")
    get_hvp = allennlp_get_hvp()
    results = [
        report(
            "AllenNLP 2.10.1, get_hvp",
            form,
            get_hvp and adapters.of_double_backward(get_hvp),
            adapters.of_double_backward(lissa.hvp_of_graph),
            "pip install --no-deps allennlp==2.10.1",
        ),
        report(
            "dattri 0.3.0, ihvp_at_x_lissa",
            size,
            dattri_solver(),
            lissa_solver,
            "pip install --no-deps dattri==0.3.0",
        ),
    ]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
