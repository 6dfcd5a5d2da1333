"""What is due now and then."""

import time


class Every:
    """Calling it says whether `seconds` have passed since it last said yes; the first call does."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._next = 0.0

    def __call__(self) -> bool:
        now = time.monotonic()
        due = now >= self._next
        if due:
            self._next = now + self._seconds
        return due
