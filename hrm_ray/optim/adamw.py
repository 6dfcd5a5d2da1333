"""AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101): Adam whose decay moves the weights themselves."""

from collections.abc import Mapping
from typing import Literal

from torch import nn

from hrm_ray.config.schema import TrainConfig
from hrm_ray.optim.adam import Adam, NoisyConfig


class AdamWConfig(NoisyConfig):
    """Keys of AdamW."""

    name: Literal["adamw"] = "adamw"
    """The optimizer; optimizer=NAME chooses it."""
    decay: Literal["to_zero", "to_start"] = "to_zero"
    """Where weight_decay draws the weights: to zero, or to where they were at the first step."""

    def build(self, parameters: Mapping[str, nn.Parameter], config: TrainConfig, backend: str) -> Adam:
        return Adam(parameters, config, eps=self.eps, update_noise=self.update_noise, decay=self.decay)
