"""Turn a mapping from YAML and the command line into a typed, frozen object, or into one clear line.

Every configuration of the project (training, dataset recipes, sweeps, options of commands) is read here: words by
`read_words` and `read_value`, files by `read_yaml_file`, and both are checked by `validated`. Whatever a word or a
file can raise ends as a `UserError` that names the key, the value and the rule (`in_one_line`).
"""

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from hrm_ray.errors import UserError, first_line

LARGEST_INT = 2**63 - 1  # what arrays and files hold
LARGEST_FLOAT = 1e38  # what float32 holds, in which models compute
MANY = 10**12  # more than anything is counted to
YEARS = 10**9  # seconds, longer than anything is waited for
FEW = 12  # names that a message lists
NO_NONE = "{key}={text}: nothing is written null here; give {key}=null"

# In place of pydantic's types of the same names, which have no upper bounds.
PositiveInt = Annotated[int, Field(gt=0, le=MANY)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MANY)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0, le=YEARS)]


class Settings(BaseModel):
    """Base of all configuration classes: frozen, closed to keys it does not know, and strict about numbers.

    The text under a field is its meaning; `hrm-ray config show` prints it.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
    listed_by: ClassVar[str] = "hrm-ray config show"  # the command that lists all keys

    @field_validator("*", mode="wrap")
    @classmethod
    def _numbers_are_sensible(cls, value: Any, handler: Any, info: Any) -> Any:
        kinds = _kinds(cls, info.field_name)
        if not kinds & {bool, Any} and kinds & {int, float} and _holds_a_bool(value):
            raise PydanticCustomError("boolean", "a number is needed, not true or false")
        checked = handler(value)
        for number in checked if isinstance(checked, tuple) else (checked,):
            if isinstance(number, (int, float)) and abs(number) > (
                LARGEST_INT if isinstance(number, int) else LARGEST_FLOAT
            ):
                raise PydanticCustomError("too_large", "this number is too large")
        return checked


SettingsT = TypeVar("SettingsT", bound=Settings)


@cache
def _kinds(settings: type[Settings], name: str) -> frozenset[Any]:
    """The plain types in the annotation of a field."""

    def inside(kind: Any) -> Iterator[Any]:
        if get_origin(kind) is Literal:
            yield from map(type, get_args(kind))
        elif get_args(kind):
            for part in get_args(kind):
                yield from inside(part)
        else:
            yield kind

    return frozenset(
        k for k in inside(settings.model_fields[name].annotation) if k is Any or isinstance(k, type)
    )


def _holds_a_bool(value: Any) -> bool:
    return isinstance(value, bool) or (
        isinstance(value, (list, tuple)) and any(isinstance(v, bool) for v in value)
    )


def nearest(name: str, known: Iterable[str], listed_by: str | None = None) -> str:
    """A hint to append to an error about an unknown name: the closest known one, else all of them if they are few.

    Args:
        listed_by: the command that lists them, to be named where they are many.
    """
    known = sorted(known)
    plain = {key.lower(): key for key in reversed(known)}
    name = name[:100].lower()
    inside = [key for key in plain if key.rpartition(".")[2] == name]  # hidden_size of arch.hidden_size
    close = inside[:1] or _closest(name, plain)
    if close:
        return f"did you mean '{plain[close[0]]}'?"
    if listed_by and len(known) > FEW:
        return f"'{listed_by}' lists all"
    return f"known: {', '.join([*known[:FEW], *['...'] * (len(known) > FEW)])}"


def _closest(name: str, known: Iterable[str]) -> list[str]:
    """The name that is most like `name`, if one is; a prefix that both have does not make them alike."""
    prefix = f"{name.rpartition('.')[0]}."
    tails = {key.removeprefix(prefix): key for key in known if key.startswith(prefix)}
    if "." not in name or not tails:
        return difflib.get_close_matches(name, known, n=1)
    return [tails[tail] for tail in difflib.get_close_matches(name.removeprefix(prefix), tails, n=1)]


def known_keys(
    settings: type[Settings], prefix: str = "", inside: Mapping[str, type[Settings]] | None = None
) -> list[str]:
    """All dotted keys that `settings` accepts; for `inside`, see `all_fields`."""
    return list(all_fields(settings, prefix, inside))


def all_fields(
    settings: type[Settings], prefix: str = "", inside: Mapping[str, type[Settings]] | None = None
) -> dict[str, FieldInfo]:
    """The fields of `settings` and of the settings inside it, by dotted key.

    Args:
        inside: the classes of fields that may hold several, by name.
    """
    found = {}
    for name, field in settings.model_fields.items():
        found[f"{prefix}{field.alias or name}"] = field
        kind = (inside or {}).get(name, field.annotation)
        if _are_settings(kind):
            found |= all_fields(kind, f"{prefix}{name}.")  # type: ignore[arg-type]
    return found


def _are_settings(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Settings)


# Words


def split_word(word: str) -> tuple[str, str]:
    """(key, value) of ``key=value``. Raises UserError if it is not of that form."""
    key, equals, value = word.partition("=")
    if not equals or not key:
        raise UserError(f"{abbreviated(word)} is not of the form key=value")
    if not value:
        raise UserError(f"{key}= is empty; give {key}=VALUE")
    return key, value


def is_text(settings: type[Settings], key: str) -> bool:
    """Whether the value of `key` is text, to be taken as it was typed: a path, a URI or a name."""
    field = settings.model_fields.get(key)
    return field is not None and field.annotation in (str, str | None)


def is_folder_name(name: str) -> bool:
    """Whether `name` can be that of a folder, and of one only."""
    return "/" not in name and name not in (".", "..") and name.isprintable() and len(name.encode()) <= 200


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


def abbreviated(value: Any, depth: int = 3) -> str:
    """A value in a message: as a user writes it, text in quotes, and no more of it than is needed to know it again."""
    if isinstance(value, (list, tuple)):
        parts = [abbreviated(part, depth - 1) if depth else "..." for part in value[:4]]
        return f"[{','.join(parts + ['...'] * (len(value) > 4))}]"
    if isinstance(value, Mapping):
        parts = [
            f"{key}: {abbreviated(value[key], depth - 1) if depth else '...'}" for key in list(value)[:4]
        ]
        return f"{{{', '.join(parts + ['...'] * (len(value) > 4))}}}"
    text = json.dumps(value) if isinstance(value, (bool, NoneType)) else repr(value)
    return text if len(text) <= 60 else f"{text[:40]}...{text[-10:]}"


def value_of(settings: type[Settings], key: str, text: str) -> Any:
    """The value of the word ``key=text``: text as it was typed, everything else read as YAML.

    Raises:
        UserError: no YAML, or Python's None for a text that may be null.
    """
    if not is_text(settings, key):
        return read_value(key, text)
    if settings.model_fields[key].annotation is not str:  # it may be null
        if text == "None":
            raise UserError(NO_NONE.format(key=key, text=text))
        if text == "null":
            return None
    return as_typed(text)


def read_value(key: str, text: str) -> Any:
    """What `text`, given for `key`, means as YAML. Raises UserError if it is none."""
    try:
        return _load(text, _Word)
    except Exception:  # of PyYAML's, ValueError of a number, RecursionError of brackets
        raise UserError(
            f"{key}={abbreviated(text)[1:-1]}: not a value; quote it if it holds special characters"
        ) from None


def read_words(words: Sequence[str], *kinds: type[Settings]) -> dict[str, Any]:
    """The values of ``key=value`` words, to be `validated`.

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
            raise UserError(f"unknown key {abbreviated(key)}; {nearest(key, kind_of, kinds[-1].listed_by)}")
        values[key] = value_of(kind_of[key], key, text)
    return values


