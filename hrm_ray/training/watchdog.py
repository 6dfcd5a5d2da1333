"""Ends a process that hangs, so that whoever started it can start another from the last checkpoint."""

import faulthandler
import os
import sys
import threading
import time

from hrm_ray.errors import RunFailed


class Watchdog:
    """Ends this process, with the stacks of its threads on standard error, when `beat` is not called for long.

    It watches from the first `beat` on, so that a slow start (data to fetch, kernels to compile) is no hang.

    Args:
        timeout_s: seconds between two beats that count as a hang; None: never.
    """

    def __init__(self, timeout_s: float | None):
        self._timeout_s = timeout_s
        self._beat_at: float | None = None
        self._closed = threading.Event()
        if timeout_s is not None:
            threading.Thread(target=self._watch, args=(timeout_s,), name="watchdog", daemon=True).start()

    def beat(self) -> None:
        """Say that there is progress."""
        self._beat_at = time.monotonic()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _watch(self, timeout_s: float) -> None:
        pause_s = min(1.0, timeout_s / 4)
        looked_at = time.monotonic()
        while not self._closed.wait(pause_s):
            now = time.monotonic()
            stood_still = now - looked_at > timeout_s / 2 + pause_s  # the whole process, as after Ctrl-Z
            looked_at = now
            if self._beat_at is None:
                continue
            if stood_still:
                self.beat()
            if time.monotonic() - self._beat_at > timeout_s:
                print(
                    f"no progress for {timeout_s:g} s (watchdog_s): this process hangs and is stopped; under Ray the "
                    "run continues by itself, otherwise the same command continues it",
                    file=sys.stderr,
                )
                faulthandler.dump_traceback(all_threads=True)
                sys.stderr.flush()
                os._exit(RunFailed.exit_code)
