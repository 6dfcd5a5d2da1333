"""How many steps a sweep over data sets of equations took, over the share of the equations in training.

The figure of Power et al.: with fewer equations it takes longer to generalise, and below some share it does not happen
within the budget. A trial has got there if `stop_at` ended it.
"""

import math
import statistics
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from hrm_ray.data.shards import open_dataset
from hrm_ray.errors import UserError
from hrm_ray.tuning.study import OUTCOME, ReadStudy

KEYS = ("data_path", "data")  # of a space, that choose a data set


@dataclass(frozen=True)
class Reached:
    """What the seeds of one operator and share came to.

    Attributes:
        steps: of those that got there, ascending.
        num_missed: how many did not.
    """

    steps: list[int]
    num_missed: int

    @property
    def num_seeds(self) -> int:
        return len(self.steps) + self.num_missed

    @property
    def median(self) -> float | None:
        """Of the steps, where a seed that did not get there took longer than any; None: it is one of these."""
        median = statistics.median([*self.steps, *[math.inf] * self.num_missed])
        return median if math.isfinite(median) else None


def over_fraction(study: ReadStudy) -> dict[str, dict[float, Reached]]:
    """What complete trials came to, by operator and by share of the equations in training, ascending.

    Nothing where the sweep is over no such data sets, or none of its trials has got there.
    """
    key = next((key for key in KEYS if key in study.config.space), None)
    if key is None:
        return {}
    found: dict[tuple[str, float], list[int | None]] = {}
    for trial in study.trials(TrialState.COMPLETE):
        for recipe in _recipes(trial, key):
            place = str(recipe["op"]), float(recipe["train_fraction"])
            found.setdefault(place, []).append(_steps(trial))
    if not any(steps for group in found.values() for steps in group):
        return {}
    lines: dict[str, dict[float, Reached]] = {}
    for (op, fraction), group in sorted(found.items()):
        there = sorted(steps for steps in group if steps is not None)
        lines.setdefault(op, {})[fraction] = Reached(there, group.count(None))
    return lines


def _recipes(trial: FrozenTrial, key: str) -> Iterator[dict[str, Any]]:
    """The recipe of the data set of a trial, if that is there and of equations."""
    with suppress(UserError, OSError):
        recipe = open_dataset(trial.params[key]).manifest.recipe
        if "op" in recipe and "train_fraction" in recipe:
            yield recipe


def _steps(trial: FrozenTrial) -> int | None:
    outcome = trial.user_attrs.get(OUTCOME, {})
    return outcome["global_step"] if outcome.get("stop_reason") == "stop_at" else None
