"""Turn a mapping from YAML and the command line into a typed, frozen object, or into one clear line.

Every configuration of the project (training, dataset recipes, sweeps) passes through `validated`: unknown keys
are errors that name the nearest known key, wrong values are errors that name the key, the value and the rule.
"""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from hrm_ray.errors import UserError


class Settings(BaseModel):
    """Base of all configuration classes: frozen, and closed to keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


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


def split_word(word: str) -> tuple[str, str]:
    """(key, value) of ``key=value``. Raises UserError if it is not of that form."""
    key, equals, value = word.partition("=")
    if not equals or not key:
        raise UserError(f"'{word}' is not of the form key=value")
    if not value:
        raise UserError(f"{key}= is empty; give {key}=VALUE")
    return key, value


def is_text(settings: type[Settings], key: str) -> bool:
    """Whether the value of `key` is text, to be taken as it was typed: a path, a URI or a name."""
    field = settings.model_fields.get(key)
    return field is not None and field.annotation in (str, str | None)


def as_typed(text: str) -> str:
    """`text`, but for a leading ``~/``, which not every shell replaces behind an equals sign."""
    return str(Path(text).expanduser()) if text.startswith("~/") else text


def as_text(value: Any) -> str:
    """A value as it is written behind ``key=``; a number with all its digits."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, separators=(",", ":"))


def read_words(words: Sequence[str], *kinds: type[Settings]) -> dict[str, Any]:
    """The values of ``key=value`` words, to be `validated`: text as it was typed, everything else read as YAML.

    Args:
        kinds: the classes whose keys may be given.

    Raises:
        UserError: a word of another form, an unknown key, or no YAML.
    """
    kind_of = {key: kind for kind in kinds for key in kind.model_fields}
    values: dict[str, Any] = {}
    for word in words:
        key, text = split_word(word)
        if key not in kind_of:
            raise UserError(f"unknown key '{key}'; {nearest(key, kind_of)}")
        try:
            values[key] = as_typed(text) if is_text(kind_of[key], key) else yaml.safe_load(text)
        except (yaml.YAMLError, ValueError):  # PyYAML lets the ValueError of a wrong date or number through
            raise UserError(f"{key}={text}: not a value; quote it if it holds special characters") from None
    return values


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
