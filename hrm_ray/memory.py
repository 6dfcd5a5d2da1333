"""Memory: freed activations that are kept for the next step, and what is said where there is too little."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import clear_frames

import torch

from hrm_ray.errors import OutOfMemory, first_line

# Of glibc, see mallopt(3), by their numbers: free memory is never given back (M_TRIM_THRESHOLD, -1), and large blocks
# come from it like others (M_MMAP_MAX, -4).
MALLOC_PARAMETERS = {-1: -1, -4: 0}
# By which a user says what is to be kept.
MALLOC_VARIABLES = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_"}
# For processes whose first thread is not the one that trains. By default others have memory of their own, in pieces of
# 64 MiB, which are given back whatever the parameters say, as are larger blocks.
ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}


def keep_memory() -> bool:
    """Let this process keep what tensors on the CPU give back for those to come, until it ends.

    Every step frees its activations. By default glibc hands many of them back to the system, from which the next step
    has them page by page, each filled with zeros at first use (docs/performance.md). Nothing happens without glibc,
    nor where the user tunes it (`MALLOC_VARIABLES`, or glibc.malloc in GLIBC_TUNABLES), and little in another
    thread than the first, unless the process was started with `ONE_ARENA`.

    Returns:
        whether the memory is kept.
    """
    is_tuned = MALLOC_VARIABLES & os.environ.keys() or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or is_tuned:
        return False
    return all(mallopt(parameter, value) for parameter, value in MALLOC_PARAMETERS.items())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a GPU, or the machine, has no room for a tensor or an array."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # torch's allocator for the CPU, CUDA and NCCL, cuBLAS.
    said = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


@contextmanager
def needed_for(what: str, mend: str) -> Iterator[None]:
    """Inside, an error of a failed allocation becomes an OutOfMemory: no memory for `what`, `mend` it so."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        clear_frames(error.__traceback__)  # they hold what takes the memory
        raise OutOfMemory(f"not enough memory for {what}; {mend} ({first_line(error)})") from error
