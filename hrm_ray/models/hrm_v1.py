"""The hierarchical reasoning model: a fast (L) and a slow (H) module that refine a hidden state in turn.

Only the very last update of each module carries a gradient (the paper's one-step gradient), so memory does not grow
with depth.

Source: Wang et al. 2025, arXiv:2506.21734, section 2; public code sapientinc/HRM.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from hrm_ray.config.arch import ArchConfig, StateConfig
from hrm_ray.models.recursive import RecursiveModel
from hrm_ray.models.rotary import Rope


class HRMConfig(StateConfig, ArchConfig):
    """Architecture `hrm_v1`."""

    name: Literal["hrm_v1"] = "hrm_v1"
    """The hierarchical reasoning model."""
    H_cycles: int = Field(default=2, gt=0, le=10**6)
    """Updates of the slow module in an ACT step."""
    L_cycles: int = Field(default=2, gt=0, le=10**6)
    """Updates of the fast module for each of them."""
    H_layers: int = Field(default=4, gt=0, le=10**4)
    """Layers of the slow module."""
    L_layers: int = Field(default=4, gt=0, le=10**4)
    """Layers of the fast module."""


class HRM(RecursiveModel, config=HRMConfig):
    """H_cycles x (L_cycles updates of z_L, then one of z_H)."""

    def build(self, config: HRMConfig) -> None:
        self.H_level = self.stack(config.H_layers)
        self.L_level = self.stack(config.L_layers)

    def recur(self, z_H: Tensor, z_L: Tensor, e_BSD: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            for h in range(self.H_cycles):
                is_last = h == self.H_cycles - 1
                for _ in range(self.L_cycles - is_last):
                    z_L = self.refine(self.L_level, z_L, z_H + e_BSD, rope)
                if not is_last:
                    z_H = self.refine(self.H_level, z_H, z_L, rope)
        z_L = self.refine(self.L_level, z_L, z_H + e_BSD, rope)
        return self.refine(self.H_level, z_H, z_L, rope), z_L
