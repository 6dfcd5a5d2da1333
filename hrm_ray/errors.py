"""The one exception that ends in a single line and exit code 2 instead of a traceback."""


class UserError(Exception):
    """A mistake in the input: says what is wrong, where, and how to mend it, in one line.

    The command line prints it as ``error: MESSAGE`` and exits with code 2. Survives pickling, so it can be
    raised inside a Ray task or worker.
    """
