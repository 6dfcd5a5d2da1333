"""As published: a slot halts when its Q head prefers to, but never before a minimum that is drawn for it.

Source: Wang et al. 2025, arXiv:2506.21734, "Adaptive computational time".
"""

from typing import Literal

import numpy as np
from torch import Tensor

from hrm_ray.config.arch import ArchConfig
from hrm_ray.config.halting import HaltingConfig
from hrm_ray.draws import Purpose, uniform, words
from hrm_ray.halting.base import Control, Halting, Moment
from hrm_ray.models.recursive import Prediction


class ACTConfig(HaltingConfig):
    """It has no keys; those of `arch` say how it explores."""

    name: Literal["act"] = "act"
    """The way of halting; halting=NAME chooses it."""

    def build(self, arch: ArchConfig) -> Halting:
        return ACTHalting(arch)


class ACTHalting(Halting):
    """Halts when q_halt > q_continue; with `no_ACT_continue` when q_halt > 0.

    `Control.draws` int32 [B] are `min_halt_steps`.
    """

    def __init__(self, arch: ArchConfig):
        self.arch, self.looks_ahead = arch, not arch.no_ACT_continue

    def control(self, moment: Moment) -> Control:
        minima = min_halt_steps(
            moment.seed,
            moment.supervision_step,
            moment.num_slots,
            exploration_prob=self.arch.halt_exploration_prob,
            halt_max_steps=self.arch.halt_max_steps,
        )
        return Control(moment.own(minima))

    def chooses(self, prediction: Prediction, steps_B: Tensor, control: Control) -> Tensor:
        assert control.draws is not None
        return self.is_done(prediction) & (steps_B >= control.draws)

    def halt_logit(self, prediction: Prediction) -> Tensor:
        """With q_continue, of halting if both were drawn by their softmax; without, of a right answer."""
        return prediction.q_halt - prediction.q_continue if self.looks_ahead else prediction.q_halt


def min_halt_steps(
    seed: int, step: int, num_slots: int, *, exploration_prob: float, halt_max_steps: int
) -> np.ndarray:
    """The earliest ACT step at which each slot of all workers may halt at training step `step`, int32 [num_slots].

    With probability `exploration_prob` uniform over 2..halt_max_steps, else 0 (free to halt).
    """
    if halt_max_steps < 2:
        return np.zeros(num_slots, np.int32)
    draws = words(seed, Purpose.EXPLORATION, step, 2 * num_slots).reshape(2, -1)
    explores = uniform(draws[0]) < exploration_prob
    minimum = 2 + (draws[1] % np.uint64(halt_max_steps - 1)).astype(np.int32)
    return np.where(explores, minimum, 0).astype(np.int32)
