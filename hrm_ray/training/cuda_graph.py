"""Records what a function launches on a GPU once, as a CUDA graph, and launches all of it at once from then on.

Of a small model's step the GPU spends less time in the kernels than Python in launching one after another. What is
recorded is memory addresses and numbers: everything that may differ between two calls must be a tensor.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

NUM_WARMUPS = 3  # calls before a recording, in which libraries choose kernels and allocate what they keep

Replay = Callable[[], None]


def capture(function: Callable[[], Any]) -> tuple[Replay, Any]:
    """Record `function` on the current GPU. Waits for the GPU.

    Returns:
        what does it again, and its results, which are written anew each time.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(NUM_WARMUPS):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = function()
    return graph.replay, results


class Recorded:
    """A function whose calls are replayed where their like has been recorded, and are as usual elsewhere.

    Calls are alike if their arguments have the same structure, shapes and dtypes, and the same values where they are no
    tensors. What the function writes besides its results must stay where it is.

    Args:
        function: of tensors, numbers, and (named) tuples of such; it must wait for nothing the GPU computes.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self._programs: dict[Any, tuple[Replay, list[Tensor], Any]] = {}

    def record(self, *args: Any) -> None:
        """Record calls like this one. Calls the function a few times."""
        leaves, spec = tree_flatten(args)
        places = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        replay, results = capture(lambda: self.function(*tree_unflatten(places, spec)))
        self._programs[_kind(leaves, spec)] = replay, _tensors(places), results

    def __call__(self, *args: Any) -> Any:
        leaves, spec = tree_flatten(args)
        program = self._programs.get(_kind(leaves, spec))
        if program is None:
            return self.function(*args)
        replay, places, results = program
        for place, given in zip(places, _tensors(leaves), strict=True):
            place.copy_(given)
        replay()
        # Copies, since the next replay writes over them.
        return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, results)


def _tensors(leaves: list[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _kind(leaves: list[Any], spec: TreeSpec) -> Any:
    parts = [(leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return tuple(parts), spec
