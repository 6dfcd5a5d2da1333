"""How a slot comes to halt in training: `halting.name` finds its class.

A way of halting is a module of `hrm_ray.halting` and a YAML under `config/halting/`, both of its name. The module has a
class of `HaltingConfig` that gives `name` that default, and the way itself, a class of `hrm_ray.halting.base.Halting`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BeforeValidator, SerializeAsAny

from hrm_ray.config.choice import Choice
from hrm_ray.config.validate import Settings, in_one_line, validated

if TYPE_CHECKING:
    from hrm_ray.config.arch import ArchConfig
    from hrm_ray.halting.base import Halting as Way


class HaltingConfig(Settings):
    """What the ways' own keys derive from. Durations are ratios of the run's steps."""

    kept: ClassVar[tuple[str, ...]] = ()  # keys whose values a continued run must have too
    needs_q_head: ClassVar[bool] = False  # whether it cannot be for a model without one
    older: ClassVar[dict[str, str]] = {}  # keys of older code, and those that took their place

    name: str
    """The way of halting; halting=NAME chooses it."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        HALTINGS.register(cls)

    @abstractmethod
    def build(self, arch: ArchConfig) -> Way:
        """The way itself, for a model of `arch`."""

    def check(self, total_steps: int) -> None:
        """Raise UserError if this cannot be for a run of `total_steps`."""

    def warnings(self, total_steps: int) -> list[str]:
        """What a user should know before a run of `total_steps`, a line each."""
        return []

    def describe(self, total_steps: int) -> list[str]:
        """A line for each schedule: at which step it ends."""
        return []

    def annealed(self, step: int, total_steps: int) -> dict[str, float]:
        """What is annealed, at `step`, by key; reported as train/KEY."""
        return {}


HALTINGS: Choice[HaltingConfig] = Choice("halting", room="hrm_ray.halting", default="act")

# The field of a configuration that holds any way of halting.
Halting = Annotated[SerializeAsAny[HaltingConfig], BeforeValidator(HALTINGS.from_values)]


def halting_of(config: Mapping[str, Any], where: str) -> HaltingConfig:
    """The way of halting of a saved run's configuration.

    Those of earlier versions had the keys of `q_learning` whatever their way was; they are left out.

    Args:
        where: what the configuration came from, for messages.

    Raises:
        UserError: there is no such way, or a value does not fit.
    """
    with in_one_line(where):
        values = dict(config.get("halting", {}))
        kind = HALTINGS.find(values.get("name", HALTINGS.default))
        return validated(kind, {key: values[key] for key in values if key in kind.model_fields}, where)
