"""From words on the command line to a validated configuration, through Hydra's composition of YAML files.

Defaults have one home, the classes of `schema`; they enter the composition as the node `schema`.
"""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hrm_ray.config import published_words
from hrm_ray.config.arch import arch_class, architectures
from hrm_ray.config.effect import without_effect
from hrm_ray.config.halting import HALTINGS, HaltingConfig
from hrm_ray.config.optimizer import OPTIMIZERS
from hrm_ray.config.schema import TrainConfig
from hrm_ray.config.validate import (
    Settings,
    abbreviated,
    in_one_line,
    is_folder_name,
    is_text,
    known_keys,
    nearest,
    read_value,
    split_word,
    validated,
    value_of,
)
from hrm_ray.errors import UserError, first_line

GROUPS = ("arch", "halting", "optimizer", "scaling", "experiment")
# Groups whose classes of settings are found by name: how one is found, and all of them.
CHOSEN_BY_NAME: dict[str, tuple[Callable[[Any], type[Settings]], Callable[[], dict[str, type[Settings]]]]] = {
    "arch": (arch_class, lambda: dict(architectures())),
    "halting": (HALTINGS.find, lambda: dict(HALTINGS.all())),
    "optimizer": (OPTIMIZERS.find, lambda: dict(OPTIMIZERS.all())),
}


@cache
def aliases() -> dict[str, str]:
    """Keys that may be given under a shorter name, by that: those of the ways of halting, too."""
    halting = {key: f"halting.{key}" for kind in HALTINGS.all().values() for key in kind.model_fields}
    free = halting.keys() - TrainConfig.model_fields.keys() - {"name"}
    return {"data": "data_path"} | {key: own for key, own in halting.items() if key in free}


def choices(group: str) -> list[str]:
    """The YAML files of a group of the tree, without their ending."""
    folder = files("hrm_ray.config") / group
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def train_config(words: Sequence[str], *, by_hand: bool = False) -> TrainConfig:
    """Compose the configuration of a training run from ``key=value`` words.

    Paths, URIs and names are taken as they are typed; all other values are read as YAML, and ``${KEY}`` in one stands
    for the value of another key. Words of the published code are understood (see `published_words`). `run_name`, if not
    given, is the experiment's name.

    Args:
        by_hand: refuse words that change nothing beside the others. A sweep may try such points.

    Raises:
        UserError: an unknown key, group choice, or a value that does not fit.
    """
    with in_one_line("configuration"):
        chosen, given = _sorted(words)
        config = _train_config(chosen, given)
        if by_hand and (idle := without_effect(config, given)):
            key, with_what = next(iter(idle.items()))
            raise UserError(f"{key} has no effect {with_what}")
        return config


def effective(words: Sequence[str]) -> list[str]:
    """The words without those that `train_config` refuses `by_hand`."""
    chosen, given = _sorted(words)
    idle = without_effect(_train_config(chosen, given), given)
    return [word for word in words if not _sorted([word])[1].keys() & idle.keys()]


def _train_config(chosen: Mapping[str, str], given: Mapping[str, str]) -> TrainConfig:
    values = _composed(chosen)
    if "experiment" in chosen and "arch" in chosen:
        # What the experiment says of its own architecture holds for this one where that has such a key and does not
        # say otherwise.
        own = _composed({"arch": chosen["arch"]})["arch"]
        fields = arch_class(own["name"]).model_fields
        values["arch"] = {key: value for key, value in values["arch"].items() if key in fields} | own
        if "L_cycles" not in fields:
            values["curriculum"]["depth"] = []
        if "init_std" not in fields:
            values["paths"]["train"] = 1
    if chosen.get("scaling") == "local":
        values["scaling"]["num_workers"] = 1  # whatever the experiment says
    halting = HALTINGS.find(given.get("halting.name", values["halting"]["name"]))
    _drop_other_durations(values, set(given), halting)
    values = _with_words(values, given)
    _check_optimizer_words(set(given), values["optimizer"]["name"])
    if values["data_path"] is None:
        raise UserError(
            "data_path is not given; add data=DIR, or choose an experiment: "
            + ", ".join(f"experiment={name}" for name in choices("experiment"))
        )
    is_asked_for = "compile" in given and values["compile"] is True
    if os.environ.get("DISABLE_COMPILE", "0") not in ("", "0") and not is_asked_for:
        values["compile"] = False  # said here, since workers may have another environment
    if values["run_name"] is None:
        values["run_name"] = chosen.get("experiment", "train")
    if not is_folder_name(values["run_name"]):
        raise UserError(
            f"run_name={values['run_name']} must be a plain folder name without /; storage=DIR says where runs are kept"
        )
    where = f"experiment {chosen['experiment']}" if "experiment" in chosen else "configuration"
    return validated(TrainConfig, values, where)


