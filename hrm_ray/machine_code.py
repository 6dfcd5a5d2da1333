"""Functions compiled by numba, kept on disk where that is possible. Several threads may run them at the same time.

numba itself refuses to compile what is to be kept if no folder can be written, if the disk is full, or if what it
kept is damaged. Here each of these costs the compilation at every start, nothing else.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from threading import Lock
from typing import Any

import numba
from numba.core.caching import FunctionCache


def njit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Like the decorator `numba.njit(cache=True, nogil=True, **options)`, but the cache may be missing or broken."""

    def compiled(function: Callable[..., Any]) -> Any:
        dispatcher = numba.njit(nogil=True, **options)(function)
        try:
            dispatcher._cache = _Cache(function)  # as `cache=True` does
        except RuntimeError:
            _say_once()
        return dispatcher

    return compiled


class _Cache(FunctionCache):
    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # of any kind if the file is damaged
            with suppress(Exception):
                self.flush()  # the index of a damaged cache; it is written again
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception:  # the folder is gone, the disk is full, or the index is damaged
            _say_once()


_said = False


def _say_once() -> None:
    global _said
    if not _said:
        _said = True
        warnings.warn(
            "compiled functions cannot be kept, which costs seconds at every start; "
            "set NUMBA_CACHE_DIR to a folder that can be written",
            stacklevel=3,
        )


def in_threads(works: Iterator[Callable[[], None]], num_threads: int) -> None:
    """Do all of `works`, which are taken one after the other, by so many threads of which this is one.

    They end together. If one raises, or this thread is interrupted, what has not begun is left out.
    """
    taking = Lock()

    def work() -> None:
        while True:
            with taking:
                own = next(works, None)
            if own is None:
                return
            own()

    helpers = [_helpers(num_threads - 1).submit(work) for _ in range(num_threads - 1)]
    try:
        work()  # this thread too: it would wake late if it waited for others
    finally:
        for helper in helpers:
            if not helper.cancel():  # one that has not begun is not needed
                helper.result()


@lru_cache(maxsize=1)
def _helpers(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="machine code")


os.register_at_fork(after_in_child=_helpers.cache_clear)  # a child has none of these threads
