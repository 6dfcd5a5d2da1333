"""Adam (Kingma and Ba 2015, arXiv:1412.6980), whose decay is L2: the weights are added to the gradient.

`Adam` is torch's, with what the published code of grokking adds to it (Power et al. 2022, arXiv:2201.02177, figure 2;
openai/grok): decay towards the weights of the start, and noise on each update. AdamW takes it too.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn, optim

from hrm_ray.config.optimizer import OptimizerConfig
from hrm_ray.config.schema import TrainConfig
from hrm_ray.config.validate import NonNegativeFloat, PositiveFloat
from hrm_ray.draws import Purpose
from hrm_ray.models.noise import key_of, noise_of

START = "start"  # in the state of a parameter: what it was at first


class NoisyConfig(OptimizerConfig):
    """Keys that Adam and AdamW share."""

    kept: ClassVar[tuple[str, ...]] = ("decay",)

    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    update_noise: NonNegativeFloat = 0.0
    """Standard deviation of the noise on each update, before it is multiplied by lr (paper: 1)."""


class AdamConfig(NoisyConfig):
    """Keys of Adam."""

    name: Literal["adam"] = "adam"
    """The optimizer; optimizer=NAME chooses it."""
    decay: Literal["l2"] = "l2"
    """What weight_decay does: l2 adds the weights to the gradient; optimizer=adamw has other kinds."""

    def build(self, parameters: Mapping[str, nn.Parameter], config: TrainConfig, backend: str) -> "Adam":
        return Adam(parameters, config, eps=self.eps, update_noise=self.update_noise, decay=self.decay)


class Adam(optim.Adam):
    """torch's Adam with other kinds of decay and noise on its updates.

    Args:
        parameters: by name.
        config: of the run.
        eps: added to the root of the second moment.
        update_noise: standard deviation of the noise; its numbers are a function of (seed, step, parameter).
        decay: `l2`, of the gradient; `to_zero`, of the weights by lr x weight_decay; `to_start`, of what they have
            moved from where they were at the first step.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        config: TrainConfig,
        *,
        eps: float,
        update_noise: float,
        decay: Literal["l2", "to_zero", "to_start"],
    ):
        self._seed, self._update_noise, self._to_start = config.seed, update_noise, decay == "to_start"
        super().__init__(
            parameters.values(),
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=eps,
            weight_decay=config.weight_decay,
            decoupled_weight_decay=decay != "l2",
            # One pass over all; on a GPU it would keep the count of steps there, which belongs to the CPU.
            fused=all(p.device.type == "cpu" for p in parameters.values()),
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        moved = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self._to_start:
            starts = [self._decay_to_start(p, group["lr"] * group["weight_decay"]) for group, p in moved]
            decays = [group["weight_decay"] for group in self.param_groups]
            for group in self.param_groups:
                group["weight_decay"] = 0.0
            super().step()
            for group, decay in zip(self.param_groups, decays, strict=True):
                group["weight_decay"] = decay
            for (_, p), start in zip(moved, starts, strict=True):
                self.state[p][START] = start  # only now: torch takes a state that is not empty for its own
        else:
            super().step()
        if self._update_noise:
            indices = {p: index for index, p in enumerate(p for g in self.param_groups for p in g["params"])}
            for group, p in moved:
                self._add_noise(p, indices[p], group["lr"])

    def _decay_to_start(self, p: Tensor, rate: float) -> Tensor:
        """Move `p` by that share of the way to its start, which is returned."""
        state: dict[str, Any] = self.state[p]
        if START not in state:
            return p.clone()
        p.lerp_(state[START], rate)
        start: Tensor = state[START]
        return start

    def _add_noise(self, p: Tensor, index: int, lr: float) -> None:
        step = int(self.state[p]["step"])
        key = key_of(self._seed, Purpose.UPDATE_NOISE, step, index).view(1).to(p.device)
        noise = noise_of(self._update_noise, p.dtype, p.device).draw(key, p.numel())
        p.sub_(noise.view_as(p), alpha=lr)
