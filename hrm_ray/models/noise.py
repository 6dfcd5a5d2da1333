"""Gaussian noise by key: what is drawn depends on its key alone, not on the batch, the device or the number of workers.

The generator is SplitMix64, as in `hrm_ray.data.keyed_random`, in integers of torch, which are exact on every device.
Each of its words gives four numbers: 16 bits choose one of 65,536 quantiles of the normal distribution, from a table
that is made on the host. So there is no logarithm or cosine, whose last bits differ by device, and a number costs
little. The largest is 4.3 standard deviations.
"""

from functools import lru_cache

import torch
from torch import Tensor

_GOLDEN, _MIX_1, _MIX_2 = (
    x - 2**64 for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)  # as int64
NUMBERS_A_WORD = 4
_NUM_QUANTILES = 2**16


def mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser of int64, taken as unsigned; `x` is not changed."""
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        x = (x ^ ((x >> shift).bitwise_and_(2 ** (64 - shift) - 1))).mul_(factor)
    return x ^ ((x >> 31) & (2**33 - 1))


def key_of(seed: int | Tensor, *parts: int | Tensor) -> Tensor:
    """The random stream of (seed, parts, ...), int64; see `hrm_ray.data.keyed_random.stream`."""
    key = mix(torch.as_tensor(seed) + _GOLDEN)
    for part in parts:
        key = mix((key ^ part) + _GOLDEN)
    return key


def keys_of_rows(rows_BC: Tensor) -> Tensor:
    """A key of what stands in each row of integers; int64 [B]."""
    places = torch.arange(1, rows_BC.shape[1] + 1, device=rows_BC.device) * _GOLDEN
    return mix(mix(rows_BC.long() + mix(places)).sum(1))


def _uniform(keys_R: Tensor, count: int) -> Tensor:
    """`count` integers from 0 to 65,535 of the stream of each key (int64 [R]); int32 [R, count]."""
    num_words = -(-count // NUMBERS_A_WORD)
    counters = torch.arange(1, num_words + 1, device=keys_R.device) * _GOLDEN
    sixteen_bits = mix(keys_R[:, None] + counters).view(torch.int16)[:, :count]
    return sixteen_bits.int().add_(_NUM_QUANTILES // 2)


def below(share: float, keys_R: Tensor, count: int) -> Tensor:
    """`count` times of each key's stream (int64 [R]), whether something with probability `share` happens; bool."""
    return _uniform(keys_R, count) < round(share * _NUM_QUANTILES)


class Noise:
    """Numbers from a normal distribution around 0.

    Args:
        std: standard deviation.
        dtype, device: of the numbers.
    """

    def __init__(self, std: float, dtype: torch.dtype, device: torch.device):
        centres = (torch.arange(_NUM_QUANTILES, dtype=torch.float64) + 0.5) / _NUM_QUANTILES
        self._quantiles = (std * torch.special.ndtri(centres)).to(dtype).to(device)

    def draw(self, keys_R: Tensor, count: int) -> Tensor:
        """`count` numbers of the stream of each key (int64 [R]); [R, count]."""
        index = _uniform(keys_R, count)
        return self._quantiles.index_select(0, index.flatten()).view(index.shape)


@lru_cache(maxsize=8)
def noise_of(std: float, dtype: torch.dtype, device: torch.device) -> Noise:
    """The `Noise` of these, made once."""
    return Noise(std, dtype, device)
