"""Every slot runs `arch.halt_max_steps`."""

from typing import Literal

from hrm_ray.config.arch import ArchConfig
from hrm_ray.config.halting import HaltingConfig
from hrm_ray.halting.base import Halting


class FixedConfig(HaltingConfig):
    """It has no keys."""

    name: Literal["fixed"] = "fixed"
    """The way of halting; halting=NAME chooses it."""

    def build(self, arch: ArchConfig) -> Halting:
        return Halting()
