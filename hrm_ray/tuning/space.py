"""The space of a sweep: for each key of the configuration, the values that it may take.

    space:
      lr: {log: [1e-4, 1e-2]}                       # a number; its logarithm is uniform
      weight_decay: {uniform: [0, 2], step: 0.5}    # a number
      arch.H_cycles: {int: [1, 4]}                  # an integer; log_int for a wide range
      halting: [act, q_learning]                    # one of a list
      q_temperature_anneal_ratio: {uniform: [0.2, 1], when: {halting: q_learning}}

A point of the space is a value for every key whose condition holds; its words are those of ``hrm-ray train``.
"""

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Any

import optuna
from pydantic import BeforeValidator, Field, PositiveFloat, field_validator, model_validator

from hrm_ray.config.validate import Settings, as_text, nearest
from hrm_ray.errors import UserError

Point = dict[str, Any]
KINDS = ("uniform", "log", "int", "log_int", "choice")


class Range(Settings):
    """The values of one key: exactly one of `KINDS`, ends included."""

    uniform: tuple[float, float] | None = None
    """Any number from LOW to HIGH."""
    log: tuple[float, float] | None = None
    """The same, with a uniform logarithm; LOW is above 0."""
    int_: tuple[int, int] | None = Field(default=None, alias="int")
    """A whole number from LOW to HIGH."""
    log_int: tuple[int, int] | None = None
    """The same, with a uniform logarithm; LOW is above 0."""
    choice: tuple[Any, ...] | None = None
    """One of these values."""
    step: PositiveFloat | None = None
    """Of uniform and int: only LOW, LOW + step, LOW + 2 step, ..."""
    when: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Other keys, and the values that they must have for this key to be there."""

    @field_validator("when", mode="before")
    @classmethod
    def _one_is_a_list_too(cls, when: Any) -> Any:
        if not isinstance(when, Mapping):
            return when
        return {key: value if isinstance(value, (list, tuple)) else [value] for key, value in when.items()}

    @model_validator(mode="after")
    def _is_one_kind(self) -> "Range":
        given = [kind for kind in KINDS if self._of(kind) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(f'{kind}: [...]' for kind in KINDS)}")
        if self.choice is not None:
            if not self.choice:
                raise ValueError("choice: [] is empty; list the values")
            if len(set(map(as_text, self.choice))) != len(self.choice):
                raise ValueError("choice: holds a value twice")
            if self.step is not None:
                raise ValueError("step: is for uniform and int")
            return self
        low, high = self._of(given[0])
        if not (math.isfinite(low) and math.isfinite(high)) or low > high:
            raise ValueError(f"{given[0]}: [{low:g}, {high:g}] is empty; give [LOW, HIGH]")
        if given[0].startswith("log") and low <= 0:
            raise ValueError(f"{given[0]}: [{low:g}, {high:g}] has no logarithm at {low:g}; begin above 0")
        if self.step is not None and given[0].startswith("log"):
            raise ValueError("step: is for uniform and int")
        if given[0] == "int" and self.step is not None and self.step != int(self.step):
            raise ValueError(f"step: {self.step:g} is no integer")
        return self

    def _of(self, kind: str) -> Any:
        return getattr(self, "int_" if kind == "int" else kind)

    @property
    def kind(self) -> str:
        return next(kind for kind in KINDS if self._of(kind) is not None)

    @property
    def distribution(self) -> optuna.distributions.BaseDistribution:
        """The same for Optuna."""
        if self.choice is not None:
            return optuna.distributions.CategoricalDistribution([as_category(v) for v in self.choice])
        low, high = self._of(self.kind)
        if self.kind in ("int", "log_int"):
            step = int(self.step or 1)
            high = low + (high - low) // step * step
            return optuna.distributions.IntDistribution(low, high, log=self.kind == "log_int", step=step)
        if self.step is not None:
            start, width = Decimal(str(low)), Decimal(str(self.step))  # as Optuna counts the steps
            high = float(start + (Decimal(str(high)) - start) // width * width)
        return optuna.distributions.FloatDistribution(low, high, log=self.kind == "log", step=self.step)

    def holds(self, point: Point) -> bool:
        """Whether the condition `when` holds at `point`."""
        return all(
            key in point and as_text(point[key]) in map(as_text, values) for key, values in self.when.items()
        )

    def describe(self) -> str:
        """For a person: "0.0001 .. 0.01, log"."""
        if self.choice is not None:
            text = " | ".join(map(as_text, self.choice))
        else:
            low, high = self._of(self.kind)
            marks = ["log"] if self.kind.startswith("log") else []
            marks += ["integer"] if self.kind.endswith("int") else []
            marks += [f"step {self.step:g}"] if self.step else []
            text = ", ".join([f"{low:g} .. {high:g}", *marks])
        conditions = [f"{key}={'|'.join(map(as_text, values))}" for key, values in self.when.items()]
        return f"{text}, when {' and '.join(conditions)}" if conditions else text


def _as_range(value: Any) -> Any:
    return {"choice": value} if isinstance(value, (list, tuple)) else value


Space = dict[str, Annotated[Range, BeforeValidator(_as_range)]]


def as_category(value: Any) -> Any:
    """A choice as Optuna keeps it: lists and mappings as text."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else as_text(value)


