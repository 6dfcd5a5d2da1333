"""What the commands share: how one is added, and how its words are read."""

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from hrm_ray.config.validate import read_words, validated
from hrm_ray.errors import UserError

Command = Callable[[argparse.Namespace], int | None]  # returns its exit code, None for 0
KEY_VALUE: dict[str, Any] = {"nargs": "*", "metavar": "key=value"}


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are of one line too, like all others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; '{self.prog} --help' shows how it is used")


def add(commands: Any, name: str, run: Command, help: str, example: str) -> argparse.ArgumentParser:
    """Add a command to a group of them.

    Args:
        commands: the group, as `add_subparsers` returns it.
        run: what it does.
        help: in a few words, without a full stop.
        example: command lines that use it.
    """
    parser = commands.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog="examples:\n" + "\n".join(f"  {line}" for line in example.splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, title=parser.prog.partition(" ")[2])
    return parser


def options_of(args: argparse.Namespace) -> Any:
    """The key=value words of a command as an object of its options class. Raises UserError."""
    return validated(args.options, read_words(args.words, args.options), args.title)
