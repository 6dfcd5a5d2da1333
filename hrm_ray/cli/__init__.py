"""The commands: parse words, call the library, print. No logic lives here; every module beside this one adds its own.

A mistake of the user's ends in one line on standard error and exit code 2, never in a traceback.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from hrm_ray import __version__
from hrm_ray.cli import (
    config,
    data,
    doctor,
    evaluate,
    interop,
    plot,
    scale,
    solve,
    streams,
    submit,
    train,
    tune,
    vote,
)
from hrm_ray.cli.command import Parser
from hrm_ray.errors import UserError, about_file, notes, shown

TRACEBACK = "HRM_RAY_TRACEBACK"  # set it to see where an error came from


def build_parser() -> argparse.ArgumentParser:
    """All commands; each knows an example of its use."""
    parser = Parser(
        prog="hrm-ray",
        description="Train and evaluate recursive reasoning models on Ray.",
        epilog="Start with: make quickstart. `hrm-ray COMMAND --help` shows examples.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for room in (data, train, tune, submit, evaluate, vote, solve, interop, plot, scale, config, doctor):
        room.register(commands)
    return parser


def check_words(words: Sequence[str]) -> None:
    """Raise UserError for a word that nobody types: with a carriage return at its end, or of no use as a path."""
    for word in words:
        if "\0" in word or not encodes(word):
            raise UserError(f"the word '{shown(word)}' holds a character that no file name can; leave it out")
        if word.endswith("\r"):
            raise UserError(
                f"the word '{word}' ends in a carriage return: the script has Windows line ends; sed -i 's/\\r$//' "
                "SCRIPT removes them"
            )


def encodes(word: str) -> bool:
    """Whether the system could have passed `word` to a program, or can take it as the name of a file."""
    try:
        os.fsencode(word)
    except UnicodeEncodeError:
        return False
    return True


def read_arguments(words: Sequence[str]) -> argparse.Namespace:
    """What the words of a command mean to its parser."""
    parser = build_parser()
    args, unknown = parser.parse_known_args(words)
    # No option is without letters: such a word is one that begins with -, as a puzzle with - for its blanks.
    more = [word for word in unknown if not any(map(str.isalpha, word))]
    if len(more) < len(unknown) or (more and "words" not in args):
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if more:
        args.words = [*args.words, *more]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    try:
        with streams.usable():
            words = sys.argv[1:] if argv is None else list(argv)
            check_words(words)
            args = read_arguments(words)
            return args.run(args) or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 0
    except (UserError, OSError) as error:
        mistake = error if isinstance(error, UserError) else about_file(error)
        if mistake is None or os.environ.get(TRACEBACK):
            raise
        print(f"error: {mistake}", *notes(mistake), sep="\n", file=sys.stderr)
        return mistake.exit_code
