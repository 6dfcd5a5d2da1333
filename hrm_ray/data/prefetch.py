"""Makes what the next step needs while this one runs: reads of mapped files may have to wait for a disk.

What always holds: a value is a function of its key alone, so it does not matter who makes it, or when.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """The values of `make` for keys that are mostly asked for in turn.

    Args:
        make: the value of a key (a whole number); called in a thread of its own, once at a time.
    """

    def __init__(self, make: Callable[[int], T]):
        self._make = make
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead: tuple[int, Future[T]] | None = None

    def get(self, key: int) -> T:
        """The value of `key`; the next key's is begun. Raises what `make` raised for `key`."""
        key_ahead, future = self._ahead or (None, None)
        if future is None or key_ahead != key:
            future = self._thread.submit(self._make, key)
        value = future.result()
        self._ahead = key + 1, self._thread.submit(self._make, key + 1)
        return value
