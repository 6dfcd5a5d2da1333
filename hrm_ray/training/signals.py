"""Signals and time limits that ask a run to stop."""

import os
import signal
import threading
import time
from contextlib import contextmanager, suppress
from typing import Any


class StopRequest:
    """Asks the run to stop after its step: on the first SIGINT, SIGTERM or SIGHUP, or when `max_time_s` are over.

    The second signal ends the process at once. A SIGHUP that is ignored stays so: what `nohup` starts is to go on.
    """

    def __init__(self, max_time_s: float | None = None) -> None:
        self.signal: int | None = None
        self._deadline = None if max_time_s is None else time.monotonic() + max_time_s

    def reason(self) -> str | None:
        """Why to stop; None to go on."""
        if self.signal is not None:
            return "signal"
        return "max_time_s" if self._deadline is not None and time.monotonic() > self._deadline else None

    @contextmanager
    def listening(self):
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._receive) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        is_hangup = number == signal.SIGHUP  # which may come several times when a terminal closes
        if self.signal not in (None, signal.SIGHUP) and not is_hangup:
            os._exit(128 + number)
        is_first = self.signal is None
        if is_first or not is_hangup:
            self.signal = number
        if is_first:
            with suppress(OSError):  # the terminal may be gone
                # Not by print, which may be at work where the signal came.
                os.write(2, b"\nstopping, with a checkpoint of all steps done; once more to stop at once\n")
