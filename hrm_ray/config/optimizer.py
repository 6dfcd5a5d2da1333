"""The optimizer of a run: `optimizer.name` finds its class.

An optimizer is a module of `hrm_ray.optim` and a YAML under `config/optimizer/`, both of its name. The module has a
class of `OptimizerConfig` that gives `name` that default and builds the optimizer. Keys that all optimizers share
(`lr`, `beta1`, `beta2`, `weight_decay`) are those of `TrainConfig`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BeforeValidator, SerializeAsAny

from hrm_ray.config.choice import Choice
from hrm_ray.config.validate import Settings

if TYPE_CHECKING:
    import torch
    from torch import nn, optim

    from hrm_ray.config.schema import TrainConfig


class OptimizerConfig(Settings):
    """What the optimizers' own keys derive from."""

    without_effect: ClassVar[frozenset[str]] = frozenset({"bias_correction"})
    """Keys of `TrainConfig` that this optimizer does not look at: to give one is a mistake."""

    kept: ClassVar[tuple[str, ...]] = ()  # keys whose values a continued run must have too

    name: str
    """The optimizer; optimizer=NAME chooses it."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        OPTIMIZERS.register(cls)

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

    def describe(self, backend: str, device: torch.device) -> str:
        """What moves the weights there, for a person; `backend` is that of `build`."""
        return self.name


OPTIMIZERS: Choice[OptimizerConfig] = Choice("optimizer", room="hrm_ray.optim", default="adam_atan2")

# The field of a configuration that holds any optimizer.
Optimizer = Annotated[SerializeAsAny[OptimizerConfig], BeforeValidator(OPTIMIZERS.from_values)]
