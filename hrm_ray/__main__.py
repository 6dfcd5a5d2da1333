"""Where the command begins, as `hrm-ray` or `python -m hrm_ray`.

To import the commands takes a second. Ctrl-C meanwhile ends the process as it does later, with 130 and no traceback.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def main() -> int:
    """Run the command of this process; returns its exit code."""
    try:
        with _ended_by_ctrl_c():
            from hrm_ray import cli
        return cli.main()
    except KeyboardInterrupt:  # that comes just before or after the command, which returns 130 by itself
        return 130


@contextmanager
def _ended_by_ctrl_c() -> Iterator[None]:
    """Inside, Ctrl-C ends the process at once, unless it is ignored, as by a shell in the background.

    Nothing has begun that would have to be ended, and an exception might be caught by whatever is being imported.
    """
    usual = signal.getsignal(signal.SIGINT)
    if usual is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
        yield
        signal.signal(signal.SIGINT, usual)
    else:
        yield


if __name__ == "__main__":
    sys.exit(main())
