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

from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from hrm_ray.config.arch import ArchConfig
from hrm_ray.config.halting import HaltingConfig
from hrm_ray.config.validate import NonNegativeFloat, PositiveFloat, PositiveInt
from hrm_ray.draws import Purpose, uniform, words
from hrm_ray.errors import UserError
from hrm_ray.halting.base import Control, Halting, Learner, Moment
from hrm_ray.models.layers import Linear
from hrm_ray.models.recursive import Prediction
from hrm_ray.optim.schedules import Shape, anneal, first_step_at

# What is annealed: the key, the ratio that says until when, the shape.
ANNEALED: tuple[tuple[str, str, Shape], ...] = (
    ("expansion_penalty", "expansion_anneal_ratio", "cosine"),
    ("q_temperature", "q_temperature_anneal_ratio", "exponential"),
    ("epsilon", "epsilon_anneal_ratio", "linear"),
)


class QLearningConfig(HaltingConfig):
    """The keys of Q-learning."""

    needs_q_head = True
    kept: ClassVar[tuple[str, ...]] = ("replay_max_age",)
    older: ClassVar[dict[str, str]] = {
        "expansion_anneal_steps": "expansion_anneal_ratio",
        "q_temperature_anneal_steps": "q_temperature_anneal_ratio",
        "epsilon_anneal_steps": "epsilon_anneal_ratio",
        "dqn_warmup_steps": "dqn_warmup_ratio",
    }

    name: Literal["q_learning"] = "q_learning"
    """The way of halting; halting=NAME chooses it."""
    dqn_warmup_ratio: float = Field(default=0.1, ge=0, le=1)
    """Share of the run before Q values decide."""

    expansion_penalty: NonNegativeFloat = 0.1
    """Price of one more ACT step, in units of a solved puzzle, at the start."""
    expansion_penalty_end: NonNegativeFloat = 0.001
    """The same at the end of its annealing."""
    expansion_anneal_ratio: float = Field(default=0.5, ge=0, le=1)
    """Share of the run over which the price falls, as a cosine."""
    q_temperature: PositiveFloat = 1.0
    """Of the choice between halting and going on: high is random, low is greedy; at the start."""
    q_temperature_end: PositiveFloat = 0.1
    """The same at the end of its annealing."""
    q_temperature_anneal_ratio: float = Field(default=1.0, ge=0, le=1)
    """Share of the run over which the temperature falls, exponentially."""
    epsilon: float = Field(default=0.2, ge=0, le=1)
    """Share of choices made by a coin, at the start."""
    epsilon_end: float = Field(default=0.01, ge=0, le=1)
    """The same at the end of its annealing."""
    epsilon_anneal_ratio: float = Field(default=0.5, ge=0, le=1)
    """Share of the run over which epsilon falls, linearly."""

    target_rate: float = Field(default=0.05, gt=0, le=1)
    """Share of the Q head that its slow copy, the target, takes on at a step."""
    replay_max_age: int = Field(default=32, ge=3, le=10**6)
    """ACT steps that the replay memory goes back."""
    replay_half_life: PositiveFloat = 8
    """ACT steps after which a memory is drawn half as often."""
    replay_samples: int = Field(default=4, gt=0, le=10**6)
    """Memories drawn a puzzle and ACT step."""

    expansion_anneal_steps: PositiveInt | None = None
    """Older name of expansion_anneal_ratio, in optimizer steps; if given, it holds."""
    q_temperature_anneal_steps: PositiveInt | None = None
    """Older name of q_temperature_anneal_ratio, in optimizer steps; if given, it holds."""
    epsilon_anneal_steps: PositiveInt | None = None
    """Older name of epsilon_anneal_ratio, in optimizer steps; if given, it holds."""
    dqn_warmup_steps: PositiveInt | None = None
    """Older name of dqn_warmup_ratio, in optimizer steps; if given, it holds."""

    @model_validator(mode="after")
    def _falls(self) -> "QLearningConfig":
        for key in ("expansion_penalty", "q_temperature", "epsilon"):
            start, end = getattr(self, key), getattr(self, f"{key}_end")
            if end > start:
                raise ValueError(
                    f"halting.{key}={start:g} is annealed down to halting.{key}_end={end:g}, which is higher; "
                    f"lower {key}_end or raise {key}"
                )
        return self

    def build(self, arch: ArchConfig) -> Halting:
        return QLearningHalting(self)

    @property
    def _given_in_steps(self) -> dict[str, int]:
        """The durations that are given in steps, by key."""
        return {key: steps for key in self.older if (steps := getattr(self, key)) is not None}

    def in_ratios(self, total_steps: int) -> "QLearningConfig":
        """The same with numbers of steps, where they are given, as ratios."""
        ratios = {self.older[key]: steps / total_steps for key, steps in self._given_in_steps.items()}
        return self.model_copy(update=ratios)

    def check(self, total_steps: int) -> None:
        for key, steps in self._given_in_steps.items():
            if steps > total_steps:
                raise UserError(
                    f"{key}={steps} is longer than the run's {total_steps} steps; lower it, or give "
                    f"{self.older[key]}=RATIO, a share of the run"
                )

    def warnings(self, total_steps: int) -> list[str]:
        ratios = self.in_ratios(total_steps)
        return [
            f"{key}={steps} of {total_steps} steps is taken as {self.older[key]}="
            f"{getattr(ratios, self.older[key]):g}; give that instead"
            for key, steps in self._given_in_steps.items()
        ]

    def describe(self, total_steps: int) -> list[str]:
        h = self.in_ratios(total_steps)
        return [f"Q-learning: warm-up to step {first_step_at(h.dqn_warmup_ratio, total_steps)}"] + [
            f"{key}: {getattr(h, key):g} to {getattr(h, f'{key}_end'):g} at step "
            f"{first_step_at(getattr(h, ratio), total_steps)}"
            for key, ratio, _ in ANNEALED
        ]

    def annealed(self, step: int, total_steps: int) -> dict[str, float]:
        """The values of `ANNEALED` at `step`, by name."""
        h = self.in_ratios(total_steps)
        return {
            key: anneal(
                step,
                total_steps,
                start=getattr(h, key),
                end=getattr(h, f"{key}_end"),
                ratio=getattr(h, ratio),
                shape=shape,
            )
            for key, ratio, shape in ANNEALED
        }

    def is_warming_up(self, step: int, total_steps: int) -> bool:
        """Whether the Q head only watches at `step`."""
        return step <= first_step_at(self.in_ratios(total_steps).dqn_warmup_ratio, total_steps)


