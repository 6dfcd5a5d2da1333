"""Metrics of a model over a split: every example once, shared out over the workers, all ACT steps run."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from hrm_ray.data.sampler import PADDING
from hrm_ray.data.shards import Split
from hrm_ray.models.act import ACT, IGNORE, Batch, Step
from hrm_ray.models.losses import METRICS, LossType, act_loss
from hrm_ray.training.world import World

EVAL_METRICS = ("accuracy", "exact_accuracy", "q_halt_accuracy", "steps")


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


@torch.inference_mode()
def run_to_halt(model: ACT, batch: Batch) -> Step:
    """All ACT steps of a batch; the last one. The model must be in evaluation mode."""
    carry = model.initial_carry(batch)
    while True:
        step = model(carry, batch)
        if step.carry.halted.all():
            return step
        carry = step.carry


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
    loss_type: LossType,
    batch_size: int,
    world: World,
    num_examples: int | None = None,
    save_outputs: Sequence[str] = (),
    on_batch: Callable[[int], object] | None = None,
    interrupt: Callable[[], bool] | None = None,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Evaluate. Collective; the result is the same on every worker.

    Args:
        batch_size: examples a worker computes at once.
        num_examples: only the first so many; None: all.
        save_outputs: names from `OUTPUTS` to collect; only with one worker.
        on_batch: called with the number of examples done by this worker after each batch.
        interrupt: asked by all workers alike after each batch; true ends the evaluation with `Interrupted`.

    Returns:
        `EVAL_METRICS` as means over the examples, and the collected arrays, rows in the order of the split.
    """
    assert not save_outputs or world.size == 1
    num_examples = min(num_examples or split.num_examples, split.num_examples)
    device = next(model.parameters()).device
    totals = torch.zeros(len(METRICS), dtype=torch.float64)
    collected: dict[str, list[np.ndarray]] = {name: [] for name in save_outputs}
    was_training = model.training
    model.eval()
    for start, stop in _spans(num_examples, batch_size, world):
        if interrupt and interrupt():
            model.train(was_training)
            raise Interrupted
        if start == stop:
            continue
        batch = make_batch(split, np.arange(start, stop), ignore_label_id).to(device)
        step = run_to_halt(model, batch)
        _, metrics = act_loss(step, loss_type)
        totals += metrics.double().cpu()
        for name in save_outputs:
            collected[name].append(OUTPUTS[name](step).cpu().numpy())
        if on_batch:
            on_batch(stop - start)
    model.train(was_training)
    totals = world.sum(totals.to(device) if world.size > 1 else totals).cpu()
    sums = dict(zip(METRICS, totals.tolist(), strict=True))
    means = {name: sums[name] / max(sums["count"], 1) for name in EVAL_METRICS}
    return means, {name: np.concatenate(parts) for name, parts in collected.items()}


OUTPUTS: dict[str, Callable[[Step], Tensor]] = {
    "inputs": lambda step: step.carry.batch.inputs,
    "labels": lambda step: step.carry.batch.labels,
    "puzzle_identifiers": lambda step: step.carry.batch.puzzle_identifiers,
    "logits": lambda step: step.prediction.logits,
    "predictions": lambda step: step.prediction.logits.argmax(-1),
    "q_halt_logits": lambda step: step.prediction.q_halt,
    "q_continue_logits": lambda step: step.prediction.q_continue,
}
