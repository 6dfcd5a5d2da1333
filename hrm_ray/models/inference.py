"""Using a trained model: how long it thinks, when it stops by itself, and copies of a puzzle that vote.

A puzzle's slot does not depend on the others of its batch, so finished puzzles can be taken out of it: what remains
computes the same with less work.

Sources: halting by the Q head in use, Wang et al. 2025 (arXiv:2506.21734), "inference-time scaling"; voting over
relabelled copies, arXiv:2601.10679.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from hrm_ray.models.act import ACT, Batch
from hrm_ray.models.recursive import Prediction


class Answer(NamedTuple):
    """What a model says of B puzzles.

    tokens [B, C] int64; logits [B, C, V], q_halt and q_continue [B] float32; steps [B] int64, ACT steps taken, over all
    copies of the puzzle.
    """

    tokens: Tensor
    logits: Tensor
    q_halt: Tensor
    q_continue: Tensor
    steps: Tensor

    @classmethod
    def of(cls, prediction: Prediction, steps_B: Tensor) -> "Answer":
        return cls(prediction.logits.argmax(-1), *prediction, steps_B.long())

    def put(self, where: Tensor, rows: Tensor, other: "Answer") -> None:
        """Take the rows of `other` that `rows` (bool) marks as own rows number `where` (int64), in place."""
        for own, new in zip(self, other, strict=True):
            own[where] = new[rows]


class Answers(NamedTuple):
    """After all steps, and at the step at which the Q head would have halted."""

    last: Answer
    learned: Answer


@contextmanager
def thinking_for(model: ACT, halt_max_steps: int | None) -> Iterator[None]:
    """Inside, `model` takes at most so many steps; None: as many as in training."""
    trained = model.halt_max_steps
    model.halt_max_steps = halt_max_steps or trained
    try:
        yield
    finally:
        model.halt_max_steps = trained


@torch.no_grad()  # and not inference_mode, under which compiled programs of training would not fit
def think(model: ACT, batch: Batch, *, stops_early: bool = False) -> Answers:
    """Answer `batch` step by step; the model must be in evaluation mode.

    Args:
        stops_early: take each puzzle out of the batch once its Q head says so; then `last` is `learned`.
    """
    carry = model.initial_carry(batch)
    running = torch.arange(len(batch.inputs), device=batch.inputs.device)  # rows of the batch still in it
    is_open = torch.ones_like(running, dtype=torch.bool)  # of all rows: the Q head has not halted yet
    learned = None
    while True:
        step = model(carry, batch)
        now = Answer.of(step.prediction, step.carry.steps)
        if learned is None:
            learned = Answer(*(torch.empty_like(part) for part in now))
        done = step.carry.halted | model.halting.is_done(step.prediction)
        fresh = done & is_open[running]
        learned.put(running[fresh], fresh, now)
        is_open[running[fresh]] = False
        carry = step.carry
        if stops_early:
            carry, batch, running = carry.rows(~done), batch.rows(~done), running[~done]
            if not len(running):
                return Answers(learned, learned)
        elif carry.halted.all():
            return Answers(now, learned)


@torch.no_grad()
def every_step(model: ACT, batch: Batch) -> Iterator[tuple[Answer, Tensor]]:
    """What `model`, in evaluation mode, says of `batch` after each of its `halt_max_steps` ACT steps.

    Yields:
        the answer, and whether the Q head of each puzzle would halt there, bool [B].
    """
    carry = model.initial_carry(batch)
    while True:
        step = model(carry, batch)
        yield Answer.of(step.prediction, step.carry.steps), model.halting.is_done(step.prediction)
        if step.carry.halted.all():
            return
        carry = step.carry


class Copy(NamedTuple):
    """A symmetry of puzzles, as tensors: x -> tokens[x[cells]]; see `hrm_ray.data.tasks.base.Symmetry`.

    cells int64 [C] and tokens int64 [V], both permutations.
    """

    cells: Tensor
    tokens: Tensor

    def of(self, batch: Batch) -> Batch:
        """The copies of the puzzles of `batch`; labels, which are not asked, stay."""
        inputs = self.tokens[batch.inputs.long()[:, self.cells]].int()
        return Batch(inputs, batch.labels, batch.puzzle_identifiers)

    def undone(self, answer: Answer) -> Answer:
        """The answer to the puzzle itself, from the answer to its copy."""
        back, tokens = self.cells.argsort(), self.tokens.argsort()
        return answer._replace(
            tokens=tokens[answer.tokens][:, back], logits=answer.logits[:, back][..., self.tokens]
        )


def think_and_vote(
    model: ACT, batch: Batch, *, stops_early: bool = False, copies: Sequence[Copy] | None = None
) -> Answers:
    """As `think`, for several symmetric copies of every puzzle, whose answers vote.

    Args:
        copies: the symmetries under which a puzzle remains one. None: no copies.

    Returns:
        for each puzzle the answer that won, as one to the puzzle itself; `q_halt` is of the probability with which the
        copies stand behind it.
    """
    if copies is None:
        return think(model, batch, stops_early=stops_early)
    answers = [(copy, think(model, copy.of(batch), stops_early=stops_early)) for copy in copies]
    last = tuple(copy.undone(answer.last) for copy, answer in answers)
    return Answers(vote(last), vote(tuple(copy.undone(answer.learned) for copy, answer in answers)))


def vote(copies: tuple[Answer, ...]) -> Answer:
    """The answer with the most weight behind it: every copy's whole answer counts as much as it trusts it (q_halt)."""
    tokens_KBC = torch.stack([copy.tokens for copy in copies])
    trust_KB = torch.stack([copy.q_halt for copy in copies]).sigmoid()
    agrees_KKB = (tokens_KBC[:, None] == tokens_KBC[None]).all(-1)
    weight_KB = (agrees_KKB * trust_KB[None]).sum(1)
    winner_B = weight_KB.argmax(0)
    rows = torch.arange(len(winner_B), device=winner_B.device)
    won = Answer(*(torch.stack(parts)[winner_B, rows] for parts in zip(*copies, strict=True)))
    steps = torch.stack([copy.steps for copy in copies]).sum(0)
    share = (weight_KB[winner_B, rows] / len(copies)).clamp(1e-6, 1 - 1e-6)
    return won._replace(q_halt=share.logit(), steps=steps)
