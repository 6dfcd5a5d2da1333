"""What a way of halting is: when a slot halts in training, and when its own Q head would let it halt in use.

A way may draw (`control`) and may keep and learn something beyond the loss of the present step (`learner`). Both are
functions of a `Moment`, so that a resumed run and any number of workers do the same.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hrm_ray.machine import send
from hrm_ray.models.layers import Linear
from hrm_ray.models.recursive import Prediction


@dataclass(frozen=True)
class Moment:
    """A training step of one worker: what everything drawn or annealed is a function of.

    Attributes:
        seed: of the run.
        step, total_steps: optimizer steps, from 1.
        supervision_step: ACT steps counted through, from 1; several of them may belong to one `step`.
        num_slots: of all workers.
        slots: this worker's.
        device: this worker's.
    """

    seed: int
    step: int
    total_steps: int
    supervision_step: int
    num_slots: int
    slots: slice
    device: torch.device

    def own(self, values: np.ndarray) -> Tensor:
        """This worker's part of an array with a row for every slot of all workers, on its device."""
        return send(torch.from_numpy(np.ascontiguousarray(values[self.slots])), self.device)

    def numbers(self, values: float | Sequence[float]) -> Tensor:
        """`values` (a scalar, if it is one) on this worker's device: a recorded step can be given other tensors."""
        return send(torch.tensor(values), self.device)


class Control(NamedTuple):
    """What decides about one ACT step in training besides the model and its puzzles; see `Halting.control`.

    Attributes:
        draws: of each slot, [B, ...].
        annealed: values of the step, [n] float32, as each way has them.
        is_warming_up: the Q losses reach the Q head alone.
        depth: H and L cycles; None: those of the architecture.
        keys: of each slot's random numbers, int64 [B]; None: the architecture draws none.
    """

    draws: Tensor | None = None
    annealed: Tensor | None = None
    is_warming_up: bool = False
    depth: tuple[int, int] | None = None
    keys: Tensor | None = None

    def rows(self, index: slice) -> Control:
        """That of the slots in `index`."""
        draws, keys = (None if of is None else of[index] for of in (self.draws, self.keys))
        return self._replace(draws=draws, keys=keys)


class Halting:
    """Every slot runs all steps, and is done in use once q_halt > 0; ways of halting say otherwise."""

    looks_ahead = False  # whether the target of q_continue comes from a second pass of the model

    def control(self, moment: Moment) -> Control:
        """What `chooses` is given at `moment`."""
        return Control()

    def chooses(self, prediction: Prediction, steps_B: Tensor, control: Control) -> Tensor:
        """Which slots halt after ACT step `steps_B`, besides those at the last; bool [B]."""
        return torch.zeros_like(steps_B, dtype=torch.bool)

    def halt_logit(self, prediction: Prediction) -> Tensor:
        """How much the Q head is for halting, as the logit of a probability, float32 [B]; here of a right answer."""
        return prediction.q_halt

    def is_done(self, prediction: Prediction, threshold: float = 0.5) -> Tensor:
        """Which slots halt by their own Q head: those it is for with a probability above `threshold`; bool [B]."""
        return self.halt_logit(prediction) > math.log(threshold / (1 - threshold))

    def learner(self, q_head: Linear | None, num_slots: int) -> Learner | None:
        """What a worker with `num_slots` keeps and learns from in training, besides the present step.

        Args:
            q_head: of the model at the start; None: it has none.
        """
        return None


class Learner(ABC):
    """One worker's memory of a way of halting. All of it is saved with the run."""

    @abstractmethod
    def recall(self, moment: Moment) -> Any:
        """What `loss` is given at `moment`: tensors in (named) tuples."""

    @abstractmethod
    def loss(self, q_head: Linear, recall: Any, control: Control) -> Tensor:
        """A loss of the learning `q_head`, summed over this worker's slots, a scalar.

        Half of it is added to the loss of the step, and it is reported as that of q_continue."""

    @abstractmethod
    def remember(
        self,
        step: int,
        states_BD: Tensor,
        *,
        exact: Tensor,
        halted: Tensor,
        is_last: Tensor,
        is_puzzle: Tensor,
    ) -> None:
        """Keep what came of the ACT step counted `step`; in place.

        Args:
            states_BD: answer tokens z_H[:, 0].
            exact, halted, is_last, is_puzzle: bool [B]: the answer is right, the slot halted, at the last step that is
                allowed, and holds a puzzle, not padding.
        """

    @abstractmethod
    def follow(self, q_head: Linear) -> None:
        """After the optimizers have moved `q_head`."""

    @abstractmethod
    def by_slot(self) -> dict[str, Tensor]:
        """Its tensors with a row for each of this worker's slots."""

    @abstractmethod
    def shared(self) -> dict[str, Tensor]:
        """Its tensors that are the same on all workers."""

    @abstractmethod
    def restore(self, by_slot: dict[str, Tensor], shared: dict[str, Tensor]) -> None:
        """Take over what was saved, from the CPU."""
