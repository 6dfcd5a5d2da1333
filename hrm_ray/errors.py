"""Exceptions that end in a single line instead of a traceback.

The command line prints them as ``error: MESSAGE`` and exits with their `exit_code`. They survive pickling, so they
can be raised inside a Ray task or worker.
"""

LONGEST = 500  # characters of a message


class UserError(Exception):
    """A mistake in the input. Its message says in one line what is wrong, where, and how to fix it.

    Whatever its message quotes, it is printed as one line of at most `LONGEST` characters without control characters.
    What is worth reading below it, such as the log of a worker, is a note (`add_note`).
    """

    exit_code = 2

    def __str__(self) -> str:
        return one_line(super().__str__())


class RunFailed(UserError):
    """A run that cannot continue although its input is valid (the loss is not finite, workers are lost)."""

    exit_code = 1


class RayFailed(RunFailed):
    """Ray could not be started, or gave a run up."""


class NonFiniteLoss(RunFailed):
    """The loss is not finite: these settings cannot train."""


class OutOfMemory(UserError):
    """These settings need more memory than there is."""


class Unseen(UserError):
    """A folder of the driver's machine that another machine of the cluster does not have."""


class TransientError(UserError):
    """An error that may not occur if tried again, such as a storage that does not answer.

    On Ray the workers are started again.
    """

    exit_code = 1


def about_file(error: OSError) -> UserError | None:
    """A UserError about the file that the error names; None if it names no file (then the user made no mistake)."""
    if error.filename is not None:
        return UserError(f"{error.filename}: {error.strerror}")
    if "Detail: [errno " in str(error):  # pyarrow's, which name the file in the message
        return UserError(error.strerror)
    return None


def notes(error: BaseException) -> list[str]:
    """What is to be shown below the message of an error; each may have several lines."""
    return getattr(error, "__notes__", [])


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for use in our own message; the name of its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def shown(text: str, width: int = 100) -> str:
    """Text of a file as it may stand in a message: on one line, control characters escaped, a long one cut."""
    return one_line(text if len(text) <= width else f"{text[: width - 3]}...")


def one_line(text: str) -> str:
    """`text` with control characters spelled out (``\\r``), and its middle left out if it is long."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if len(text) > LONGEST:
        end = LONGEST // 3  # the end of a message says how to mend it
        text = f"{text[: LONGEST - end - 5]} ... {text[-end:]}"
    return text
