"""Seconds that calls take, in turns, since machines are shared and noisy; the medians and ratios of one run count."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

NUM_WARMUPS = 2
# Clock cycles that a GPU sleeps before what is timed, to launch all of it meanwhile: at first some 5 ms, at most 10 s.
HEAD_START_CYCLES, MAX_HEAD_START_CYCLES = 10_000_000, 20_000_000_000


def in_turns(
    calls: Mapping[str, Callable[[], object]], rounds: int, *, kernels_only: bool = False
) -> dict[str, list[float]]:
    """Seconds of each of the calls, `rounds` times after a warm-up.

    Args:
        kernels_only: on a GPU without the time that launching takes, which a long run hides behind the kernels
            before. Calls must not wait for the GPU, else RuntimeError.
    """
    on_gpu = torch.cuda.is_available()
    clock = _wall if not on_gpu else (_kernels if kernels_only else _finished)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(NUM_WARMUPS + rounds):
        for name, call in calls.items():
            seconds = clock(call)
            if i >= NUM_WARMUPS:
                times[name].append(seconds)
    return times


def medians_ms(times: Mapping[str, list[float]]) -> dict[str, float]:
    """Median milliseconds by name."""
    return {name: statistics.median(values) * 1e3 for name, values in times.items()}


def _wall(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _finished(call: Callable[[], object]) -> float:
    """From an idle GPU to an idle GPU."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def _kernels(call: Callable[[], object]) -> float:
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cycles = HEAD_START_CYCLES
    while cycles <= MAX_HEAD_START_CYCLES:
        torch.cuda._sleep(cycles)
        started.record()
        call()
        ended.record()
        was_idle = not started.query()
        torch.cuda.synchronize()
        if was_idle:
            return started.elapsed_time(ended) / 1e3
        cycles *= 4
    raise RuntimeError("what is timed waits for the GPU")
