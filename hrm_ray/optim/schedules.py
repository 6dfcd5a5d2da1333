"""Learning rates as pure functions of the one clock, the optimizer step."""

import math


def warmup_cosine(step: int, total_steps: int, *, warmup_steps: int, min_ratio: float) -> float:
    """Share of the base learning rate at optimizer step `step`, counted from 1.

    Linear from 0 over `warmup_steps`, then half a cosine down to `min_ratio` at `total_steps`: the published
    schedule, which increases its counter before reading it, so the first step uses 1 / warmup_steps.
    """
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
