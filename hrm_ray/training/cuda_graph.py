"""Records what a function launches on a GPU once, as a CUDA graph, and launches all of it at once from then on.

Of a small model's step the GPU spends less time in the kernels than Python in launching one after another. What is
recorded is memory addresses and numbers: everything that may differ between two calls must be a tensor.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

NUM_WARMUPS = 3  # calls before a recording, in which libraries choose kernels and allocate what they keep

Replay = Callable[[], None]


class GraphMemory:
    """The stream and the memory of recordings that are not replayed at the same time; nothing of them outlives a replay
    but what is copied."""

    @cached_property
    def stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream()

    @cached_property
    def pool(self) -> Any:
        return torch.cuda.graph_pool_handle()


def capture(function: Callable[[], Any], memory: GraphMemory) -> tuple[Replay, Any]:
    """Record `function` on the current GPU. Waits for the GPU.

    Returns:
        what does it again, and its results, which are written anew each time.

    Raises:
        RuntimeError: it waits for the GPU, or does what else cannot be recorded.
    """
    stream = memory.stream
    stream.wait_stream(torch.cuda.current_stream())
    mode = torch.cuda.get_sync_debug_mode()
    # Also leaves the stream if the recording fails, which torch's own context does not do then.
    with torch.cuda.stream(stream):
        function()
        # Here, since a recording that fails in its middle leaves more behind.
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(NUM_WARMUPS - 1):
                function()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=memory.pool, stream=stream):
                results = function()
        except RuntimeError as error:
            raise _first(error) from None
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay, results


def _first(error: BaseException) -> BaseException:
    """What was wrong before `error` came of it."""
    while error.__context__ is not None:
        error = error.__context__
    return error


class Recordings:
    """Calls of functions that can be replayed.

    Calls are alike if their arguments, (named) tuples of tensors and other values, have the same structure, shapes,
    dtypes and devices, and the same values where they are no tensors.
    """

    def __init__(self) -> None:
        self._memory = GraphMemory()
        self._programs: dict[Any, tuple[Replay, list[Tensor], Any]] = {}

    def __bool__(self) -> bool:
        return bool(self._programs)

    def record(self, function: Callable[..., Any], *args: Any) -> bool:
        """Record the call of `function` with such arguments, unless that was done before; calls it a few times.

        What it writes besides its results must stay where it is.

        Returns:
            whether it is new.
        """
        leaves, spec = tree_flatten(args)
        kind = _kind(leaves, spec)
        if kind in self._programs:
            return False
        if len({leaf.device for leaf in _tensors(leaves)}) > 1:
            raise RuntimeError("the arguments are on several devices")
        places = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        replay, results = capture(lambda: function(*tree_unflatten(places, spec)), self._memory)
        self._programs[kind] = replay, _tensors(places), results
        return True

    def replay(self, *args: Any) -> Any:
        """The results of the recorded call with such arguments; None if there is none."""
        leaves, spec = tree_flatten(args)
        program = self._programs.get(_kind(leaves, spec))
        if program is None:
            return None
        replay, places, results = program
        for place, given in zip(places, _tensors(leaves), strict=True):
            place.copy_(given)
        replay()
        # Copies, since the next replay writes over them.
        return tree_map_only(Tensor, Tensor.clone, results)


def _tensors(leaves: list[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _kind(leaves: list[Any], spec: TreeSpec) -> Any:
    parts = [
        (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else (type(leaf), leaf)
        for leaf in leaves
    ]
    return tuple(parts), spec
