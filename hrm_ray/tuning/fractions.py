"""How many steps a sweep over data sets of equations took, over the share of the equations in training.

The figure of Power et al.: with fewer equations it takes longer to generalise, and below some share it does not happen
within the budget. A trial has got there if `stop_at` ended it, or its last evaluation has reached that.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from hrm_ray.config.compose import train_config
from hrm_ray.config.validate import as_text
from hrm_ray.data.shards import open_dataset
from hrm_ray.errors import UserError
from hrm_ray.tuning.study import OUTCOME, WORDS, ReadStudy, grid_of

KEYS = ("data_path", "data")  # of a space, that choose a data set
VARIANTS = ("p", "noise", "draws", "predict_end")  # of recipes, that make equations of one operator others


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

    Where recipes of one operator differ in one of `VARIANTS`, or trials in another key of the space than the seed,
    each has a line of its own, which names it. Nothing where the sweep is over no such data sets, over values that
    cannot be listed, or none of its trials has got there.
    """
    space = study.config.space
    key = next((key for key in KEYS if key in space), None)
    if key is None or grid_of(study.config) is None:
        return {}
    others = [other for other in space if other not in (key, "seed")]
    tried = [
        (recipe | {other: trial.params[other] for other in others}, _steps(study, trial))
        for trial in study.trials(TrialState.COMPLETE)
        for recipe in _recipes(trial, key)
    ]
    if all(steps is None for _, steps in tried):
        return {}
    names = _names([recipe for recipe, _ in tried], (*VARIANTS, *others))
    found: dict[tuple[str, float], list[int | None]] = {}
    for name, (recipe, steps) in zip(names, tried, strict=True):
        found.setdefault((name, float(recipe["train_fraction"])), []).append(steps)
    lines: dict[str, dict[float, Reached]] = {}
    for (name, fraction), group in sorted(found.items()):
        there = sorted(steps for steps in group if steps is not None)
        lines.setdefault(name, {})[fraction] = Reached(there, group.count(None))
    return lines


def _recipes(trial: FrozenTrial, key: str) -> Iterator[dict[str, Any]]:
    """The recipe of the data set of a trial, if that is there and of equations."""
    with suppress(UserError, OSError):
        recipe = open_dataset(trial.params[key]).manifest.recipe
        if "op" in recipe and "train_fraction" in recipe:
            yield recipe


def _names(recipes: Sequence[Mapping[str, Any]], variants: Sequence[str]) -> Iterator[str]:
    """What the line of each is called: its operator, and in which of `variants` it differs from others of that."""
    for recipe in recipes:
        alike = [other for other in recipes if other["op"] == recipe["op"]]
        differ = [key for key in variants if any(other.get(key) != recipe.get(key) for other in alike)]
        yield " ".join([recipe["op"], *(f"{key}={as_text(recipe.get(key))}" for key in differ)])


def _steps(study: ReadStudy, trial: FrozenTrial) -> int | None:
    """How many a trial took to get there; None: it did not."""
    outcome = trial.user_attrs.get(OUTCOME, {})
    if outcome.get("stop_reason") == "stop_at":
        return outcome["global_step"]
    if outcome.get("stop_reason") is None and WORDS in trial.user_attrs:  # it has done all of its steps
        with suppress(UserError):
            config = train_config(trial.user_attrs[WORDS])
            best = dict(zip(study.config.metric, trial.values, strict=True)).get(config.best_metric)
            if config.stop_at is not None and best is not None and best >= config.stop_at:
                return outcome["global_step"]
    return None
