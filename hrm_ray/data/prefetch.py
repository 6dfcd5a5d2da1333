"""Makes what the next step needs while this one runs: reads of mapped files may have to wait for a disk.

What always holds: a value is a function of its key alone, so it does not matter who makes it, or when.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """The values of `make` for keys that are mostly asked for in turn.

    Its thread ends with it, unless `make` refers to it.

    Args:
        make: computes the value of a key (a whole number); the value must not be changed. Called in a thread of its
            own, once at a time; not to launch anything on a GPU, where the step at hand may just be recorded.
        last: no key after this one is made ahead.
    """

    def __init__(self, make: Callable[[int], T], last: int):
        self._make, self._last = make, last
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._begun: dict[int, Future[T]] = {}  # what was asked for at last, and the next

    def get(self, key: int) -> T:
        """The value of `key`, and begin that of the next. Raises what `make` raised for `key`; then ask again."""
        wanted = [key, *([key + 1] if key < self._last else [])]
        self._begun = {k: self._begun.get(k) or self._thread.submit(self._make, k) for k in wanted}
        try:
            return self._begun[key].result()
        except Exception:
            del self._begun[key]
            raise
