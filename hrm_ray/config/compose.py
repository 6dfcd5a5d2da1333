"""From words on the command line to a validated configuration, through Hydra's composition.

Defaults have one home, the classes of `schema`; they enter the composition as the node `schema`.
"""

import os
from collections.abc import Sequence
from importlib.resources import files

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hrm_ray.config.arch import arch_class
from hrm_ray.config.halting import OLD_STEP_COUNTS, HaltingConfig
from hrm_ray.config.schema import TrainConfig
from hrm_ray.config.validate import as_typed, is_text, known_keys, nearest, split_word, validated
from hrm_ray.errors import UserError, first_line

GROUPS = ("arch", "halting", "scaling", "experiment")
ALIASES = {"data": "data_path"} | {
    key: f"halting.{key}" for key in HaltingConfig.model_fields if key != "name"
}


def choices(group: str) -> list[str]:
    """The YAML files of a group of the tree, without their ending."""
    folder = files("hrm_ray.config") / group
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def train_config(words: Sequence[str]) -> TrainConfig:
    """Compose the configuration of a training run from ``key=value`` words.

    `run_name`, if not given, is the experiment's name.

    Paths, URIs and names are taken as they are typed; all other values have Hydra's syntax.

    Raises:
        UserError: an unknown key, group choice, or a value that does not fit.
    """
    overrides = []
    chosen = {}
    texts = {}
    given: set[str] = set()
    known = known_keys(TrainConfig)
    for word in words:
        key, value = split_word(word)
        key = ALIASES.get(key, key)
        if key in GROUPS:
            chosen[key] = value
            if value not in choices(key):
                raise UserError(f"unknown {key} '{value}'; {nearest(value, choices(key))}")
        elif key.startswith("arch."):
            key = f"++{key}"  # which keys there are, the architecture knows
        elif key not in known:
            raise UserError(f"unknown key '{key}'; {nearest(key, sorted({*known, *GROUPS}))}")
        given.add(key)
        if is_text(TrainConfig, key):
            texts[key] = as_typed(value)
        else:
            overrides.append(f"{key}={value}")
    if chosen.get("scaling") == "local" and not any(o.startswith("scaling.num_workers=") for o in overrides):
        overrides.append("scaling.num_workers=1")  # whatever the experiment says
    where = f"experiment {chosen['experiment']}" if "experiment" in chosen else "configuration"
    values = _compose(overrides) | texts
    if "arch" in chosen:
        # What the experiment says of its own architecture holds for this one where that has such a key and does not
        # say otherwise.
        own = _compose([o for o in overrides if o.lstrip("+").startswith("arch")])["arch"]
        fields = arch_class(own["name"]).model_fields
        values["arch"] = {key: value for key, value in values["arch"].items() if key in fields} | own
    values.pop("experiment", None)
    if values.get("data_path") is None:
        raise UserError(
            "data_path is not given; add data=DIR, or choose an experiment: "
            + ", ".join(f"experiment={name}" for name in choices("experiment"))
        )
    _check_halting_words(given, values["halting"]["name"])
    is_asked_for = "compile" in given and values["compile"] is True
    if os.environ.get("DISABLE_COMPILE", "0") not in ("", "0") and not is_asked_for:
        values["compile"] = False  # said here, since workers may have another environment
    if values["run_name"] is None:
        values["run_name"] = chosen.get("experiment", "train")
    if "/" in values["run_name"] or values["run_name"] in (".", ".."):
        raise UserError(
            f"run_name={values['run_name']} is no plain folder name; storage=DIR says where runs lie"
        )
    return validated(TrainConfig, values, where)


def _check_halting_words(given: set[str], halting: str) -> None:
    """Raise UserError for keys that would be without effect: two of one duration, or of another way of halting."""
    pairs = {f"halting.{old}": f"halting.{ratio}" for old, ratio in OLD_STEP_COUNTS.items()}
    for old, ratio in (pairs | {"lr_warmup_steps": "lr_warmup_ratio"}).items():
        if {old, ratio} <= given:
            raise UserError(f"{old} and {ratio} are two lengths of one thing; give {ratio} only")
    learned = sorted(key for key in given if key.startswith("halting.") and key != "halting.name")
    if learned and halting != "q_learning":
        raise UserError(f"{learned[0]} has no effect with halting={halting}; add halting=q_learning")


def _compose(overrides: list[str]) -> dict:
    defaults = TrainConfig(data_path="").model_dump(mode="json", exclude={"arch"}) | {"data_path": None}
    ConfigStore.instance().store(name="schema", node=defaults)
    try:
        with initialize_config_module("hrm_ray.config", version_base="1.3"):
            values = OmegaConf.to_container(compose("train", overrides=overrides), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"cannot read {' '.join(overrides)}: {first_line(error)}") from None
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}
