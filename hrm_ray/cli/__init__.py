"""The commands: parse words, call the library, print. No logic lives here; every module beside this one adds its own.

A mistake of the user's ends in one line on standard error and exit code 2, never in a traceback.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from hrm_ray.cli import data, doctor, evaluate, interop, solve, train, tune
from hrm_ray.errors import UserError, about_file

TRACEBACK = "HRM_RAY_TRACEBACK"  # set it to see where an error came from


def build_parser() -> argparse.ArgumentParser:
    """All commands; each knows an example of its use."""
    parser = argparse.ArgumentParser(
        prog="hrm-ray",
        description="Train and evaluate recursive reasoning models on Ray.",
        epilog="Start with: make quickstart. `hrm-ray COMMAND --help` shows examples.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for room in (data, train, tune, evaluate, solve, interop, doctor):
        room.register(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    # No option is without letters: such a word is one that begins with -, as a puzzle with - for its blanks.
    words = [word for word in unknown if not any(map(str.isalpha, word))]
    if len(words) < len(unknown) or (words and "words" not in args):
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if words:
        args.words = [*args.words, *words]
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, OSError) as error:
        mistake = error if isinstance(error, UserError) else about_file(error)
        if mistake is None or os.environ.get(TRACEBACK):
            raise
        print(f"error: {mistake}", file=sys.stderr)
        return mistake.exit_code
