"""Q-learning of when to halt, from a memory of the last training steps.

A slot's ACT steps are an episode: its state is the model's answer token z_H[:, 0], its actions are to halt, which pays
1 if the answer is exactly right, and to continue, which costs `penalty` and leads to the state of the next step. Both
values are probabilities (the sigmoid of the Q head's two outputs), as in Wang et al. 2025 (arXiv:2506.21734):

    Q(s, halt)      <-  1 if exactly right else 0
    Q(s, continue)  <-  max_a Q'(s', a) - penalty         at the last step  Q'(s', halt) - penalty

What comes from where: learning from replayed transitions, Mnih et al. 2015 (DQN); Q', a slowly following copy of the
head, Lillicrap et al. 2016 (arXiv:1509.02971, "soft" update); drawing recent memories more often, Wang and Ross 2019
(arXiv:1906.04009). The price of a step, the warm-up in which the Q head only watches, and that both are annealed over a
ratio of the run follow a TRM fork with Q-learning halting; mixing in a coin is epsilon-greedy exploration (Sutton and
Barto, section 2.2). Since s' is remembered, there is no second pass of the model as in published ACT. Replayed states
are constants: this loss trains the Q head alone, whereas the loss of the present q_halt reaches the recursion.

The memory is kept by slot and everything drawn is keyed by (seed, step, global slot), so any number of workers learns
the same.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hrm_ray.config.halting import HaltingConfig
from hrm_ray.models.layers import Linear


class Memory(NamedTuple):
    """The last A training steps of each of B slots, on the training device, slot first; written in place.

    Attributes:
        states: [B, A, D] float32, z_H[:, 0].
        exact: [B, A] bool, whether the answer was right.
        halted: [B, A] bool, whether the slot halted there (what follows is another puzzle).
        is_last: [B, A] bool, whether it was the last ACT step that is allowed.
        written: [B, A] int64, the training step; 0 where nothing is remembered.
    """

    states: Tensor
    exact: Tensor
    halted: Tensor
    is_last: Tensor
    written: Tensor

    @classmethod
    def empty(cls, num_slots: int, max_age: int, width: int, device: torch.device) -> "Memory":
        shape = (num_slots, max_age)
        states = torch.zeros(*shape, width, device=device)
        exact, halted, is_last = torch.zeros(3, *shape, dtype=torch.bool, device=device).unbind()
        return cls(states, exact, halted, is_last, torch.zeros(shape, dtype=torch.int64, device=device))


class Head(NamedTuple):
    """Weight [2, D] and bias [2] of a Q head."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, q_head: Linear) -> "Head":
        assert q_head.bias is not None
        return cls(q_head.weight, q_head.bias)

    def logits(self, states: Tensor) -> Tensor:
        """Halt and continue, [..., 2], of states [..., D]."""
        return F.linear(states, self.weight, self.bias)


class QLearner:
    """One worker's memory, and the target head, which is the same on all.

    Args:
        q_head: of the model at the start.
        num_slots: of this worker.
        config: `halting` of the run.
    """

    def __init__(self, q_head: Linear, num_slots: int, config: HaltingConfig):
        self.config = config
        head = Head.of(q_head)
        width, device = head.weight.shape[1], head.weight.device
        self.target = Head(*(tensor.detach().clone() for tensor in head))
        self.memory = Memory.empty(num_slots, config.replay_max_age, width, device)
        self._shares_of_ages = shares_of_ages(config.replay_max_age, config.replay_half_life).to(device)

    def loss(self, q_head: Linear, step: int | Tensor, uniform_BN: Tensor, penalty: float | Tensor) -> Tensor:
        """Loss of the Q head on N remembered steps a slot, summed over slots (mean over N), a scalar.

        Args:
            q_head: the learning one.
            step: the present training step, which is not remembered yet.
            uniform_BN: numbers from [0, 1), which draw how old the memories are.
            penalty: the price of one more ACT step.
        """
        memory = self.memory
        then = step - draw_ages(uniform_BN, self._shares_of_ages)
        rows = torch.arange(len(then), device=then.device)[:, None]
        here, after = then % self.config.replay_max_age, (then + 1) % self.config.replay_max_age
        is_known = (memory.written[rows, here] == then) & (then > 0)
        went_on = is_known & ~memory.halted[rows, here] & (memory.written[rows, after] == then + 1)

        halt, go_on = Head.of(q_head).logits(memory.states[rows, here]).unbind(-1)
        with torch.no_grad():
            following = self.target.logits(memory.states[rows, after]).sigmoid()
            best = torch.where(memory.is_last[rows, after], following[..., 0], following.amax(-1))
            go_on_target = (best - penalty).clamp(0, 1)
            halt_target = memory.exact[rows, here].float()
        losses = is_known * F.binary_cross_entropy_with_logits(halt, halt_target, reduction="none")
        losses = losses + went_on * F.binary_cross_entropy_with_logits(go_on, go_on_target, reduction="none")
        return losses.mean(-1).sum()

    @torch.no_grad()
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
        """Write training step `step` (from 1) over the oldest one; the flags are bool [B]."""
        column = step % self.config.replay_max_age
        self.memory.states[:, column] = states_BD.to(self.memory.states.dtype)
        self.memory.exact[:, column] = exact
        self.memory.halted[:, column] = halted
        self.memory.is_last[:, column] = is_last
        self.memory.written[:, column] = torch.where(is_puzzle, step, 0)

    @torch.no_grad()
    def follow(self, q_head: Linear) -> None:
        """Move the target head by `target_rate` of the way towards `q_head`."""
        for own, new in zip(self.target, Head.of(q_head), strict=True):
            own.lerp_(new, self.config.target_rate)


def shares_of_ages(max_age: int, half_life: float) -> Tensor:
    """Share of memories that are to be of ages 1, 1..2, ... 1..max_age-1, where one of an age is drawn half as often as
    one that is younger by `half_life`; float32 [max_age - 1], the last is 1."""
    weights = np.power(0.5, np.arange(1, max_age) / half_life)
    return torch.tensor(weights.cumsum() / weights.sum(), dtype=torch.float32)


def draw_ages(uniform: Tensor, shares: Tensor) -> Tensor:
    """Ages drawn by `uniform` (float32, 0..1) from `shares_of_ages`; int64, shaped like `uniform`."""
    return torch.searchsorted(shares, uniform.contiguous()).clamp(max=len(shares) - 1) + 1
