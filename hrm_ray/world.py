"""The workers of a run and the few collectives the loop needs; one worker needs no torch.distributed."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This worker's place among all. Every method but `slots` is collective: all workers call it alike."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def slots(self, global_count: int) -> slice:
        """The run of consecutive global slots that this worker owns; shares differ by one at most."""
        return self._slots_of(self.rank, global_count)

    def _slots_of(self, rank: int, global_count: int) -> slice:
        return slice(rank * global_count // self.size, (rank + 1) * global_count // self.size)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over workers, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor, global_count: int) -> Tensor:
        """All workers' rows in the order of ranks, where `tensor` has a row for each of this worker's slots."""
        if self.size == 1:
            return tensor
        counts = [len(range(global_count)[self._slots_of(rank, global_count)]) for rank in range(self.size)]
        padded = tensor.new_zeros(max(counts), *tensor.shape[1:])  # the collective wants equal shapes
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def gather_objects(self, value: Any) -> list[Any]:
        """Every worker's `value`, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: Any) -> Any:
        """The first worker's `value`, on all."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]
