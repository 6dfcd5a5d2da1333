"""The workers of a run and the few collectives the loop needs; one worker needs no torch.distributed."""

from collections.abc import Callable
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
        """The run of consecutive global slots that this worker owns."""
        per_worker = global_count // self.size
        return slice(self.rank * per_worker, (self.rank + 1) * per_worker)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over workers, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    @property
    def gather(self) -> Callable[[Tensor], Tensor] | None:
        """Concatenates tensors of equal shape along their first axis in the order of ranks; None if alone."""
        return self._gather if self.size > 1 else None

    def _gather(self, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

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
