"""Standard input, output and error where they are closed, or where nothing can be written to them."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from hrm_ray.errors import UserError

NAMES = ("stdin", "stdout", "stderr")


def in_colour() -> bool:
    """Whether to print results in colour: if standard output is a terminal that shows colours.

    NO_COLOR and FORCE_COLOR decide before that (https://no-color.org, https://force-color.org).
    """
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return os.environ.get("TERM") != "dumb" and sys.stdout.isatty()


@contextmanager
def usable() -> Iterator[None]:
    """Inside, all three can be used; at the end all that was printed is written.

    Raises:
        UserError: standard output is closed, or cannot be written.
        BrokenPipeError: whoever read it has gone away.
    """
    closed = [name for name in NAMES if getattr(sys, name) is None]
    for name in closed:
        _open_nothing(name)
    if sys.stderr is sys.__stderr__ or "stderr" in closed:
        sys.stderr = Messages(sys.stderr)
    if "stdout" in closed:
        raise UserError("standard output is closed; send it to a file or to /dev/null")
    if sys.stdout is sys.__stdout__:
        sys.stdout = Results(sys.stdout)
    try:
        yield
    finally:
        sys.stdout.flush()


def _open_nothing(name: str) -> None:
    """Open /dev/null in place of a closed stream: else the next file that is opened gets its number."""
    nothing = os.open(os.devnull, os.O_RDWR)
    try:
        os.fstat(NAMES.index(name))
    except OSError:
        os.dup2(nothing, NAMES.index(name))
    setattr(sys, name, os.fdopen(nothing, "r" if name == "stdin" else "w"))


class _Stream:
    """Passes everything on to another stream."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Messages(_Stream):
    """Where messages cannot be written, they are lost and the work goes on.

    As when the terminal is closed, or the disk is full to which they are sent.
    """

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


class Results(_Stream):
    """Where results cannot be written, that is a mistake of the user's."""

    def write(self, text: str) -> int:
        with self._told():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._told():
            self._stream.flush()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            os.dup2(
                os.open(os.devnull, os.O_WRONLY), self._stream.fileno()
            )  # for what is still to be written
            if isinstance(error, BrokenPipeError):
                raise
            raise UserError(
                f"standard output cannot be written: {error.strerror}; send it somewhere else"
            ) from None
