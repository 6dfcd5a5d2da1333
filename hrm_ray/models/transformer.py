"""A plain transformer with the same inputs, outputs and losses: what recursion is compared with.

It reads the puzzle again at every ACT step and keeps nothing from the one before, so one step is all it needs.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor

from hrm_ray.config.arch import ArchConfig
from hrm_ray.models.recursive import RecursiveModel
from hrm_ray.models.rotary import Rope


class TransformerConfig(ArchConfig):
    """Architecture `transformer`."""

    name: Literal["transformer"] = "transformer"
    """A plain transformer."""
    num_layers: int = Field(default=8, gt=0, le=10**4)
    """Layers."""
    halt_max_steps: int = Field(default=1, gt=0, le=10**6)
    """ACT steps at most; each reads the puzzle again, so one is enough."""


class Transformer(RecursiveModel, config=TransformerConfig):
    """`num_layers` blocks, applied once."""

    keeps_state = False

    def build(self, config: TransformerConfig) -> None:
        self.blocks = self.stack(config.num_layers)

    def recur(self, z_H: Tensor, z_L: Tensor, e_BSD: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        return self.blocks(e_BSD, 0.0, rope), z_L
