"""Fields that hold settings of several classes, of which the key `name` chooses one (an architecture, an optimizer)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any, Generic, TypeVar

from hrm_ray.config.validate import Settings, abbreviated, known_keys, nearest
from hrm_ray.errors import UserError

S = TypeVar("S", bound=Settings)


def chosen_by_name(field: str, find: Callable[[Any], type[Settings]], default: str) -> Callable[[Any], Any]:
    """A validator of the field `field`: from values to the settings of the class that `find` has for their name.

    Args:
        default: the name of values that give none.
    """

    def as_its_class(values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        kind = find(values.get("name", default))
        for key in values:
            if key not in kind.model_fields:
                hint = nearest(f"{field}.{key}", known_keys(kind, f"{field}."), kind.listed_by)
                raise ValueError(f"unknown key {abbreviated(f'{field}.{key}')}; {hint}")
        return kind.model_validate(dict(values))

    return as_its_class


class Choice(Generic[S]):
    """The classes of a field, each in a module of `room` with a YAML under `config/FIELD/`, both of its name.

    A module is imported when its class is asked for.

    Args:
        field: of a training configuration.
        room: the package with the modules.
        default: the name of values that give none.
    """

    def __init__(self, field: str, room: str, default: str):
        self.field, self.room, self.default = field, room, default
        self._classes: dict[str, type[S]] = {}

    def register(self, kind: type[S]) -> None:
        """Add a class, whose field `name` has its name as default."""
        self._classes[kind.model_fields["name"].default] = kind

    def names(self) -> list[str]:
        """All of them, in order."""
        folder = files("hrm_ray.config") / self.field
        return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))

    def find(self, name: Any) -> type[S]:
        """The class `name`. Raises UserError if there is none."""
        if not isinstance(name, str) or name not in self.names():
            raise UserError(f"{self.field}.name={name} is unknown; {nearest(str(name), self.names())}")
        importlib.import_module(f"{self.room}.{name}")
        return self._classes[name]

    def all(self) -> dict[str, type[S]]:
        """All classes by name."""
        return {name: self.find(name) for name in self.names()}

    def make(self) -> S:
        """The default's settings."""
        return self.find(self.default).model_validate({})

    def from_values(self, values: Any) -> Any:
        """The settings that a mapping stands for; see `chosen_by_name`."""
        return chosen_by_name(self.field, self.find, self.default)(values)
