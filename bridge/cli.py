"""The command `simple-influence`: reads arguments, calls the job, turns errors into words and exit codes.

Knows the screen and the shell; does no work of its own.

Exit codes: 0 done, 1 the job failed (the message says why), 2 wrong usage, 130 interrupted.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: that of the process) and returns its exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        print(f"{error}. Install the extra that holds it: pip install 'lissa[demo]'", file=sys.stderr)
        return 1
    except (OSError, RuntimeError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


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
    return parser


def _demo(arguments: argparse.Namespace) -> int:
    from bridge import demo  # scikit-learn and matplotlib are needed by this command alone

    demo.run(arguments.out, seed=arguments.seed, progress=not arguments.quiet)
    return 0
