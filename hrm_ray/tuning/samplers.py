"""Optuna's samplers and pruners by the names of a sweep's YAML.

A sampler is made for every trial, its random numbers keyed by (seed, number of the trial): so it proposes after a
restart what it would have proposed without one. Pruners keep no state but the values in the study.
"""

import inspect
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import optuna

from hrm_ray.config.validate import nearest
from hrm_ray.errors import UserError


class Grid(optuna.samplers.GridSampler):
    """Optuna's, which at the end of the grid stops a loop of Optuna's own; here there is none."""

    def after_trial(self, *about: Any) -> None:
        pass


SAMPLERS: dict[str, type[optuna.samplers.BaseSampler]] = {
    "tpe": optuna.samplers.TPESampler,
    "random": optuna.samplers.RandomSampler,
    "grid": Grid,
    "gp": optuna.samplers.GPSampler,
    "cmaes": optuna.samplers.CmaEsSampler,
    "qmc": optuna.samplers.QMCSampler,
    "nsga2": optuna.samplers.NSGAIISampler,
    "nsga3": optuna.samplers.NSGAIIISampler,
}
# Their order is drawn once for all trials.
DRAWN_ONCE = ("grid", "qmc")
PRUNERS: dict[str, type[optuna.pruners.BasePruner]] = {
    "successive_halving": optuna.pruners.SuccessiveHalvingPruner,
    "hyperband": optuna.pruners.HyperbandPruner,
    "median": optuna.pruners.MedianPruner,
    "percentile": optuna.pruners.PercentilePruner,
    "threshold": optuna.pruners.ThresholdPruner,
    "wilcoxon": optuna.pruners.WilcoxonPruner,
}
FACTOR = 3  # of which one trial goes on, at every rung


def sampler(
    named: Mapping[str, Any], number: int, *, grid: Mapping[str, list[Any]] | None, is_conditional: bool
) -> optuna.samplers.BaseSampler:
    """The sampler that chooses the point of trial `number`.

    Args:
        named: `name` and options of Optuna's class; `seed` is 0 unless given.
        grid: all values of every key; None if they cannot be listed.
        is_conditional: whether some keys are there for some values of others only.

    Raises:
        UserError: an unknown name or option, or one that does not suit the space.
    """
    options = dict(named)
    name = options.pop("name", "tpe")
    kind = _known(SAMPLERS, name, "sampler")
    seed = options.pop("seed", 0)
    if not isinstance(seed, int) or seed < 0:
        raise UserError(f"sampler: seed={seed!r} is no whole number")
    if name not in DRAWN_ONCE:
        seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    defaults: dict[str, Any] = {}
    if name == "tpe":
        defaults = {"multivariate": True, "group": is_conditional, "constant_liar": True}
    if name == "grid":
        if grid is None:
            raise UserError(
                "sampler: grid needs keys with choice:, int: or step: only, and no when:; take tpe or random"
            )
        defaults = {"search_space": grid}
    return _made(kind, {**defaults, **options, "seed": seed}, f"sampler: {name}")


def pruner(
    named: Mapping[str, Any] | None, *, first_step: int, last_step: int, is_turned: bool = False
) -> optuna.pruners.BasePruner:
    """The pruner of a sweep; its steps are optimizer steps.

    Args:
        named: `name` and options of Optuna's class; None: nothing is pruned.
        first_step, last_step: at which the metric is reported first, and last.
        is_turned: whether the study holds the watched metric with its sign turned.

    Raises:
        UserError: an unknown name or option.
    """
    if named is None:
        return optuna.pruners.NopPruner()
    options = {key: value for key, value in named.items() if key not in ("name", "metric")}
    name = named.get("name", "successive_halving")
    kind = _known(PRUNERS, name, "pruner")
    defaults: dict[str, Any] = {}
    if name == "successive_halving":
        defaults = {"min_resource": first_step, "reduction_factor": FACTOR}
    elif name == "hyperband":
        defaults = {"min_resource": first_step, "max_resource": last_step, "reduction_factor": FACTOR}
        for key, least, most in (("min_resource", 1, last_step), ("reduction_factor", 2, last_step)):
            value = options.get(key)  # which Optuna does not check
            if key in options and not (isinstance(value, int) and least <= value <= most):
                raise UserError(f"pruner: hyperband: {key}={value} is no whole number from {least} to {most}")
    elif name == "percentile":
        defaults = {"percentile": 25.0}
    elif name == "threshold" and is_turned:
        turned = {"lower": "upper", "upper": "lower"}
        options = {turned.get(key, key): -value if key in turned else value for key, value in options.items()}
    return _made(kind, {**defaults, **options}, f"pruner: {name}")


def rungs(named: Mapping[str, Any] | None, *, first_step: int, last_step: int) -> list[tuple[int, float]]:
    """(step, share of the trials that train up to it) of successive halving and Hyperband; of others, the whole run."""
    name = None if named is None else named.get("name")
    if named is None or name not in ("successive_halving", "hyperband"):
        return [(last_step, 1.0)]
    factor = named.get("reduction_factor", FACTOR)
    first = named.get("min_resource", first_step)
    first = first if isinstance(first, int) else first_step  # "auto"
    if name == "hyperband":
        brackets = _brackets(first, last_step, factor)
    else:
        brackets = {named.get("min_early_stopping_rate", 0): 1.0}
    found = []
    number = min(brackets)
    while (step := first * factor**number) < last_step:
        found.append((step, number))
        number += 1
    # A bracket leaves `factor` times fewer trials at every rung from its first one on.
    shares = [
        (step, sum(share * factor ** -max(0, number - begin) for begin, share in brackets.items()))
        for step, number in [*found, (last_step, number)]
    ]
    return [(int(step), share) for step, share in shares]


def _brackets(first_step: int, last_step: int, factor: int) -> dict[int, float]:
    """Hyperband's: the number of the rung at which each begins to give trials up, and its share of all trials."""
    num = math.floor(math.log(last_step / first_step, factor)) + 1
    # Li et al. 2018, "Hyperband", algorithm 1, as Optuna has it.
    weights = [math.ceil(num * factor ** (num - 1 - begin) / (num - begin)) for begin in range(num)]
    return {begin: weight / sum(weights) for begin, weight in enumerate(weights)}


def _known(kinds: Mapping[str, Any], name: Any, what: str) -> Any:
    if not isinstance(name, str) or name not in kinds:
        raise UserError(f"unknown {what} '{name}'; {nearest(str(name), kinds)}")
    return kinds[name]


def _made(kind: Any, options: dict[str, Any], where: str) -> Any:
    known = [key for key in inspect.signature(kind).parameters if key != "self"]
    for key in options:
        if key not in known:
            raise UserError(f"{where}: unknown option '{key}'; {nearest(key, known)}")
    try:
        return kind(**options)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from None
