"""What the command `simple-influence` takes: its commands, their arguments and the help.

Knows words and numbers; knows nothing of what they are for.
"""

import argparse
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

from bridge import results
from bridge.settings import SOLVER_NAMES

Command: TypeAlias = Callable[[argparse.Namespace], int]
"""Does what the arguments say and returns the exit code."""


def parser(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    """Of all commands; a command's arguments have what runs it as `run`.

    Args:
        commands: What runs each command, by name.
    """
    parser = argparse.ArgumentParser(
        prog="simple-influence", description="Which training examples made the model predict this?"
    )
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = subparsers.add_parser(
        "demo",
        help="explain misclassified digits and find flipped labels, on data that scikit-learn ships",
        description="Trains a small classifier on handwritten digits with 5%% of the training labels flipped, explains "
        "its mistakes, finds the flipped labels by self-influence, and writes a picture and the scores.",
    )
    demo.add_argument(
        "--out", type=Path, default=Path("simple-influence-demo"), metavar="DIR", help="where to write (%(default)s)"
    )
    demo.add_argument(
        "--seed", type=int, default=0, help="of the split, the flipped labels and the solver (%(default)s)"
    )
    demo.add_argument("--quiet", action="store_true", help="no progress bars")
    demo.set_defaults(run=commands["demo"])

    run = subparsers.add_parser(
        "run",
        help="the training examples that helped and harmed each test example",
        description="Ranks the training examples by their influence on the loss of each test example: positive scores "
        "helped (without the example the test loss would rise by about score / n), negative ones harmed.",
    )
    _add_job(run, test_is="examples to explain")
    _add_settings(run)
    _add_output(run)
    run.add_argument(
        "--k", type=_count, default=10, help="examples at each end of the ranking (%(default)s); all if there are fewer"
    )
    run.set_defaults(run=commands["run"])

    self_influence = subparsers.add_parser(
        "self",
        help="training examples by self-influence: the wrongly labelled ones come first",
        description="Ranks the training examples by their influence on their own loss. Mislabelled and unusual "
        "examples have the largest.",
    )
    _add_job(self_influence, test_is=None)
    _add_settings(self_influence)
    _add_output(self_influence)
    self_influence.add_argument("--k", type=_count, default=20, help="examples in the report (%(default)s)")
    self_influence.set_defaults(run=commands["self"])

    check = subparsers.add_parser(
        "check",
        help="is influence meaningful for this model with these settings?",
        description="Solves for a few examples only and says what was solved and whether it converged. Exit code 0 if "
        "there is no reason to distrust the scores, 4 if there is.",
    )
    _add_job(check, test_is="examples to solve for; the default is training examples")
    _add_settings(check)
    check.set_defaults(run=commands["check"])

    plan = subparsers.add_parser(
        "plan",
        help="time, memory and traffic of a large run, from a short probe",
        description="Reads a part of the data, takes a few steps of each kind, and says what `run` with LiSSA would "
        "need on each of several numbers of processes. Under torchrun the traffic between the processes is measured "
        "too.",
    )
    _add_job(plan, test_is="a few of the examples to explain")
    size = plan.add_argument_group("the run that is planned")
    _add_params(size)
    size.add_argument("--examples", type=_positive_count, metavar="N", help="training examples (those of --train)")
    size.add_argument("--tests", type=_positive_count, metavar="T", help="examples to explain (those of --test)")
    size.add_argument("--steps", type=_positive_count, required=True, help="LiSSA's steps")
    size.add_argument("--batch-size", type=_positive_count, default=32, help="training examples a step (%(default)s)")
    size.add_argument(
        "--processes", type=_counts, default=[1, 2, 4, 8], metavar="R,R,...", help="numbers of processes (1,2,4,8)"
    )
    size.add_argument("--memory", type=_number, metavar="GB", help="that a process may hold")
    size.add_argument("--hours", type=_number, help="that the run may take")
    size.add_argument(
        "--bandwidth",
        type=_positive_number,
        default=1.0,
        metavar="GB/S",
        help="from one process to the next (%(default)g)",
    )
    size.add_argument("--latency", type=_number, default=50.0, metavar="MICROSECONDS", help="(%(default)g)")
    plan.set_defaults(run=commands["plan"])
    return parser


def _add_job(parser: argparse.ArgumentParser, *, test_is: str | None) -> None:
    job = parser.add_argument_group("model and data")
    job.add_argument(
        "--model",
        required=True,
        metavar="DIR|MODULE:FUNCTION",
        help="a directory that transformers' save_pretrained wrote, tokenizer included; or a function that returns a "
        "mapping with model, train_dataset, and if needed test_dataset, loss_fn, collate_fn, show",
    )
    kinds = "a .csv, .tsv or .jsonl file in UTF-8"
    job.add_argument("--train", type=Path, metavar="FILE", help=f"what the model was trained on: {kinds}")
    if test_is:
        job.add_argument("--test", type=Path, metavar="FILE", help=f"{test_is}: {kinds}")
    job.add_argument("--text-column", default="text", metavar="NAME", help="where the text is (%(default)s)")
    job.add_argument(
        "--label-column", default="label", metavar="NAME", help="where the label is: a name or number (%(default)s)"
    )
    job.add_argument("--max-length", type=_positive_count, metavar="TOKENS", help="cut texts here (the model's most)")
    job.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (%(default)s)")


def _add_params(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--params",
        action="append",
        default=[],
        metavar="REGEX",
        help="measure influence in the parameters whose names begin with a match, the others being constants; may be "
        r"given several times (all parameters). Example: --params 'classifier|bert\.encoder\.layer\.5'",
    )


def _add_settings(parser: argparse.ArgumentParser) -> None:
    settings = parser.add_argument_group("what is solved: (H + ridge I) x = gradient")
    _add_params(settings)
    settings.add_argument(
        "--solver",
        choices=SOLVER_NAMES,
        help="gauss-newton (H is the Gauss-Newton matrix; all examples are solved for at once): the default for a "
        "model directory with up to some thousand training examples; auto, the cheapest of LiSSA's ways and CG on the "
        "Hessian: the default otherwise, and where --scale or --steps are given",
    )
    settings.add_argument(
        "--ridge",
        type=_number_or_auto,
        default="auto",
        help="the damping in the units of the Hessian, such as the weight decay of training; auto: a tenth of the mean "
        "eigenvalue (%(default)s)",
    )
    settings.add_argument(
        "--scale", type=_number_or_auto, default="auto", help="LiSSA's step size is 1 / scale (%(default)s)"
    )
    settings.add_argument("--steps", type=_count_or_auto, default="auto", help="LiSSA's steps (%(default)s)")
    settings.add_argument(
        "--rtol", type=float, default=1e-2, help="relative residual to stop at, where steps are auto (%(default)s)"
    )
    settings.add_argument(
        "--batch-size", type=_positive_count, default=32, help="training examples a LiSSA step (%(default)s)"
    )
    settings.add_argument("--seed", type=int, default=0, help="of the batches and probes (%(default)s)")
    settings.add_argument("--quiet", action="store_true", help="no progress bars")


def _add_output(parser: argparse.ArgumentParser) -> None:
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write; made if not there")
    output.add_argument("--format", choices=results.FORMATS, default="csv", help="of the table (%(default)s)")
    output.add_argument("--no-report", action="store_true", help="no report.html")
    output.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="where the run keeps its state: the same command goes on from there after it was killed",
    )
    output.add_argument(
        "--checkpoint-every",
        type=_number,
        default=300.0,
        metavar="SECONDS",
        help="how often it does; seldomer where writing takes long (%(default)g)",
    )


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 0, got {text!r}")
    return value


def _positive_number(text: str) -> float:
    value = _number(text)
    if value == 0:
        raise argparse.ArgumentTypeError("must be a number > 0, got 0")
    return value


def _counts(text: str) -> list[int]:
    return [_positive_count(part) for part in text.split(",")]


def _positive_count(text: str) -> int:
    value = _count(text)
    if value == 0:
        raise argparse.ArgumentTypeError("must be a whole number > 0, got 0")
    return value


def _number_or_auto(text: str) -> float | str:
    return text if text == "auto" else _number(text, or_else=" or auto")


def _number(text: str, or_else: str = "") -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"must be a number >= 0{or_else}, got {text!r}")
    return value


def _count_or_auto(text: str) -> int | str:
    return text if text == "auto" else _positive_count(text)
