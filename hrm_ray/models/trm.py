"""The tiny recursive model: one small module updates both the working state z_L and the answer z_H.

All cycles but the last run without gradient; the last one wholly with it. With `mlp_t` the module mixes tokens by an
MLP over the sequence instead of attention, so the model is bound to the sequence length it was made for.

Source: Jolicoeur-Martineau 2025, arXiv:2510.04871; public code SamsungSAILMontreal/TinyRecursiveModels.
"""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from hrm_ray.config.arch import ArchConfig, StateConfig
from hrm_ray.models.layers import MixerBlock, ReasoningModule
from hrm_ray.models.recursive import RecursiveModel
from hrm_ray.models.rotary import Rope


class TRMConfig(StateConfig, ArchConfig):
    """Architecture `trm`, and with `mlp_t` also `trm_mlp`."""

    name: Literal["trm"] = "trm"
    """The tiny recursive model."""
    H_cycles: int = Field(default=3, gt=0, le=10**6)
    """Updates of the answer in an ACT step."""
    L_cycles: int = Field(default=6, gt=0, le=10**6)
    """Updates of the working state for each of them."""
    L_layers: int = Field(default=2, gt=0, le=10**4)
    """Layers of the module."""
    mlp_t: bool = False
    """Mix tokens by an MLP over the sequence in place of attention."""
    puzzle_emb_len: int = Field(default=16, ge=0, le=2**16)
    """Leading tokens that hold the puzzle embedding; 0: as many as arch.puzzle_emb_ndim fills."""
    no_ACT_continue: bool = True
    """Halt when q_halt > 0, and learn no q_continue."""

    @model_validator(mode="after")
    def _puzzle_embedding_fits(self) -> "TRMConfig":
        room = self.num_puzzle_tokens * self.hidden_size
        if self.puzzle_emb_ndim > room:
            raise ValueError(
                f"arch.puzzle_emb_ndim={self.puzzle_emb_ndim} does not fit arch.puzzle_emb_len={self.puzzle_emb_len} "
                f"tokens of arch.hidden_size={self.hidden_size}; lower it to {room}, or lengthen them"
            )
        return self

    @property
    def num_puzzle_tokens(self) -> int:
        return (self.puzzle_emb_ndim and self.puzzle_emb_len) or super().num_puzzle_tokens


class TRM(RecursiveModel, config=TRMConfig):
    """H_cycles x (L_cycles updates of z_L, then one of z_H), all by the same module."""

    def build(self, config: TRMConfig) -> None:
        if config.mlp_t:
            self.L_level = ReasoningModule(
                MixerBlock(self.num_tokens, config.hidden_size, config.expansion, config.rms_norm_eps)
                for _ in range(config.L_layers)
            )
        else:
            self.L_level = self.stack(config.L_layers)

    def recur(self, z_H: Tensor, z_L: Tensor, e_BSD: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            for _ in range(self.H_cycles - 1):
                z_H, z_L = self._cycle(z_H, z_L, e_BSD, rope)
        return self._cycle(z_H, z_L, e_BSD, rope)

    def _cycle(self, z_H: Tensor, z_L: Tensor, e_BSD: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        for _ in range(self.L_cycles):
            z_L = self.refine(self.L_level, z_L, z_H + e_BSD, rope)
        return self.refine(self.L_level, z_H, z_L, rope), z_L
