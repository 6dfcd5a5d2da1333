"""From words on the command line to a validated configuration, through Hydra's composition of YAML files.

Defaults have one home, the classes of `schema`; they enter the composition as the node `schema`.
"""

import copy
import os
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hrm_ray.config import published_words
from hrm_ray.config.arch import arch_class, architectures
from hrm_ray.config.halting import OLD_STEP_COUNTS, HaltingConfig
from hrm_ray.config.optimizer import optimizer_class, optimizer_names
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
ALIASES = {"data": "data_path"} | {
    key: f"halting.{key}" for key in HaltingConfig.model_fields if key != "name"
}


def choices(group: str) -> list[str]:
    """The YAML files of a group of the tree, without their ending."""
    folder = files("hrm_ray.config") / group
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def train_config(words: Sequence[str]) -> TrainConfig:
    """Compose the configuration of a training run from ``key=value`` words.

    Paths, URIs and names are taken as they are typed; all other values are read as YAML, and ``${KEY}`` in one stands
    for the value of another key. Words of the published code are understood (see `published`). `run_name`, if not
    given, is the experiment's name.

    Raises:
        UserError: an unknown key, group choice, or a value that does not fit.
    """
    with in_one_line("configuration"):
        return _train_config(words)


def _train_config(words: Sequence[str]) -> TrainConfig:
    chosen, given = _sorted(words)
    values = _composed(chosen)
    if "experiment" in chosen and "arch" in chosen:
        # What the experiment says of its own architecture holds for this one where that has such a key and does not
        # say otherwise.
        own = _composed({"arch": chosen["arch"]})["arch"]
        fields = arch_class(own["name"]).model_fields
        values["arch"] = {key: value for key, value in values["arch"].items() if key in fields} | own
    if chosen.get("scaling") == "local":
        values["scaling"]["num_workers"] = 1  # whatever the experiment says
    values = _with_words(values, given)
    if values["data_path"] is None:
        raise UserError(
            "data_path is not given; add data=DIR, or choose an experiment: "
            + ", ".join(f"experiment={name}" for name in choices("experiment"))
        )
    _check_halting_words(set(given), values["halting"])
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
            given[ALIASES.get(key, key)] = text
    return chosen, given


def _with_words(values: dict[str, Any], given: Mapping[str, str]) -> dict[str, Any]:
    """`values` with words on top, and with ``${KEY}`` replaced. Raises UserError for unknown keys."""
    if "arch.name" in given:
        values["arch"]["name"] = read_value("arch.name", given["arch.name"])
    if "optimizer.name" in given:
        values["optimizer"]["name"] = read_value("optimizer.name", given["optimizer.name"])
    known = known_keys(
        TrainConfig,
        arch=arch_class(values["arch"]["name"]),
        optimizer=optimizer_class(values["optimizer"]["name"]),
    )
    texts = {}
    for key, text in given.items():
        if key not in known:
            if published_words.is_let_pass(key, text):
                continue
            raise UserError(f"unknown key {abbreviated(key)}; {_hint(key, known)}")
        value = value_of(TrainConfig, key, text)
        if is_text(TrainConfig, key):
            texts[key] = value
        else:
            _put(values, key, value)
    if any("${" in text for text in given.values()):
        values = _replaced(values)
    return values | texts


def _hint(key: str, known: Sequence[str]) -> str:
    """What a key that this configuration does not have may be."""
    optimizers = {name: optimizer_class(name) for name in optimizer_names()}
    kinds: Mapping[str, Mapping[str, type[Settings]]] = {"arch": architectures(), "optimizer": optimizers}
    for group, of in kinds.items():
        name = key.removeprefix(f"{group}.")
        having = [choice for choice, kind in of.items() if name in kind.model_fields]
        if name != key and having:
            return f"{group}={f' or {group}='.join(having)} has it"
    wanted = published_words.USUAL.get(key, key)
    return nearest(wanted, {*known, *GROUPS}, TrainConfig.listed_by)


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *folders, name = key.split(".")
    for folder in folders:
        if not isinstance(values.get(folder), dict):
            values[folder] = {}
        values = values[folder]
    values[name] = value


def _replaced(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with what ``${KEY}`` stands for, which may also be a default of the architecture."""
    defaults = arch_class(values["arch"]["name"]).model_validate({}).model_dump(mode="json")
    try:
        whole = OmegaConf.create(values | {"arch": defaults | values["arch"]})
        replaced: Any = OmegaConf.to_container(whole, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"${{...}} stands for no value: {first_line(error)}") from None
    return replaced | {"arch": {key: replaced["arch"][key] for key in values["arch"]}}


def _check_halting_words(given: set[str], halting: Mapping[str, Any]) -> None:
    """Raise UserError for keys that would be without effect: two of one duration, or of another way of halting."""
    pairs = {f"halting.{old}": f"halting.{ratio}" for old, ratio in OLD_STEP_COUNTS.items()}
    for old, ratio in (pairs | {"lr_warmup_steps": "lr_warmup_ratio"}).items():
        if {old, ratio} <= given:
            raise UserError(f"{old} and {ratio} set the same duration; give only {ratio}")
    learned = sorted(key for key in given if key.startswith("halting.") and key != "halting.name")
    if learned and halting["name"] != "q_learning":
        raise UserError(f"{learned[0]} has no effect with halting={halting['name']}; add halting=q_learning")


def _composed(chosen: Mapping[str, str]) -> dict[str, Any]:
    return copy.deepcopy(_compose(tuple(f"{group}={name}" for group, name in chosen.items())))


@cache
def _compose(overrides: tuple[str, ...]) -> dict[str, Any]:
    defaults = TrainConfig(data_path="").model_dump(mode="json", exclude={"arch", "optimizer"}) | {
        "data_path": None
    }
    ConfigStore.instance().store(name="schema", node=defaults)
    with initialize_config_module("hrm_ray.config", version_base="1.3"):
        values = OmegaConf.to_container(compose("train", overrides=list(overrides)))
    assert isinstance(values, dict)
    values.pop("experiment", None)
    return {str(key): value for key, value in values.items()}
