"""Records what a function launches on a GPU once, as a CUDA graph, and launches all of it at once from then on.

Of a small model's step the GPU spends less time in the kernels than Python in launching one after another. What is
recorded is memory addresses and numbers: everything that may differ between two calls must be a tensor.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map_only, tree_unflatten

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
        a function that repeats it, and its results, which every repetition overwrites.

    Raises:
        RuntimeError: it waits for the GPU, or does what else cannot be recorded.
    """
    stream, cause = memory.stream, None
    stream.wait_stream(torch.cuda.current_stream())
    # Also leaves the stream if the recording fails, which torch's own context does not do then.
    with torch.cuda.stream(stream):
        try:
            function()
            with (
                _waiting_is_an_error()
            ):  # here, since a recording that fails in its middle leaves more behind
                for _ in range(NUM_WARMUPS - 1):
                    function()
            graph = torch.cuda.CUDAGraph()
            # What other threads do on the GPU meanwhile does not end it.
            with torch.cuda.graph(graph, pool=memory.pool, stream=stream, capture_error_mode="thread_local"):
                try:
                    results = function()
                except Exception as error:
                    cause = error  # what torch raises at the end of a broken recording does not say it
                    raise
        except Exception as error:
            torch.cuda.synchronize()  # what is queued still writes to memory that is about to be freed
            with suppress(Exception):  # where torch does not: else memory would never be given back again
                torch._C._cuda_endAllocateToPool(stream.device_index, memory.pool)
            raise (cause or error) from None
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay, results


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    """Inside, an operation that waits for the GPU raises RuntimeError."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)


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


def is_the_same(
    recordings: Recordings, function: Callable[..., Any], gradients: Sequence[Tensor], *args: Any
) -> bool:
    """Whether the replay of a call does what the call does; `gradients` are what it adds to, and are overwritten."""
    outcomes = []
    for call in (function, recordings.replay):
        torch._foreach_zero_(list(gradients))
        results = tree_leaves(call(*args))
        outcomes.append([*results, *(gradient.clone() for gradient in gradients)])
    return all(_is_like(a, b) for a, b in zip(*outcomes, strict=True) if isinstance(a, Tensor))


def _is_like(a: Tensor, b: Tensor) -> bool:
    """Equal up to the order of summation, which some kernels leave open, and what it tips."""
    if not a.is_floating_point():
        return int((a != b).sum()) <= max(1, a.numel() // 100)
    if not torch.equal(a.isfinite(), b.isfinite()):
        return False
    a, b = (x.float().nan_to_num(0, 0, 0) for x in (a, b))
    return bool((a - b).norm() <= 1e-2 * a.norm())


def _tensors(leaves: list[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _kind(leaves: list[Any], spec: TreeSpec) -> Any:
    parts = [
        (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else (type(leaf), leaf)
        for leaf in leaves
    ]
    return tuple(parts), spec
