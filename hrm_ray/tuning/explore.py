"""From the point of a good member of a population to one near it, of which a run can go on."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from hrm_ray.config.schema import TrainConfig
from hrm_ray.config.validate import as_text
from hrm_ray.data.shards import open_dataset
from hrm_ray.errors import UserError
from hrm_ray.training.checkpoint import Checkpoint
from hrm_ray.training.resume import mismatch
from hrm_ray.tuning.points import NUM_SAMPLES, Points, Refused
from hrm_ray.tuning.space import Point, Range, in_order, suggest

FACTORS = (0.8, 1.2)  # of a value whose logarithm is uniform
NUM_DRAWN = 100  # points among which those with a key are looked for
SHARE = 0.1  # of its range, by which another one moves


def mutated(
    point: Point, space: Mapping[str, Range], keys: Collection[str], resample: float, random: Random
) -> Point:
    """A point near `point`.

    Args:
        keys: that change; a key that comes in, since its condition holds now, is drawn.
        resample: probability of a value drawn from the whole range.
    """
    new: Point = {}
    for key in in_order(space):
        values = space[key]
        if not values.holds(new):
            continue
        if key not in point or (key in keys and random.random() < resample):
            new[key] = _drawn(values.distribution, random)
        else:
            new[key] = _near(values.distribution, point[key], random) if key in keys else point[key]
    return new


def _near(values: BaseDistribution, old: Any, random: Random) -> Any:
    """A value beside `old`, on either side of it; at an end of the range on the only one."""
    first = random.random() < 0.5
    for is_up in (first, not first):
        new = _moved(values, old, is_up)
        if new != old:
            return new
    return old


def _moved(values: BaseDistribution, old: Any, is_up: bool) -> Any:
    sign = 1 if is_up else -1
    if isinstance(values, CategoricalDistribution):
        texts = [as_text(choice) for choice in values.choices]
        index = texts.index(as_text(old)) + sign
        return values.choices[min(max(index, 0), len(texts) - 1)]
    assert isinstance(values, (FloatDistribution, IntDistribution))
    low, high = values.low, values.high
    by = old * (FACTORS[is_up] - 1) if values.log else sign * SHARE * (high - low)
    if values.step is not None:
        by = sign * values.step * max(1, round(abs(by) / values.step))
    return _inside(values, old + by)


def _drawn(values: BaseDistribution, random: Random) -> Any:
    if isinstance(values, CategoricalDistribution):
        return random.choice(values.choices)
    assert isinstance(values, (FloatDistribution, IntDistribution))
    half = values.step / 2 if values.step else 0  # so that the ends are as likely as others
    low, high = values.low - half, values.high + half
    if values.log:
        return _inside(values, math.exp(random.uniform(math.log(low), math.log(high))))
    return _inside(values, random.uniform(low, high))


def _inside(values: FloatDistribution | IntDistribution, wanted: float) -> float:
    """The value of the range next to `wanted`."""
    low, high, step = values.low, values.high, values.step
    if step is not None:
        wanted = low + round((wanted - low) / step) * step
    wanted = min(max(wanted, low), high)
    return int(wanted) if isinstance(values, IntDistribution) else float(wanted)


def fits(before: TrainConfig, now: TrainConfig) -> bool:
    """Whether a run of `before` can go on as `now`."""
    there = SimpleNamespace(
        dataset=SimpleNamespace(fingerprint=open_dataset(before.data_path).fingerprint),
        arch=before.arch,
        config=before.model_dump(mode="json"),
    )
    checkpoint = cast(Checkpoint, SimpleNamespace(manifest=there))
    return mismatch(checkpoint, now, open_dataset(now.data_path)) is None


def changeable(points: Points, last_step: int) -> list[str]:
    """The keys of a population's space that a run may change when it goes on.

    Args:
        last_step: of its members.

    Raises:
        UserError: there are none, or it would never come to that.
    """
    population, space = points.config.population, points.config.space
    assert population is not None
    if population.interval >= last_step:
        raise UserError(
            f"population: interval={population.interval} is not shorter than a run of {last_step} steps; lower it"
        )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [suggest(study.ask(), space) for _ in range(NUM_DRAWN)]
    keys = [key for key in space if _is_changeable(points, [p for p in drawn if key in p][:NUM_SAMPLES], key)]
    if not keys:
        raise UserError(
            f"population: a run cannot change {', '.join(space)} when it continues; add a key that it can, such as lr: "
            "{log: [1e-4, 1e-2]}"
        )
    return keys


def _is_changeable(points: Points, drawn: Sequence[Point], key: str) -> bool:
    """By the first point that can train, and others that differ from it in `key`."""
    for point in drawn:
        run = _run(points, point)
        others = [_run(points, other) for other in _others(point, points.config.space, key)] if run else []
        outcomes = [fits(run, other) for other in others if run and other]
        if outcomes:
            return all(outcomes)
    return False


def _run(points: Points, point: Point) -> TrainConfig | None:
    try:
        return points.run(point, "runs", "point")
    except Refused:
        return None


def _others(point: Point, space: Mapping[str, Range], key: str) -> Iterator[Point]:
    """Points with other values of `key`, and without what does not go with them."""
    values = space[key].distribution
    wanted = values.choices if isinstance(values, CategoricalDistribution) else (values.low, values.high)  # type: ignore[attr-defined]
    for value in wanted:
        if as_text(value) == as_text(point[key]):
            continue
        other: Point = {}
        for name in in_order(space):
            if name in point and space[name].holds(other):
                other[name] = value if name == key else point[name]
        yield other
