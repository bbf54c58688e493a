"""The command `simple-influence`: calls the job with what the arguments say, turns errors into words and exit codes.

Knows the screen and the shell; does no work of its own.

Exit codes: 0 done; 1 the job failed (the message says why); 2 wrong usage; 3 a file, model or name that was given
cannot be used, and nothing was computed; 4 `check` finds that these settings give no meaningful influence; 130
interrupted; 143 terminated, as a batch system does.
"""

import argparse
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from bridge import distributed
from bridge.arguments import parser
from bridge.checkpoint import CheckpointError
from bridge.files import InputError
from bridge.watch import RankError

if TYPE_CHECKING:
    from bridge.job import Job
    from bridge.run import Settings, Solved

EXTRAS = {"transformers": "hf", "jinja2": "report", "PIL": "report", "pyarrow": "parquet"}
"""The extra that holds a module."""

FAILED, CANNOT_BE_USED, NOT_MEANINGFUL, INTERRUPTED, TERMINATED = 1, 3, 4, 130, 143


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: that of the process) and returns its exit code."""
    arguments = parser(COMMANDS).parse_args(argv)
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
    except RankError as error:
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


COMMANDS = {"demo": _demo, "run": _run, "self": _self, "check": _check, "plan": _plan}
