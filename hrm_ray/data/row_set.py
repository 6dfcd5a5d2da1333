"""A set of token rows that can be asked, exactly and fast, which of a million rows are in it."""

import numpy as np

from hrm_ray.data.keyed_random import mix
from hrm_ray.machine_code import njit

_PRIME = np.uint64(0x100000001B3)  # FNV-1a, mixed once at the end
_BASIS = np.uint64(0xCBF29CE484222325)


@njit()
def _hash_rows(rows):
    hashes = np.empty(len(rows), np.uint64)
    for i in range(len(rows)):
        x = _BASIS
        for value in rows[i]:
            x = (x ^ np.uint64(value)) * _PRIME
        hashes[i] = mix(x)
    return hashes


@njit()
def _contains(members, hashes, rows, row_hashes):
    found = np.zeros(len(rows), np.bool_)
    first = np.searchsorted(hashes, row_hashes)
    for i in range(len(rows)):
        member = first[i]
        # Equal hashes prove nothing: compare the rows themselves.
        while member < len(hashes) and hashes[member] == row_hashes[i] and not found[i]:
            found[i] = (members[member] == rows[i]).all()
            member += 1
    return found


class RowSet:
    """The rows of `rows`, uint8[n, S]."""

    def __init__(self, rows: np.ndarray):
        hashes = _hash_rows(_words(rows))
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._rows = hashes[order], np.ascontiguousarray(rows[order])

    def contains(self, rows: np.ndarray) -> np.ndarray:
        """Which rows (uint8[m, S]) are in the set; bool[m]."""
        if not len(self._rows):
            return np.zeros(len(rows), bool)
        return _contains(self._rows, self._hashes, rows, _hash_rows(_words(rows)))


def _words(rows: np.ndarray) -> np.ndarray:
    """The same bytes in fewer numbers, where a row can be divided."""
    return np.ascontiguousarray(rows).view(np.uint32) if rows.shape[1] % 4 == 0 else rows
