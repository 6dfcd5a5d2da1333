"""Muon for the matrices inside, torch's own; AdamW for vectors, embeddings and output heads.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) moves a matrix by its momentum made orthogonal. With
`match_rms_adamw` (Moonshot AI 2025, arXiv:2502.16982) its step is as large as AdamW's, so that both share one `lr`.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn, optim

from hrm_ray.config.optimizer import OptimizerConfig
from hrm_ray.config.schema import TrainConfig
from hrm_ray.config.validate import PositiveFloat, PositiveInt

_AT_THE_ENDS = re.compile(r"embed|head\.")


class MuonConfig(OptimizerConfig):
    """Keys of Muon."""

    name: Literal["muon"] = "muon"
    """The optimizer; optimizer=NAME chooses it."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the momentum of matrices."""
    nesterov: bool = True
    """Look one step ahead of the momentum."""
    ns_steps: PositiveInt = 5
    """Newton-Schulz iterations, which make the momentum orthogonal."""
    eps: PositiveFloat = 1e-8
    """Of AdamW, for what is no matrix: added to the root of the second moment."""

    def build(self, parameters: Mapping[str, nn.Parameter], config: TrainConfig, backend: str) -> "Muon":
        shared: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
        of_muon = {name for name, p in parameters.items() if p.ndim == 2 and not _AT_THE_ENDS.search(name)}
        matrices = [p for name, p in parameters.items() if name in of_muon]
        others = [p for name, p in parameters.items() if name not in of_muon]
        parts: list[optim.Optimizer] = []
        if matrices:
            options: dict[str, Any] = {"momentum": self.momentum, "nesterov": self.nesterov}
            options |= {"ns_steps": self.ns_steps, "adjust_lr_fn": "match_rms_adamw"}
            parts.append(optim.Muon(matrices, **options, **shared))
        if others:
            parts.append(optim.AdamW(others, betas=(config.beta1, config.beta2), eps=self.eps, **shared))
        return Muon(parts)


class Muon(optim.Optimizer):
    """Several optimizers as one: each moves its own parameters."""

    def __init__(self, parts: Sequence[optim.Optimizer]):
        self._parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.state = defaultdict(dict)
        for part in parts:
            part.state = self.state  # one for all

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take a group as it is, so that what is set in it here holds there."""
        self.param_groups.append(param_group)

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for part in self._parts:
            part.step()

    @torch.no_grad()
    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self._parts:
            part.zero_grad(set_to_none)