def in_order(space: Mapping[str, Range]) -> list[str]:
    """The keys, each behind those that its condition names.

    Raises:
        UserError: a condition names a key that is not in the space, or itself in a circle.
    """
    ordered: list[str] = []
    for key, values in space.items():
        for other, wanted in values.when.items():
            if other not in space:
                raise UserError(f"space.{key}: when: '{other}' is not in the space; {nearest(other, space)}")
            choices = space[other].choice
            strange = [w for w in wanted if choices and as_text(w) not in map(as_text, choices)]
            if strange:
                known = ", ".join(map(as_text, choices or ()))
                raise UserError(
                    f"space.{key}: when: {other}={as_text(strange[0])} is not among its choices; known: {known}"
                )
    left = dict(space)
    while left:
        ready = [key for key, values in left.items() if not values.when.keys() & left.keys()]
        if not ready:
            raise UserError(f"space: the conditions of {', '.join(left)} go in a circle")
        ordered += ready
        left = {key: values for key, values in left.items() if key not in ready}
    return ordered


def suggest(trial: optuna.trial.Trial, space: Mapping[str, Range]) -> Point:
    """The point of a trial: new values, or those that it has already."""
    point: Point = {}
    for key in in_order(space):
        if space[key].holds(point):
            point[key] = _drawn(trial, key, space[key].distribution)
    return point


def _drawn(trial: optuna.trial.Trial, key: str, values: optuna.distributions.BaseDistribution) -> Any:
    if isinstance(values, optuna.distributions.CategoricalDistribution):
        return trial.suggest_categorical(key, values.choices)
    if isinstance(values, optuna.distributions.IntDistribution):
        return trial.suggest_int(key, values.low, values.high, step=values.step, log=values.log)
    assert isinstance(values, optuna.distributions.FloatDistribution)
    return trial.suggest_float(key, values.low, values.high, step=values.step, log=values.log)


def words_of(point: Mapping[str, Any]) -> list[str]:
    """The words of ``hrm-ray train`` for a point."""
    return [f"{key}={as_text(value)}" for key, value in point.items()]


def as_sampled(space: Mapping[str, Range], given: Mapping[str, Any], where: str) -> Point:
    """A point that a user gives, its values as Optuna would have drawn them; keys may be left out.

    Raises:
        UserError: a key that is not in the space, or a value outside of its range.
    """
    point: Point = {}
    for key, value in given.items():
        if key not in space:
            raise UserError(f"{where}: '{key}' is not in the space; {nearest(key, space)}")
        values = space[key]
        if values.choice is not None:
            found = [as_category(choice) for choice in values.choice if as_text(choice) == as_text(value)]
        else:
            found = _numbers(values.distribution, value)
        if not found:
            raise UserError(f"{where}: {key}={as_text(value)} is outside of {values.describe()}")
        point[key] = found[0]
    return point


def _numbers(distribution: optuna.distributions.BaseDistribution, value: Any) -> list[Any]:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return []
    if isinstance(distribution, optuna.distributions.IntDistribution):
        return [int(number)] if number == int(number) and distribution._contains(number) else []
    return [number] if distribution._contains(number) else []
