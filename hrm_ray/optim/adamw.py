"""AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), torch's own."""

from collections.abc import Mapping
from typing import Literal

from torch import nn, optim

from hrm_ray.config.optimizer import OptimizerConfig
from hrm_ray.config.schema import TrainConfig
from hrm_ray.config.validate import PositiveFloat


class AdamWConfig(OptimizerConfig):
    """Keys of AdamW."""

    name: Literal["adamw"] = "adamw"
    """The optimizer; optimizer=NAME chooses it."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""

    def build(self, parameters: Mapping[str, nn.Parameter], config: TrainConfig, backend: str) -> optim.AdamW:
        betas = config.beta1, config.beta2
        return optim.AdamW(
            parameters.values(), lr=config.lr, betas=betas, eps=self.eps, weight_decay=config.weight_decay
        )
