"""Using a trained model: how long it thinks, when it stops by itself, and copies of a puzzle that vote.

A puzzle's slot does not depend on the others of its batch, so finished puzzles can be taken out of it: what remains
computes the same with less work.

Sources: halting by the Q head in use, Wang et al. 2025 (arXiv:2506.21734), "inference-time scaling"; voting over
relabelled copies, arXiv:2601.10679.
"""

from collections.abc import Iterator
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


def think_and_vote(
    model: ACT, batch: Batch, *, stops_early: bool = False, relabelings: Tensor | None = None
) -> Answers:
    """As `think`, for several relabelled copies of every puzzle, whose answers vote.

    Args:
        relabelings: int64 [K, V], permutations of the tokens under which a puzzle remains one. None: no copies.

    Returns:
        for each puzzle the answer that won, in the puzzle's own labels; `q_halt` is of the probability with which the
        copies stand behind it.
    """
    if relabelings is None:
        return think(model, batch, stops_early=stops_early)
    copies = []
    for relabeling in relabelings:
        copy = Batch(relabeling[batch.inputs.long()].int(), batch.labels, batch.puzzle_identifiers)
        back = relabeling.argsort()
        answers = think(model, copy, stops_early=stops_early)
        copies.append(
            Answers(
                *(
                    answer._replace(tokens=back[answer.tokens], logits=answer.logits[..., relabeling])
                    for answer in answers
                )
            )
        )
    last, learned = zip(*copies, strict=True)
    return Answers(vote(last), vote(learned))


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
