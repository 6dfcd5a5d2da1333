"""Metrics of a model over a split: every example once, shared out over the workers."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hrm_ray.batch import make_batch
from hrm_ray.config.inference import AS_TRAINED, Inference
from hrm_ray.data.shards import Dataset
from hrm_ray.data.tasks.base import Symmetry, Task
from hrm_ray.errors import UserError
from hrm_ray.evaluation.scores import Score, of_q_heads, scores_of
from hrm_ray.models.act import ACT, Batch
from hrm_ray.models.inference import Answer, Copies, Thinker
from hrm_ray.world import World


class Interrupted(Exception):
    """An evaluation was given up; raised on every worker alike."""


def _spans(num_examples: int, batch_size: int, world: World) -> Iterator[tuple[int, int]]:
    """This worker's runs of example ids: batches dealt in turn, as many to each worker, the last ones empty."""
    for first in range(0, num_examples, world.size * batch_size):
        start = min(first + world.rank * batch_size, num_examples)
        yield start, min(start + batch_size, num_examples)


def evaluate(
    model: ACT,
    dataset: Dataset,
    *,
    batch_size: int,
    world: World,
    split: str = "test",
    inference: Inference = AS_TRAINED,
    num_examples: int | None = None,
    hides_identifiers: bool = False,
    save_outputs: Sequence[str] = (),
    on_batch: Callable[[int], object] | None = None,
    on_scores: Callable[[Sequence[Score]], object] | None = None,
    interrupt: Callable[[], bool] | None = None,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Evaluate. Collective; the result is the same on every worker.

    Args:
        dataset: the puzzles are those of its `split`; its task says what is scored.
        batch_size: tries at examples that a worker computes at once.
        inference: how the model is used.
        num_examples: only the first so many; None: all.
        hides_identifiers: the model is not told which puzzle it sees.
        save_outputs: names from `OUTPUTS` to collect; only with one worker.
        on_batch: called with the number of examples done by this worker after each batch.
        on_scores: called at the end with the scores; those of the first worker know all that the others do.
        interrupt: asked by all workers alike after each batch; true ends the evaluation with `Interrupted`.

    Returns:
        the metrics of the task's scores (see `scores`), and the collected arrays, rows in the order of the split.

    Raises:
        UserError: the task or the model cannot be used so.
    """
    assert not save_outputs or world.size == 1
    examples, manifest = dataset.split(split), dataset.manifest
    num_examples = min(num_examples or examples.num_examples, examples.num_examples)
    device = next(model.parameters()).device
    scores = [score(dataset, inference, device) for score in scores_of(dataset.task.name)]
    with_logits = "logits" in save_outputs or any(score.needs_logits for score in scores)
    thinker = thinker_of(model, dataset.task, inference, rows_at_once=batch_size, with_logits=with_logits)
    for score in scores:
        score.is_whole = num_examples == examples.num_examples
    arrays: dict[str, np.ndarray] = {}
    was_training = model.training
    model.eval()
    try:
        for start, stop in _spans(num_examples, inference.puzzles_at_once(batch_size), world):
            if interrupt and interrupt():
                raise Interrupted
            if start == stop:
                continue
            batch = make_batch(examples, np.arange(start, stop), manifest.ignore_label_id).to(device)
            seen = batch
            if hides_identifiers:
                blank = torch.full_like(batch.puzzle_identifiers, manifest.blank_identifier_id)
                seen = batch._replace(puzzle_identifiers=blank)
            answers = thinker.think(seen)
            for score in scores:
                score.add(batch, answers)
            for name in save_outputs:
                rows = OUTPUTS[name](batch, answers.last).cpu().numpy()
                if name not in arrays:  # whole from the start: parts to be joined take twice the memory
                    arrays[name] = np.empty((num_examples, *rows.shape[1:]), rows.dtype)
                arrays[name][start:stop] = rows
            if on_batch:
                on_batch(stop - start)
    finally:
        model.train(was_training)
    metrics: dict[str, float] = {}
    for score in scores:
        metrics |= world.merge_objects(score.state(), score.metrics)
    if on_scores:
        on_scores(scores)
    if not model.inner.config.has_q_head:
        left_out = of_q_heads(dataset.task.name)
        metrics = {name: value for name, value in metrics.items() if name not in left_out}
    return metrics, arrays


def thinker_of(model: ACT, task: Task, use: Inference, **options: Any) -> Thinker:
    """`model` in use on puzzles of `task`; `options` are those of `Thinker`.

    Raises:
        UserError: the task or the model cannot be used so.
    """
    if use.select == "valid" and not task.checkable:
        raise UserError(f"select=valid: task {task.name} cannot check answers; use select=vote or q")
    copies = copies_on(next(model.parameters()).device, task.symmetries(use.votes)) if use.votes > 1 else None
    is_solution = task.is_solution if use.select == "valid" else None
    thinker = Thinker(model, use, **{"copies": copies, "is_solution": is_solution} | options)
    if use.select in ("q", "residual") and use.num_tries == 1:
        raise UserError(
            f"select={use.select} chooses among tries, and there is one; give paths= or votes=, or leave it out"
        )
    if use.seed and not (use.noise or thinker.init_std):
        raise UserError(
            f"seed={use.seed} is of the noise, and there is none; give noise= or init_std=, or leave it out"
        )
    return thinker


def copies_on(device: torch.device, symmetries: Sequence[Symmetry]) -> Copies:
    """The symmetries of a task as tensors on `device`."""
    return Copies(*(torch.from_numpy(np.stack(parts)).to(device) for parts in zip(*symmetries, strict=True)))


OUTPUTS: dict[str, Callable[[Batch, Answer], Tensor]] = {
    "inputs": lambda batch, answer: batch.inputs.to(torch.uint8),  # as in the data set
    "labels": lambda batch, answer: batch.labels,
    "puzzle_identifiers": lambda batch, answer: batch.puzzle_identifiers,
    "logits": lambda batch, answer: answer.logits,
    "predictions": lambda batch, answer: answer.tokens.to(torch.uint8),
    "q_halt_logits": lambda batch, answer: answer.q_halt,
    "q_continue_logits": lambda batch, answer: answer.q_continue,
    "steps": lambda batch, answer: answer.steps,
}
