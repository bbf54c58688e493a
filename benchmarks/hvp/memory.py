"""Peak memory of K products at once by `torch.vmap(..., chunk_size=...)`: what is beyond the K results themselves."""

from functools import partial
from typing import Any

import torch

from benchmarks.hvp.models import MODELS, TRANSFORMER
from benchmarks.timing import peak_bytes
from lissa import hvp
from tests.problems import random_vectors

VECTORS, CHUNKS = (8, 16, 32), (2, 4, 8)


def by_chunk(device: str) -> list[dict[str, Any]]:
    """For the transformer, batch 8, float32: the peak less the bytes of the results, in peaks of one gradient."""
    problem = MODELS[TRANSFORMER](dtype=torch.float32, batch_size=8)
    params = {k: p.to(device) for k, p in problem.params.items()}
    batch = tuple(t.to(device) for t in problem.batch)
    gradient = torch.func.grad(problem.loss_fn)
    unit = peak_bytes(lambda: gradient(params, batch), device)
    bytes_of_one = sum(p.nbytes for p in params.values())
    rows = []
    for K in VECTORS:
        vectors = {k: t.to(device) for k, t in random_vectors(problem, K).items()}
        for chunk in CHUNKS:
            products = partial(torch.vmap(partial(hvp, problem.loss_fn, params, batch), chunk_size=chunk), vectors)
            beyond = peak_bytes(products, device) - K * bytes_of_one
            rows.append({"vectors": K, "chunk": chunk, "gradients_beyond_results": beyond / unit})
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """A line for each number of vectors, a column for each chunk."""
    found = {(row["vectors"], row["chunk"]): row["gradients_beyond_results"] for row in rows}
    lines = [["vectors", *(f"chunk {chunk}" for chunk in CHUNKS)], ["---"] * (1 + len(CHUNKS))]
    lines += [[str(K), *(f"{found[K, chunk]:.2f}" for chunk in CHUNKS)] for K in VECTORS]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"Transformer, batch 8: peak memory of K products beyond the K results, in gradients.\n\n{table}"
