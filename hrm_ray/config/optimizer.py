"""The optimizer of a run: `optimizer.name` finds its class.

An optimizer is a module of `hrm_ray.optim` and a YAML under `config/optimizer/`, both of its name. The module has a
class of `OptimizerConfig` that gives `name` that default and builds the optimizer. Keys that all optimizers share
(`lr`, `beta1`, `beta2`, `weight_decay`) are those of `TrainConfig`.
"""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Mapping
from importlib.resources import files
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BeforeValidator, SerializeAsAny

from hrm_ray.config.choice import chosen_by_name
from hrm_ray.config.validate import Settings, nearest
from hrm_ray.errors import UserError

if TYPE_CHECKING:
    from torch import nn, optim

    from hrm_ray.config.schema import TrainConfig

ROOM = "hrm_ray.optim"  # where the optimizers are
DEFAULT_OPTIMIZER = "adam_atan2"


class OptimizerConfig(Settings):
    """What the optimizers' own keys derive from."""

    classes: ClassVar[dict[str, type[OptimizerConfig]]] = {}

    name: str
    """The optimizer; optimizer=NAME chooses it."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        OptimizerConfig.classes[cls.model_fields["name"].default] = cls

    @abstractmethod
    def build(
        self, parameters: Mapping[str, nn.Parameter], config: TrainConfig, backend: str
    ) -> optim.Optimizer:
        """The optimizer of `parameters`, by name.

        Before every step, each of its groups gets the `lr` and `weight_decay` of that step. All that it remembers of a
        parameter is tensors in `state[parameter]`.

        Args:
            config: of the run.
            backend: of the machine, see `optimizer_backend`.
        """


def optimizer_names() -> list[str]:
    """All optimizers."""
    folder = files("hrm_ray.config") / "optimizer"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def optimizer_class(name: Any) -> type[OptimizerConfig]:
    """The class of the optimizer `name`. Raises UserError if there is none."""
    if not isinstance(name, str) or name not in optimizer_names():
        raise UserError(f"optimizer.name={name} is unknown; {nearest(str(name), optimizer_names())}")
    importlib.import_module(f"{ROOM}.{name}")
    return OptimizerConfig.classes[name]


def default_optimizer() -> OptimizerConfig:
    """The published one."""
    return optimizer_class(DEFAULT_OPTIMIZER).model_validate({})


# The field of a configuration that holds any optimizer.
Optimizer = Annotated[
    SerializeAsAny[OptimizerConfig],
    BeforeValidator(chosen_by_name("optimizer", optimizer_class, DEFAULT_OPTIMIZER)),
]
