"""Everything that changes over a run, as pure functions of the one clock: (global_step, total_steps).

Nothing here counts by itself: how often a model or a loss is called moves no schedule, and a resumed run goes on where
the clock stands. Durations are ratios of `total_steps`.
"""

import math
from typing import Literal

Shape = Literal["linear", "cosine", "exponential"]

EXPONENTIAL_RATE = 5.0


def anneal(step: int, total_steps: int, *, start: float, end: float, ratio: float, shape: Shape) -> float:
    """From `start` at step 0 to `end`, which is reached exactly at step `ratio` x `total_steps` and kept.

    Args:
        shape: "linear"; "cosine": half a cosine, smooth at both ends; "exponential": 1 - exp(-5x), fast early and slow
            later, scaled so that it ends at `end`.
    """
    # As a share of the run, since 0.55 x 100 is more than 55 in floating point and 55 / 100 is 0.55.
    share = step / total_steps
    if share >= ratio:
        return end
    x = max(0.0, share / ratio)
    if shape == "cosine":
        x = 0.5 * (1 - math.cos(math.pi * x))
    elif shape == "exponential":
        x = math.expm1(-EXPONENTIAL_RATE * x) / math.expm1(-EXPONENTIAL_RATE)
    return start + (end - start) * x


def first_step_at(ratio: float, total_steps: int) -> int:
    """The first step that is `ratio` of the run or more."""
    step = math.ceil(ratio * total_steps)
    return step - 1 if step and (step - 1) / total_steps >= ratio else step


def warmup_cosine(step: int, total_steps: int, *, warmup_steps: float, min_ratio: float) -> float:
    """Share of the base learning rate at optimizer step `step`, counted from 1.

    Linear from 0 over `warmup_steps`, then half a cosine down to `min_ratio` at `total_steps`: the published
    schedule, which increases its counter before reading it, so the first step uses 1 / warmup_steps.
    """
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
