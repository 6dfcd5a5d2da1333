"""Functions compiled by numba, kept on disk where that is possible. Several threads may run them at the same time.

numba itself refuses to compile what is to be kept if no folder can be written, if the disk is full, or if what it
kept is damaged. Here each of these costs the compilation at every start, nothing else.
"""

import warnings
from collections.abc import Callable
from contextlib import suppress
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
