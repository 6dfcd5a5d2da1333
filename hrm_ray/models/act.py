"""Adaptive computation time: the carry of a batch, and when a slot halts.

A batch slot keeps its puzzle and hidden state over training steps until it halts ("deep supervision"); then it
takes the puzzle at its position in the next batch and starts from the initial state. Nothing here is random: what is
drawn comes in as `Control`, from the caller.

Source: Wang et al. 2025, arXiv:2506.21734, "Deep supervision" and "Adaptive computational time".
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hrm_ray.halting.base import Control, Halting
from hrm_ray.machine import send
from hrm_ray.models.layers import cast_weights
from hrm_ray.models.recursive import Prediction, RecursiveModel, State

IGNORE = -100  # the label of a cell that is not scored


class Batch(NamedTuple):
    """What the B slots of one worker are offered at a step.

    inputs [B, C] int32 tokens; labels [B, C] int64, -100 where not scored; puzzle_identifiers [B] int32.
    A row whose labels are all -100 is padding: it is computed, and counts nowhere.
    """

    inputs: Tensor
    labels: Tensor
    puzzle_identifiers: Tensor

    def where(self, mask_B: Tensor, other: "Batch") -> "Batch":
        """Rows of `self` where `mask_B`, of `other` elsewhere."""
        return Batch(
            torch.where(mask_B[:, None], self.inputs, other.inputs),
            torch.where(mask_B[:, None], self.labels, other.labels),
            torch.where(mask_B, self.puzzle_identifiers, other.puzzle_identifiers),
        )

    def rows(self, index: Tensor | slice) -> "Batch":
        """The rows that `index` (a slice, or bool [B]) marks."""
        return Batch(*(t[index] for t in self))

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(send(t, device) for t in self))


class Carry(NamedTuple):
    """What a slot keeps between steps: hidden state, steps taken [B] int32, halted [B] bool, and its puzzle."""

    state: State
    steps: Tensor
    halted: Tensor
    batch: Batch

    def rows(self, index: Tensor | slice) -> "Carry":
        """The slots that `index` (a slice, or bool [B]) marks."""
        state = State(self.state.z_H[index], self.state.z_L[index])
        return Carry(state, self.steps[index], self.halted[index], self.batch.rows(index))

    @classmethod
    def cat(cls, parts: Sequence["Carry"]) -> "Carry":
        """The slots of all `parts` in line."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            State(torch.cat([p.state.z_H for p in parts]), torch.cat([p.state.z_L for p in parts])),
            torch.cat([p.steps for p in parts]),
            torch.cat([p.halted for p in parts]),
            Batch(
                torch.cat([p.batch.inputs for p in parts]),
                torch.cat([p.batch.labels for p in parts]),
                torch.cat([p.batch.puzzle_identifiers for p in parts]),
            ),
        )


class Step(NamedTuple):
    """One ACT step: the new carry, the prediction, and in training the target of q_continue [B]."""

    carry: Carry
    prediction: Prediction
    target_q_continue: Tensor | None


class ACT(nn.Module):
    """Runs a recursive model step by step over a batch of slots.

    Args:
        inner: the recursion.
        halt_max_steps: every slot halts at this step at the latest. It may be changed, also to more than in training.
        halting: when a slot halts before.
    """

    def __init__(self, inner: RecursiveModel, halt_max_steps: int, halting: Halting):
        super().__init__()
        self.inner = inner
        self.halt_max_steps = halt_max_steps
        self.halting = halting

    def initial_carry(self, batch: Batch) -> Carry:
        """Carry in which every slot is halted, so that the first step takes its puzzle from the batch."""
        B, device = batch.inputs.shape[0], batch.inputs.device
        return Carry(
            self.inner.initial_state(B),
            torch.zeros(B, dtype=torch.int32, device=device),
            torch.ones(B, dtype=torch.bool, device=device),
            batch,
        )

    def forward(self, carry: Carry, batch: Batch, control: Control | None = None) -> Step:
        """One step of every slot.

        Args:
            carry: of the step before.
            batch: puzzles for the slots that have halted; the others ignore theirs.
            control: of this training step. None means evaluation: every slot runs `halt_max_steps`.
        """
        carry, e_BSD, prediction = self.advance(carry, batch, control)
        if control is not None and control.is_warming_up:
            prediction = Prediction(prediction.logits, *self.inner.q_values(carry.state.z_H))
        with torch.no_grad():
            state, steps, is_last, _ = carry
            if control is None or self.halt_max_steps == 1:
                return Step(carry, prediction, None)
            halted = is_last | self.halting.chooses(prediction, steps, control)
            target = None
            if self.halting.looks_ahead:
                # Q-learning without a replay memory or target network: the next step's values, from here, now; without
                # noise.
                q_halt, q_continue = self.inner.q_values(self.inner(state, e_BSD.detach()).z_H)
                target = torch.where(is_last, q_halt, torch.maximum(q_halt, q_continue)).sigmoid()
        return Step(carry._replace(halted=halted), prediction, target)

    def advance(
        self, carry: Carry, batch: Batch, control: Control | None
    ) -> tuple[Carry, Tensor, Prediction]:
        """A step without the choice to halt; arguments as of `forward`.

        Returns:
            the carry, in which those slots have halted that may not go on, the embedded puzzles, and the prediction,
            which alone carries a gradient.
        """
        cast_weights(self.inner, self.inner.dtype)  # they may be new
        self.inner.use_depth(control.depth if control else None)
        keys = control.keys if control else None
        state = self.inner.reset(carry.state, carry.halted, keys)
        batch = batch.where(carry.halted, carry.batch)
        e_BSD = self.inner.embed(batch.inputs, batch.puzzle_identifiers)
        state = self.inner(state, e_BSD, keys)
        prediction = self.inner.predict(state.z_H)
        state = State(state.z_H.detach(), state.z_L.detach())
        steps = torch.where(carry.halted, 0, carry.steps) + 1
        return Carry(state, steps, steps >= self.halt_max_steps, batch), e_BSD, prediction
