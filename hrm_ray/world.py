"""The workers of a run and the few collectives the loop needs; one worker needs no torch.distributed."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


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

    def merge_objects(self, value: Any, merge: Callable[[Iterator[Any]], T]) -> T:
        """What `merge` makes of every worker's `value`, on all.

        It is called on the first worker, and sees the values in the order of ranks, each once. They arrive as it asks
        for them: one is held at a time. What it raises, all workers raise.
        """
        if self.size == 1:
            return merge(iter((value,)))
        if not self.is_first:
            dist.send_object_list([value], dst=0)
            return self._result(self.from_first(None))
        values, merged, error = self._arriving(value), None, None
        try:
            merged = merge(values)
        except Exception as problem:  # the others wait for what comes of it
            error = problem
        for _ in values:  # what it did not ask for
            pass
        return self._result(self.from_first((merged, error)))

    def _result(self, outcome: tuple[Any, Exception | None]) -> Any:
        result, error = outcome
        if error is not None:
            raise error
        return result

    def _arriving(self, own: Any) -> Iterator[Any]:
        yield own
        for rank in range(1, self.size):
            box = [None]
            dist.recv_object_list(box, src=rank)
            yield box[0]

    def from_first(self, value: Any) -> Any:
        """The first worker's `value`, on all."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]
