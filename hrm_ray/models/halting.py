"""When a slot halts in training, and when its own Q head would let it halt in use.

    fixed        at `halt_max_steps` only
    act          as published (Wang et al. 2025, arXiv:2506.21734): greedily, but never before a drawn minimum
    q_learning   by a draw between the Q values (see `q_learning`)

In use, a slot is done when the Q head says so (`is_done`); all three learn what that needs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hrm_ray.config.arch import ArchConfig
from hrm_ray.config.halting import HaltingConfig
from hrm_ray.models.recursive import Prediction


class Control(NamedTuple):
    """What decides about halting at one training step besides the model; functions of (seed, step, global slot).

    Of `act`: min_halt_steps int32 [B], a slot does not halt before this ACT step. Of `q_learning`: uniform float32 [B],
    draws from 0..1, and the annealed values of the step (scalars), see `HaltingConfig`; while `is_warming_up` no slot
    halts early and the Q losses reach the Q head alone.
    """

    min_halt_steps: Tensor | None = None
    uniform: Tensor | None = None
    temperature: float | Tensor = 1.0
    epsilon: float | Tensor = 0.0
    penalty: float | Tensor = 0.0
    is_warming_up: bool = False

    def rows(self, index: slice) -> "Control":
        """Those of the slots in `index`."""
        return self._replace(
            min_halt_steps=None if self.min_halt_steps is None else self.min_halt_steps[index],
            uniform=None if self.uniform is None else self.uniform[index],
        )


class Fixed:
    """Every slot runs all steps."""

    looks_ahead = False  # whether the target of q_continue comes from a second pass

    def chooses(self, prediction: Prediction, steps_B: Tensor, control: Control) -> Tensor:
        """Which slots halt after ACT step `steps_B`, besides those at the last; bool [B]."""
        return torch.zeros_like(steps_B, dtype=torch.bool)

    def is_done(self, prediction: Prediction) -> Tensor:
        """Which slots halt by their own Q head when the model is used; bool [B]."""
        return prediction.q_halt > 0


class Published(Fixed):
    """Halts when q_halt > q_continue; with `no_ACT_continue` when q_halt > 0."""

    def __init__(self, no_ACT_continue: bool):
        self.looks_ahead = not no_ACT_continue

    def chooses(self, prediction: Prediction, steps_B: Tensor, control: Control) -> Tensor:
        assert control.min_halt_steps is not None
        return self.is_done(prediction) & (steps_B >= control.min_halt_steps)

    def is_done(self, prediction: Prediction) -> Tensor:
        return prediction.q_halt > (prediction.q_continue if self.looks_ahead else 0)


class Drawn(Fixed):
    """Halts with probability sigmoid((Q(halt) - Q(continue)) / temperature), mixed with a coin's by epsilon.

    A choice by Boltzmann probabilities (Sutton and Barto, Reinforcement Learning, section 2.3), over the two values
    in probabilities of a solved puzzle.
    """

    def chooses(self, prediction: Prediction, steps_B: Tensor, control: Control) -> Tensor:
        if control.is_warming_up:
            return super().chooses(prediction, steps_B, control)
        assert control.uniform is not None
        advantage = prediction.q_halt.sigmoid() - prediction.q_continue.sigmoid()
        halts = (advantage / control.temperature).sigmoid()
        return control.uniform < (1 - control.epsilon) * halts + control.epsilon / 2

    def is_done(self, prediction: Prediction) -> Tensor:
        return prediction.q_halt > prediction.q_continue


def build_halting(halting: HaltingConfig, arch: ArchConfig) -> Fixed:
    """What `halting.name` stands for."""
    if halting.name == "act":
        return Published(arch.no_ACT_continue)
    return Drawn() if halting.name == "q_learning" else Fixed()
