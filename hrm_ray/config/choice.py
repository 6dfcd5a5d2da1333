"""Fields that hold settings of several classes, of which the key `name` chooses one (an architecture, an optimizer)."""

from collections.abc import Callable, Mapping
from typing import Any

from hrm_ray.config.validate import Settings, abbreviated, known_keys, nearest


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
