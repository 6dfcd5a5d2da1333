"""How well the mean of a few runs is known."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

LEVEL = 0.95


def confidence(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, standard deviation, half of the 95 % confidence interval of the mean), by Student's t.

    Args:
        values: at least two, taken to be drawn from one normal distribution.

    Raises:
        ValueError: fewer than two.
    """
    if len(values) < 2:
        raise ValueError("a confidence interval needs at least two values")
    from scipy.stats import t  # takes seconds to import

    mean, std = statistics.fmean(values), statistics.stdev(values)
    quantile = float(t.ppf((1 + LEVEL) / 2, len(values) - 1))
    return mean, std, quantile * std / math.sqrt(len(values))


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation and half of the 95 % interval of the mean; the last two null for one value."""
    if len(values) < 2:
        return {"values": list(values), "mean": statistics.fmean(values), "std": None, "half_width": None}
    mean, std, half_width = confidence(values)
    return {"values": list(values), "mean": mean, "std": std, "half_width": half_width}
