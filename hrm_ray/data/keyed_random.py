"""Counter-based random numbers: what is drawn depends on a key, never on who draws it or when.

A key such as (seed, group, augmentation) names its own stream, so any number of workers, in any order, draws the
same. The generator is SplitMix64 (Steele, Lea and Flood 2014): a counter stepped by the golden ratio and mixed.

Every constant and operand is spelt as uint64: numba turns a mixed int64/uint64 expression into float64.
"""

import numpy as np

from hrm_ray.machine_code import njit

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_27, _30, _31, _32 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(32)


@njit()
def mix(x):
    """SplitMix64's finaliser: a bijection of uint64 in which every input bit reaches every output bit."""
    x = (x ^ (x >> _30)) * _MIX_1
    x = (x ^ (x >> _27)) * _MIX_2
    return x ^ (x >> _31)


@njit()
def stream(seed, first, second):
    """The start of the random stream of the key (seed, first, second), a uint64."""
    x = mix(np.uint64(seed) + _GOLDEN)
    x = mix((x ^ np.uint64(first)) + _GOLDEN)
    return mix((x ^ np.uint64(second)) + _GOLDEN)


@njit()
def below(state, bound):
    """Step the stream `state` (uint64[1]) and draw an integer of 0..bound-1; biased by less than bound / 2^32."""
    state[0] += _GOLDEN
    return np.int64(((mix(state[0]) >> _32) * np.uint64(bound)) >> _32)


@njit()
def shuffle(state, items):
    """Fisher-Yates, in place."""
    for last in range(items.size - 1, 0, -1):
        other = below(state, last + 1)
        items[last], items[other] = items[other], items[last]


@njit()
def row_keys(seed, purpose, rows):
    """One random uint64 for each row number (int64[n]). The k smallest keys are a uniform sample of k rows."""
    keys = np.empty(rows.size, np.uint64)
    for i in range(rows.size):
        keys[i] = stream(seed, purpose, rows[i])
    return keys