# YAML


class _Yaml(yaml.SafeLoader):
    """YAML 1.2 with plain values only: ``off`` is a word, 1e-3 and 010 are numbers, and there are no tags."""


class _Word(_Yaml):
    """A word also has no aliases, by which a short text can mean a value of any size."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)


_TAG = "tag:yaml.org,2002:"
_Yaml.yaml_implicit_resolvers = {}
for _name, _pattern, _first in (  # the characters with which a value may begin
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", "null|Null|NULL|~|", ["n", "N", "~", ""]),
    ("int", "[-+]?[0-9]+(_[0-9]+)*", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(_[0-9]+)*(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("merge", "<<", "<"),
):
    _Yaml.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_pattern})$"), list(_first))
_Yaml.yaml_constructors = {None: yaml.SafeLoader.construct_undefined}
for _name in ("null", "bool", "str", "seq", "map"):
    _Yaml.add_constructor(_TAG + _name, yaml.SafeLoader.yaml_constructors[_TAG + _name])
_Yaml.add_constructor(_TAG + "int", lambda loader, node: int(node.value))
_Yaml.add_constructor(_TAG + "float", lambda loader, node: float(node.value))


def _load(content: str | bytes, loader: type[_Yaml]) -> Any:
    return yaml.load(content, Loader=loader)  # a SafeLoader


def read_yaml(content: bytes, where: str) -> Any:
    """What a YAML file holds.

    Args:
        where: its name, for the message.

    Raises:
        UserError: it is no YAML.
    """
    try:
        return _load(content, _Yaml)
    except Exception as error:
        raise UserError(f"{where} is no valid YAML: {' '.join(str(error).split())}") from None


def read_yaml_file(file: Path, what: str) -> Any:
    """The same of a file; `what` says of which kind ("recipe"). Raises UserError also if it cannot be read."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{what} file {file} does not exist") from None
    except OSError as error:
        raise UserError(f"{what} file {file}: {error.strerror}") from None
    return read_yaml(content, f"{what} {file}")