class QLearningHalting(Halting):
    """Halts with probability sigmoid((Q(halt) - Q(continue)) / temperature), mixed with a coin's by epsilon.

    A choice by Boltzmann probabilities (Sutton and Barto, Reinforcement Learning, section 2.3), over the two values
    in probabilities of a solved puzzle. `Control.draws` float32 [B] are from [0, 1), `Control.annealed` the values of
    `ANNEALED` in that order. While it warms up, no slot halts early.
    """

    def __init__(self, config: QLearningConfig):
        self.config = config

    def control(self, moment: Moment) -> Control:
        draws = words(moment.seed, Purpose.CHOICE, moment.supervision_step, moment.num_slots)
        annealed = self.config.annealed(moment.step, moment.total_steps)
        return Control(
            moment.own(uniform(draws).astype(np.float32)),
            moment.numbers(list(annealed.values())),
            self.config.is_warming_up(moment.step, moment.total_steps),
        )

    def chooses(self, prediction: Prediction, steps_B: Tensor, control: Control) -> Tensor:
        if control.is_warming_up:
            return super().chooses(prediction, steps_B, control)
        assert control.draws is not None and control.annealed is not None
        _, temperature, epsilon = control.annealed.unbind()
        advantage = prediction.q_halt.sigmoid() - prediction.q_continue.sigmoid()
        halts = (advantage / temperature).sigmoid()
        return control.draws < (1 - epsilon) * halts + epsilon / 2

    def halt_logit(self, prediction: Prediction) -> Tensor:
        """Of halting if both were drawn by the softmax of their values."""
        return prediction.q_halt - prediction.q_continue

    def learner(self, q_head: Linear | None, num_slots: int) -> "QLearner":
        assert q_head is not None
        return QLearner(q_head, num_slots, self.config)


class Recall(NamedTuple):
    """Which memories are replayed: the ACT step at hand, which is not remembered yet (int64 scalar), and draws [B, N]
    from [0, 1) of how old they are."""

    step: Tensor
    uniform: Tensor


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


class QLearner(Learner):
    """One worker's memory, and the target head, which is the same on all.

    Args:
        q_head: of the model at the start.
        num_slots: of this worker.
        config: `halting` of the run.
    """

    def __init__(self, q_head: Linear, num_slots: int, config: QLearningConfig):
        self.config = config
        head = Head.of(q_head)
        width, device = head.weight.shape[1], head.weight.device
        self.target = Head(*(tensor.detach().clone() for tensor in head))
        self.memory = Memory.empty(num_slots, config.replay_max_age, width, device)
        self._shares_of_ages = shares_of_ages(config.replay_max_age, config.replay_half_life).to(device)

    def recall(self, moment: Moment) -> Recall:
        count = self.config.replay_samples
        draws = words(moment.seed, Purpose.REPLAY, moment.supervision_step, moment.num_slots * count)
        by_slot = uniform(draws).astype(np.float32).reshape(-1, count)
        return Recall(moment.numbers(moment.supervision_step), moment.own(by_slot))

    def loss(self, q_head: Linear, recall: Recall, control: Control) -> Tensor:
        """Loss of the Q head on N remembered steps a slot, summed over slots (mean over N), a scalar; the price of one
        more ACT step is the first of `control.annealed`."""
        assert control.annealed is not None
        penalty, _, _ = control.annealed.unbind()
        memory = self.memory
        then = recall.step - draw_ages(recall.uniform, self._shares_of_ages)
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

    def by_slot(self) -> dict[str, Tensor]:
        return self.memory._asdict()

    def shared(self) -> dict[str, Tensor]:
        return self.target._asdict()

    def restore(self, by_slot: dict[str, Tensor], shared: dict[str, Tensor]) -> None:
        device = self.target.weight.device
        self.memory = Memory(*(by_slot[name].to(device) for name in Memory._fields))
        self.target = Head(*(shared[name].to(device) for name in Head._fields))

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
