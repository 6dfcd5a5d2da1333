"""Turn a mapping from YAML and the command line into a typed, frozen object, or into one clear line.

Every configuration of the project (training, dataset recipes, sweeps) passes through `validated`: unknown keys
are errors that name the nearest known key, wrong values are errors that name the key, the value and the rule.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from hrm_ray.errors import UserError


class Settings(BaseModel):
    """Base of all configuration classes: frozen, and closed to keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


SettingsT = TypeVar("SettingsT", bound=Settings)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint to append to an error about an unknown name: the closest known one, else all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"


def known_keys(settings: type[Settings], prefix: str = "") -> list[str]:
    """All dotted keys that `settings` accepts."""
    keys = []
    for name, field in settings.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            keys += known_keys(field.annotation, f"{prefix}{name}.")
    return keys


def validated(settings: type[SettingsT], values: Mapping[str, Any], where: str) -> SettingsT:
    """Build `settings` from `values`.

    Args:
        settings: the class to build.
        values: plain nested mapping (no OmegaConf containers).
        where: what the values came from, for the message ("recipe sudoku_4x4").

    Raises:
        UserError: one line naming the first offending key, its value and the rule it breaks.
    """
    try:
        return settings.model_validate(dict(values))
    except ValidationError as error:
        raise UserError(f"{where}: {_first_problem(settings, error)}") from None


def _first_problem(settings: type[Settings], error: ValidationError) -> str:
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{key}'; {nearest(key, known_keys(settings))}"
    if problem["type"] == "missing":
        return f"'{key}' is not given; add {key}=VALUE"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":  # our own checks name their keys themselves
        return message
    return f"{key}={problem['input']!r}: {message[0].lower()}{message[1:]}"
