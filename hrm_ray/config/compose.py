"""From words on the command line to a validated configuration, through Hydra's composition.

Defaults have one home, the classes of `schema`; they enter the composition as the node `schema`.
"""

from collections.abc import Sequence
from importlib.resources import files

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hrm_ray.config.schema import TrainConfig
from hrm_ray.config.validate import known_keys, nearest, validated
from hrm_ray.errors import UserError, first_line

GROUPS = ("arch", "scaling", "experiment")
ALIASES = {"data": "data_path"}


def choices(group: str) -> list[str]:
    """The YAML files of a group of the tree, without their ending."""
    folder = files("hrm_ray.config") / group
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def split_override(word: str) -> tuple[str, str]:
    """(key, value) of ``key=value``. Raises UserError if it is not of that form."""
    key, equals, value = word.partition("=")
    if not equals or not key:
        raise UserError(f"'{word}' is not of the form key=value")
    return key, value


def train_config(words: Sequence[str]) -> TrainConfig:
    """Compose the configuration of a training run from ``key=value`` words.

    `run_name`, if not given, is the experiment's name.

    Raises:
        UserError: an unknown key, group choice, or a value that does not fit.
    """
    overrides = []
    chosen = {}
    known = known_keys(TrainConfig)
    for word in words:
        key, value = split_override(word)
        key = ALIASES.get(key, key)
        if key in GROUPS:
            chosen[key] = value
            if value not in choices(key):
                raise UserError(f"unknown {key} '{value}'; {nearest(value, choices(key))}")
        elif key not in known:
            raise UserError(f"unknown key '{key}'; {nearest(key, [*known, *GROUPS])}")
        overrides.append(f"{key}={value}")
    if chosen.get("scaling") == "local" and not any(o.startswith("scaling.num_workers=") for o in overrides):
        overrides.append("scaling.num_workers=1")  # whatever the experiment says
    where = f"experiment {chosen['experiment']}" if "experiment" in chosen else "configuration"
    values = _compose(overrides)
    values.pop("experiment", None)
    if values.get("data_path") is None:
        raise UserError(
            "data_path is not given; add data=DIR, or choose an experiment: "
            + ", ".join(f"experiment={name}" for name in choices("experiment"))
        )
    if values["run_name"] is None:
        values["run_name"] = chosen.get("experiment", "train")
    return validated(TrainConfig, values, where)


def _compose(overrides: list[str]) -> dict:
    defaults = TrainConfig(data_path="").model_dump(mode="json") | {"data_path": None}
    ConfigStore.instance().store(name="schema", node=defaults)
    try:
        with initialize_config_module("hrm_ray.config", version_base="1.3"):
            values = OmegaConf.to_container(compose("train", overrides=overrides), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"cannot read {' '.join(overrides)}: {first_line(error)}") from None
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}