# Checking


@contextmanager
def in_one_line(where: str) -> Iterator[None]:
    """The boundary between what users write and what is made of it: whatever is raised inside is a UserError.

    Args:
        where: what is read inside, for the message ("recipe sudoku_4x4").
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{where}: {first_line(error)}") from error


def validated(settings: type[SettingsT], values: Mapping[str, Any], where: str) -> SettingsT:
    """Build `settings` from `values`.

    Args:
        settings: the class to build.
        values: plain nested mapping (no OmegaConf containers).
        where: what the values came from, for the message ("recipe sudoku_4x4").

    Raises:
        UserError: one line naming the first offending key, its value and the rule it breaks.
    """
    with in_one_line(where):
        try:
            return settings.model_validate(dict(values))
        except ValidationError as error:
            raise UserError(f"{where}: {_first_problem(settings, values, error)}") from None


def _first_problem(settings: type[Settings], values: Mapping[str, Any], error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key {abbreviated(key)}; {nearest(key, known_keys(settings), settings.listed_by)}"
    if problem["type"] == "missing":
        return f"'{key}' is not given; add {key}=VALUE"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":  # our own checks name their keys themselves
        return message
    name, field, value = _field_at(settings, values, problem["loc"])
    if field is not None:
        optional = NoneType in get_args(field.annotation)
        if optional and isinstance(value, str) and value.lower() == "none":
            return NO_NONE.format(key=name, text=value)
        if _are_settings(field.annotation):
            first = next(iter(field.annotation.model_fields))  # type: ignore[union-attr]
            return (
                f"{name}={abbreviated(value)}: holds keys of its own; give them, such as {name}.{first}=VALUE"
            )
        is_union = get_origin(field.annotation) in (Union, UnionType)
        is_of_kind = problem["type"] in _WRONG_KINDS and len(problem["loc"]) == name.count(".") + 1
        if (is_union and len(get_args(field.annotation)) - optional > 1) or is_of_kind:
            several = "; hrm-ray tune tries several values" if _are_several(value) and is_of_kind else ""
            return f"{name}={abbreviated(value)}: give {takes(field)}{several}"
    if problem["type"] == "int_parsing_size":
        message = "this number is too large"
    return f"{key}={abbreviated(problem['input'])}: {message[0].lower()}{message[1:]}"


# pydantic's, of a value that is of another kind than its field
_WRONG_KINDS = (
    "int_parsing",
    "int_type",
    "int_from_float",
    "float_parsing",
    "float_type",
    "bool_parsing",
    "bool_type",
)


def _are_several(value: Any) -> bool:
    """Whether a value is a list of some, as Hydra's multirun takes them."""
    return isinstance(value, (list, tuple)) or (isinstance(value, str) and "," in value)


def _field_at(
    settings: type[Settings], values: Any, where: Sequence[str | int]
) -> tuple[str, FieldInfo | None, Any]:
    """The innermost field on the way `where`, its key and its value; None if it leads to no field."""
    field, key = None, ""
    for part in where:
        fields = {f.alias or name: f for name, f in settings.model_fields.items()}
        if part not in fields or not isinstance(values, Mapping):
            return "", None, None
        field, key, values = fields[str(part)], f"{key}.{part}".lstrip("."), values.get(part)
        if not _are_settings(field.annotation):
            break
        settings = field.annotation  # type: ignore[assignment]
    return key, field, values


def takes(field: FieldInfo) -> str:
    """What may be given for `field`, in words: "a number above 0 or null"."""
    return _in_words(field.annotation, field.metadata)


def _in_words(kind: Any, rules: Sequence[Any] = ()) -> str:
    parts = get_args(kind)
    origin = get_origin(kind)
    if origin is Annotated:
        inner = [
            rule for part in parts[1:] for rule in (part.metadata if isinstance(part, FieldInfo) else [part])
        ]
        return _in_words(parts[0], [*rules, *inner])
    if origin in (Union, UnionType):
        return " or ".join(_in_words(part, rules) for part in parts)
    if origin is Literal:
        return " or ".join(map(as_text, parts))
    if origin is tuple:
        return f"[{', '.join('...' if part is ... else _in_words(part) for part in parts)}]"
    plain = {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "null"}
    return " ".join(
        [plain.get(kind, "keys and their values"), *_limits(rules if kind in (int, float) else ())]
    )


def _limits(rules: Sequence[Any]) -> Iterator[str]:
    for rule in rules:
        if isinstance(rule, Gt):
            yield f"above {rule.gt}"
        elif isinstance(rule, Ge):
            yield f"from {rule.ge}"
        elif isinstance(rule, Le) and rule.le not in (MANY, YEARS):
            yield f"to {rule.le}"
        elif isinstance(rule, Lt) and rule.lt != LARGEST_INT + 1:
            yield f"below {rule.lt}"
