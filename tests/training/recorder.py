"""What a CUDA graph keeps, without a GPU: operations are recorded with their memory and numbers, and done again.

What it does not know: streams, memory that is used again, and copies between Python's memory and the GPU's but for
those that fill a new tensor.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# What makes a GPU and Python wait for each other: a value or a shape is read, or a new tensor is filled by Python.
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default}
WAITS |= {aten.lift_fresh.default, aten.equal.default, aten._unique2.default, aten.bincount.default}
WAITS |= {aten.repeat_interleave.Tensor}
BY_INDEX = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class Recorder(TorchDispatchMode):
    """Records the operations inside; `replay` does them again where they were."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        picks_by_mask = func in BY_INDEX and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if func in WAITS or picks_by_mask:
            raise RuntimeError(f"called a synchronizing operation: {func}")
        results = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, results))
        return results

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, results in self.calls:
            again = func(*args, **kwargs)
            for place, value in zip(tree_leaves(results), tree_leaves(again), strict=True):
                if isinstance(place, Tensor) and place.data_ptr() != value.data_ptr():
                    place.copy_(value)


def capture(function: Callable[[], Any], memory: Any) -> tuple[Callable[[], None], Any]:
    """In place of `cuda_graph.capture`."""
    function()
    with Recorder() as recorder:
        results = function()
    return recorder.replay, results