def _sorted(words: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """The choices of groups, and all other words, by our names; of a key that is given twice, the last holds."""
    chosen, given = {}, {}
    for word in words:
        key, text = split_word(word)
        key, text = published_words.in_our_words(key.lstrip("+"), text)
        if key in GROUPS:
            if text not in choices(key):
                raise UserError(f"unknown {key} {abbreviated(text)}; {nearest(text, choices(key))}")
            chosen[key] = text
        else:
            given[aliases().get(key, key)] = text
    return chosen, given


def _with_words(values: dict[str, Any], given: Mapping[str, str]) -> dict[str, Any]:
    """`values` with words on top, and with ``${KEY}`` replaced. Raises UserError for unknown keys."""
    for group in CHOSEN_BY_NAME:
        if (key := f"{group}.name") in given:
            values[group]["name"] = read_value(key, given[key])
    kinds = _kinds(values)
    known = known_keys(TrainConfig, inside=kinds)
    texts = {}
    for key, text in given.items():
        if key not in known:
            if published_words.is_let_pass(key, text):
                continue
            raise UserError(_why_unknown(key, known, values))
        value = value_of(TrainConfig, key, text)
        if is_text(TrainConfig, key):
            texts[key] = value
        else:
            _put(values, key, value)
    if any("${" in text for text in given.values()):
        values = _replaced(values)
    return values | texts


def _kinds(values: Mapping[str, Any]) -> dict[str, type[Settings]]:
    """The classes of settings that `values` choose by name."""
    return {group: find(values[group]["name"]) for group, (find, _) in CHOSEN_BY_NAME.items()}


def _why_unknown(key: str, known: Sequence[str], values: Mapping[str, Any]) -> str:
    """What to say of a key that this configuration does not have: others may have it."""
    everything = {*known, *GROUPS}
    for group, (_, all_kinds) in CHOSEN_BY_NAME.items():
        kinds = all_kinds()
        name = key.removeprefix(f"{group}.")
        having = [f"{group}={choice}" for choice, kind in kinds.items() if name in kind.model_fields]
        if name != key and having:
            return (
                f"{key} has no effect with {group}={values[group]['name']}; it is of {' and '.join(having)}"
            )
        everything.update(*(known_keys(kind, f"{group}.") for kind in kinds.values()))
    wanted = published_words.USUAL.get(key, key)
    return f"unknown key {abbreviated(key)}; {nearest(wanted, everything, TrainConfig.listed_by)}"


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *folders, name = key.split(".")
    for folder in folders:
        if not isinstance(values.get(folder), dict):
            values[folder] = {}
        values = values[folder]
    values[name] = value


def _replaced(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with what ``${KEY}`` stands for, which may also be a default of what is chosen by name."""
    defaults = {
        group: kind.model_validate({}).model_dump(mode="json") | values[group]
        for group, kind in _kinds(values).items()
    }
    try:
        replaced: Any = OmegaConf.to_container(OmegaConf.create(values | defaults), resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"${{...}} stands for no value: {first_line(error)}") from None
    return replaced | {group: {key: replaced[group][key] for key in values[group]} for group in defaults}


def _drop_other_durations(values: dict[str, Any], given: set[str], halting: type[HaltingConfig]) -> None:
    """Of two keys that set one duration, the first holds only where the other is null; so a first one that is given
    takes the place of the experiment's other. Raise UserError if both are given."""
    pairs = {f"halting.{old}": f"halting.{key}" for old, key in halting.older.items()}
    pairs |= {"lr_warmup_steps": "lr_warmup_ratio", "eval_interval": "eval_interval_steps"}
    for first, other in pairs.items():
        if {first, other} <= given:
            raise UserError(f"{first} and {other} set the same duration; give only {other}")
        if first in given and first in TrainConfig.model_fields:
            values[other] = None


def _check_optimizer_words(given: set[str], name: str) -> None:
    """Raise UserError for a key that the optimizer does not look at."""
    for key in sorted(given & OPTIMIZERS.find(name).without_effect):
        having = [other for other, kind in OPTIMIZERS.all().items() if key not in kind.without_effect]
        raise UserError(
            f"{key} has no effect with optimizer={name}; leave it out, or add optimizer={' or '.join(having)}"
        )


def _composed(chosen: Mapping[str, str]) -> dict[str, Any]:
    return copy.deepcopy(_compose(tuple(f"{group}={name}" for group, name in chosen.items())))


@cache
def _compose(overrides: tuple[str, ...]) -> dict[str, Any]:
    defaults = TrainConfig(data_path="").model_dump(mode="json", exclude=set(CHOSEN_BY_NAME)) | {
        "data_path": None
    }
    ConfigStore.instance().store(name="schema", node=defaults)
    with initialize_config_module("hrm_ray.config", version_base="1.3"):
        values = OmegaConf.to_container(compose("train", overrides=list(overrides)))
    assert isinstance(values, dict)
    values.pop("experiment", None)
    return {str(key): value for key, value in values.items()}
