"""Metrics of a model over a split: every example once, shared out over the workers."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from hrm_ray.config.inference import AS_TRAINED, Inference
from hrm_ray.data.sampler import PADDING
from hrm_ray.data.shards import Split
from hrm_ray.data.tasks.base import Symmetry
from hrm_ray.models.act import ACT, IGNORE, Batch
from hrm_ray.models.inference import Answer, Answers, Copy, think_and_vote, thinking_for
from hrm_ray.models.losses import count_right
from hrm_ray.training.world import World


def make_batch(
    split: Split, ids: np.ndarray, ignore_label_id: int | None, blank_identifier_id: int = 0
) -> Batch:
    """The examples `ids` (int64 [B]) as tensors; the rows of `PADDING` ids are padding."""
    is_padding = ids == PADDING
    rows = split.rows(np.where(is_padding, 0, ids))
    labels = rows["labels"].astype(np.int64)
    if ignore_label_id is not None:
        labels[labels == ignore_label_id] = IGNORE
    identifiers = rows["puzzle_identifiers"]
    if is_padding.any():
        labels[is_padding] = IGNORE
        identifiers = np.where(is_padding, np.int32(blank_identifier_id), identifiers)
    return Batch(
        torch.from_numpy(rows["inputs"].astype(np.int32)),
        torch.from_numpy(labels),
        torch.from_numpy(identifiers),
    )


class Interrupted(Exception):
    """An evaluation was given up; raised on every worker alike."""


def _spans(num_examples: int, batch_size: int, world: World) -> Iterator[tuple[int, int]]:
    """This worker's runs of example ids: batches dealt in turn, as many to each worker, the last ones empty."""
    for first in range(0, num_examples, world.size * batch_size):
        start = min(first + world.rank * batch_size, num_examples)
        yield start, min(start + batch_size, num_examples)


def evaluate(
    model: ACT,
    split: Split,
    *,
    ignore_label_id: int | None,
    batch_size: int,
    world: World,
    inference: Inference = AS_TRAINED,
    symmetries: Sequence[Symmetry] | None = None,
    num_examples: int | None = None,
    save_outputs: Sequence[str] = (),
    on_batch: Callable[[int], object] | None = None,
    interrupt: Callable[[], bool] | None = None,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Evaluate. Collective; the result is the same on every worker.

    Args:
        batch_size: examples a worker computes at once.
        inference: how the model is used.
        symmetries: as many as votes, see `Task.symmetries`; needed for several votes.
        num_examples: only the first so many; None: all.
        save_outputs: names from `OUTPUTS` to collect; only with one worker.
        on_batch: called with the number of examples done by this worker after each batch.
        interrupt: asked by all workers alike after each batch; true ends the evaluation with `Interrupted`.

    Returns:
        metrics as means over the examples: `accuracy`, `exact_accuracy`, `q_halt_accuracy`, `steps`; unless
        `inference.halt` is learned, also `learned_exact_accuracy` and `learned_steps`, which it would give. And the
        collected arrays, rows in the order of the split.
    """
    assert not save_outputs or world.size == 1
    assert (inference.votes > 1) == (symmetries is not None)
    num_examples = min(num_examples or split.num_examples, split.num_examples)
    device = next(model.parameters()).device
    copies = copies_on(device, symmetries)
    totals = torch.zeros(len(SUMS), dtype=torch.float64)
    collected: dict[str, list[np.ndarray]] = {name: [] for name in save_outputs}
    was_training = model.training
    model.eval()
    try:
        with thinking_for(model, inference.halt_max_steps):
            for start, stop in _spans(num_examples, batch_size, world):
                if interrupt and interrupt():
                    raise Interrupted
                if start == stop:
                    continue
                batch = make_batch(split, np.arange(start, stop), ignore_label_id).to(device)
                answers = think_and_vote(model, batch, stops_early=inference.halt == "learned", copies=copies)
                totals += _sums(answers, batch.labels).cpu()
                for name in save_outputs:
                    collected[name].append(OUTPUTS[name](batch, answers.last).cpu().numpy())
                if on_batch:
                    on_batch(stop - start)
    finally:
        model.train(was_training)
    totals = world.sum(totals.to(device) if world.size > 1 else totals).cpu()
    sums = dict(zip(SUMS, totals.tolist(), strict=True))
    count = max(sums.pop("count"), 1)
    if inference.halt == "learned":
        del sums["learned_exact_accuracy"], sums["learned_steps"]
    means = {name: value / count for name, value in sums.items()}
    return means, {name: np.concatenate(parts) for name, parts in collected.items()}


def copies_on(device: torch.device, symmetries: Sequence[Symmetry] | None) -> list[Copy] | None:
    """The symmetries of a task as tensors on `device`."""
    if symmetries is None:
        return None
    return [Copy(*(torch.from_numpy(part).to(device) for part in symmetry)) for symmetry in symmetries]


SUMS = (
    "count",
    "accuracy",
    "exact_accuracy",
    "q_halt_accuracy",
    "steps",
    "learned_exact_accuracy",
    "learned_steps",
)


def _sums(answers: Answers, labels: Tensor) -> Tensor:
    """Sums over the puzzles of a batch in the order of `SUMS`, float64."""
    last, learned = answers
    num_right, num_labelled = count_right(last.tokens, labels)
    exact = num_right == num_labelled
    num_right_learned, _ = count_right(learned.tokens, labels)
    parts = (
        torch.ones_like(exact),
        num_right / num_labelled.clamp(min=1),
        exact,
        (last.q_halt >= 0) == exact,
        last.steps,
        num_right_learned == num_labelled,
        learned.steps,
    )
    is_puzzle = num_labelled > 0
    return torch.stack([(part * is_puzzle).sum(dtype=torch.float64) for part in parts])


OUTPUTS: dict[str, Callable[[Batch, Answer], Tensor]] = {
    "inputs": lambda batch, answer: batch.inputs,
    "labels": lambda batch, answer: batch.labels,
    "puzzle_identifiers": lambda batch, answer: batch.puzzle_identifiers,
    "logits": lambda batch, answer: answer.logits,
    "predictions": lambda batch, answer: answer.tokens,
    "q_halt_logits": lambda batch, answer: answer.q_halt,
    "q_continue_logits": lambda batch, answer: answer.q_continue,
    "steps": lambda batch, answer: answer.steps,
}
