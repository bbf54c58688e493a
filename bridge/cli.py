"""The command `simple-influence`: reads arguments, calls the job, turns errors into words and exit codes.

Knows the screen and the shell; does no work of its own.

Exit codes: 0 done; 1 the job failed (the message says why); 2 wrong usage; 3 a file, model or name that was given
cannot be used, and nothing was computed; 4 `check` finds that these settings give no meaningful influence; 130
interrupted; 143 terminated, as a batch system does.
"""

import argparse
import math
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from bridge import distributed, results
from bridge.checkpoint import CheckpointError
from bridge.files import InputError
from bridge.settings import SOLVER_NAMES

if TYPE_CHECKING:
    from bridge.job import Job
    from bridge.run import Settings, Solved

EXTRAS = {"transformers": "hf", "jinja2": "report", "PIL": "report", "pyarrow": "parquet"}
"""The extra that holds a module."""

FAILED, CANNOT_BE_USED, NOT_MEANINGFUL, INTERRUPTED, TERMINATED = 1, 3, 4, 130, 143


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: that of the process) and returns its exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    arguments.command_line = shlex.join(["simple-influence", *(sys.argv[1:] if argv is None else argv)])
    with _one_talks():
        return _exit_code(arguments)


@contextmanager
def _one_talks() -> Iterator[None]:
    """Of the processes that torchrun started, all but the first are silent inside."""
    if distributed.first_here():
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _exit_code(arguments: argparse.Namespace) -> int:
    """Runs the command; errors become words and a code."""
    try:
        with _termination_as_interrupt():
            return arguments.run(arguments)
    except distributed.RankError as error:
        has_the_word = distributed.second_here() if error.first_is_gone else distributed.first_here()
        if has_the_word:
            print(f"{type(error).__name__}: {error}", file=sys.__stderr__, flush=True)
        return FAILED
    except KeyboardInterrupt as interrupt:
        print("Interrupted.", file=sys.stderr)
        return TERMINATED if isinstance(interrupt, _Terminated) else INTERRUPTED
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0], "demo")
        print(f"{error}. Install the extra that holds it: pip install 'lissa[{extra}]'", file=sys.stderr)
        return FAILED
    except (CheckpointError, InputError) as error:
        print(error, file=sys.stderr)
        return CANNOT_BE_USED
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return FAILED


class _Terminated(KeyboardInterrupt):
    """SIGTERM came."""


@contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """Inside, SIGTERM is an interruption too, so that what is done is kept and named."""

    def terminate(*_: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():  # no other thread may set a handler
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="simple-influence", description="Which training examples made the model predict this?"
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = commands.add_parser(
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
    demo.set_defaults(run=_demo)

    run = commands.add_parser(
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
    run.set_defaults(run=_run)

    self_influence = commands.add_parser(
        "self",
        help="training examples by self-influence: the wrongly labelled ones come first",
        description="Ranks the training examples by their influence on their own loss. Mislabelled and unusual "
        "examples have the largest.",
    )
    _add_job(self_influence, test_is=None)
    _add_settings(self_influence)
    _add_output(self_influence)
    self_influence.add_argument("--k", type=_count, default=20, help="examples in the report (%(default)s)")
    self_influence.set_defaults(run=_self)

    check = commands.add_parser(
        "check",
        help="is influence meaningful for this model with these settings?",
        description="Solves for a few examples only and says what was solved and whether it converged. Exit code 0 if "
        "there is no reason to distrust the scores, 4 if there is.",
    )
    _add_job(check, test_is="examples to solve for; the default is training examples")
    _add_settings(check)
    check.set_defaults(run=_check)

    plan = commands.add_parser(
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
    plan.set_defaults(run=_plan)
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


def _demo(arguments: argparse.Namespace) -> int:
    from bridge import demo  # scikit-learn and matplotlib are needed by this command alone

    demo.run(arguments.out, seed=arguments.seed, progress=not arguments.quiet)
    return 0


def _run(arguments: argparse.Namespace) -> int:
    from bridge import run

    _writable(arguments)
    job = _job(arguments, needs_test=True)
    if arguments.k > len(job.train):
        print(
            f"k = {arguments.k} is more than the {len(job.train)} training examples: all are ranked.", file=sys.stderr
        )
    path = arguments.out / f"influence.{arguments.format}"
    solved = run.explain(job, _settings(arguments, job), arguments.k, path)
    return _finish(arguments, job, solved, path)


def _self(arguments: argparse.Namespace) -> int:
    from bridge import run

    _writable(arguments)
    job = _job(arguments, needs_test=False)
    path = arguments.out / f"self_influence.{arguments.format}"
    solved = run.rank_by_self_influence(job, _settings(arguments, job), path)
    return _finish(arguments, job, solved, path)


def _check(arguments: argparse.Namespace) -> int:
    from bridge import run

    job = _job(arguments, needs_test=False)
    settings = _settings(arguments, job)
    print(f"{len(job.train)} training examples; influence in {run.parameters(job, settings)} parameters.")
    found = run.check(job, settings)
    print(found.in_words())
    if found.problems():
        print("NOT MEANINGFUL with these settings.")
        return NOT_MEANINGFUL
    print("No reason was found to distrust scores with these settings.")
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from bridge import plan, run

    job = _job(arguments, needs_test=True)
    # Ridge and scale change what is solved, not what it costs.
    settings = run.Settings(
        params=tuple(arguments.params), solver="lissa", ridge=1.0, scale=1e6, steps=arguments.steps,
        batch_size=arguments.batch_size, progress=False,
    )  # fmt: skip
    network = plan.Network(arguments.bandwidth * 1e9, arguments.latency * 1e-6)
    plans = run.plan(
        job, settings, ranks=arguments.processes, n=arguments.examples, tests=arguments.tests, network=network
    )
    work = plans[0].work
    print(
        f"{work.tests:,} test examples against {work.n:,} training examples in {run.parameters(job, settings):,} "
        f"parameters, by {work.steps:,} LiSSA steps of {work.batch_size:,}, {work.together} solved for together:"
    )
    print(
        plan.in_words(
            plans,
            memory=None if arguments.memory is None else arguments.memory * 1e9,
            seconds=None if arguments.hours is None else arguments.hours * 3600,
        )
    )
    return 0


def _job(arguments: argparse.Namespace, *, needs_test: bool) -> "Job":
    """The job of `--model`; notes on its data are printed."""
    import torch

    from bridge import job

    train, test = arguments.train, getattr(arguments, "test", None)
    try:
        device = distributed.local_device(torch.device(arguments.device))
    except RuntimeError as error:
        raise InputError(f"--device {arguments.device}: {str(error).splitlines()[0]}") from error
    directory = Path(arguments.model)
    if ":" in arguments.model and not directory.is_dir():
        if train or test:
            raise InputError(f"--model {arguments.model} returns its datasets: leave out --train and --test.")
        found = job.from_function(arguments.model)
        found.model.to(device)
    else:
        if not directory.is_dir():
            raise InputError(f"--model {arguments.model}: there is no such directory (a function is MODULE:FUNCTION).")
        if train is None or (needs_test and test is None):
            raise InputError("With a model directory, give --train" + (" and --test." if needs_test else "."))
        found = _from_directory(arguments, directory, device)
    if needs_test and not len(found.test):
        raise InputError(f"--model {arguments.model}: there is no 'test_dataset' to explain.")
    for note in found.notes:
        print(f"Note: {note}", file=sys.stderr)
    return found


def _from_directory(arguments: argparse.Namespace, directory: Path, device: "object") -> "Job":
    import transformers  # pyright: ignore[reportMissingImports]

    from bridge import huggingface

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return huggingface.from_directory(
        directory,
        arguments.train,
        getattr(arguments, "test", None),
        text_column=arguments.text_column,
        label_column=arguments.label_column,
        max_length=arguments.max_length,
        device=device,  # pyright: ignore[reportArgumentType]
    )


def _settings(arguments: argparse.Namespace, job: "Job") -> "Settings":
    from bridge.run import Settings

    for_lissa = (arguments.scale, arguments.steps) != ("auto", "auto")
    return Settings(
        params=tuple(arguments.params),
        solver=arguments.solver or ("auto" if for_lissa else job.solver),
        ridge=arguments.ridge,
        scale=arguments.scale,
        steps=arguments.steps,
        rtol=arguments.rtol,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        progress=not arguments.quiet,
        checkpoint_dir=getattr(arguments, "checkpoint", None),
        checkpoint_every=getattr(arguments, "checkpoint_every", 300.0),
    )


def _writable(arguments: argparse.Namespace) -> None:
    """What would stop the results from being written must not be found after an hour of work."""
    if arguments.format == "parquet":
        import pyarrow  # noqa: F401  # pyright: ignore[reportMissingImports]
    if not arguments.no_report:
        import jinja2  # noqa: F401  # pyright: ignore[reportMissingImports]
    if not distributed.first_here():
        return
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        probe = arguments.out / "settings.json"
        probe.open("a").close()
    except OSError as error:
        raise InputError(f"--out {arguments.out}: cannot be written to: {error.strerror or error}.") from error


def _finish(arguments: argparse.Namespace, job: "Job", solved: "Solved", table: Path) -> int:
    """Says what was solved, and writes the settings and the report."""
    from bridge import report, run

    if not distributed.first_here():
        return 0
    settings = report.repeatable(arguments.command_line, job, _settings(arguments, job), solved.diagnostics)
    written = [table, report.write_settings(arguments.out / "settings.json", settings)]
    if not arguments.no_report:
        written.append(
            report.write(arguments.out / "report.html", job, solved, settings)
            if solved.found and isinstance(solved.found[0], run.Explained)
            else report.write_self(arguments.out / "report.html", job, solved, settings, most=arguments.k)
        )
    print(solved.diagnostics.in_words())
    print(f"Wrote {', '.join(map(str, written))}.")
    return 0


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
