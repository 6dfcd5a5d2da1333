"""Whether all workers hold the same weights, which nothing else would notice if it were not so."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

_PRIME = 1_000_003
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # all summed in int64


class WorkersDisagree(Exception):
    """The weights of some worker are not those of the others (a fault of memory, of the network, or a bug)."""


def bit_sum(tensors: Sequence[Tensor]) -> int:
    """A checksum of the bits of `tensors`, independent of the order of summation on the device."""
    sums = torch.stack([t.detach().reshape(-1).view(_BITS[t.element_size()]).sum() for t in tensors])
    checksum = 0
    for part in sums.tolist():
        checksum = (checksum * _PRIME + part) % 2**64
    return checksum


def odd_ones_out(values: Sequence[int]) -> str:
    """Names the ranks whose value is not the commonest; all of them if there is none."""
    (commonest, count), *others = Counter(values).most_common()
    if others and others[0][1] == count:
        return f"ranks {', '.join(map(str, range(len(values))))}"
    return f"ranks {', '.join(str(rank) for rank, value in enumerate(values) if value != commonest)}"


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no element is NaN or infinite."""
    return bool(torch.stack([t.isfinite().all() for t in tensors]).all())
