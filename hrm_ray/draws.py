"""Random numbers of training: raw Philox words (Salmon et al. 2011) keyed by seed, purpose and counter.

What is drawn depends on the key alone, so there is no state to save and any number of workers draws the same. numpy
promises that these words never change, which it does not for its shuffles.
"""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a stream of random words is for; part of the key, so that no two purposes share a stream."""

    GROUP_ORDER = 0
    PUZZLE_CHOICE = 1
    EXPLORATION = 2
    CHOICE = 3
    REPLAY = 4
    VISIT = 5
    NOISE = 6
    FILLING = 7
    UPDATE_NOISE = 8
    WEIGHT_NOISE = 9
    SAMPLE = 10


def words(seed: int, purpose: int, counter: int, count: int) -> np.ndarray:
    """uint64 [count], a pure function of the key (seed, purpose, counter)."""
    key = np.array([seed, purpose], dtype=np.uint64)
    position = np.array([0, 0, 0, counter], dtype=np.uint64)
    return np.random.Philox(key=key, counter=position).random_raw(count)


def uniform(words: np.ndarray) -> np.ndarray:
    """A number from [0, 1) for each of `words`, float64."""
    return (words >> np.uint64(11)) * 2.0**-53
