"""Kaggle's submission.json: the best answers to every test pair."""

import json
from pathlib import Path

from hrm_ray.data.files import write_durably, writing
from hrm_ray.data.tasks.arc import NO_GRID
from hrm_ray.evaluation.held_out import HeldOut, Pair
from hrm_ray.evaluation.votes import Votes

Submission = dict[str, list[dict[str, list[list[int]]]]]


def submission(votes: Votes, held_out: HeldOut) -> Submission:
    """``{task: [{"attempt_1": grid, "attempt_2": grid} for each test pair]}``.

    A single answer is given twice. A test pair without any answer keeps its place, with ``[[0]]`` as its attempts: the
    published evaluator leaves it out, so that the pairs after it move up to a place that is not theirs.
    """

    def attempts(task: str, pair: Pair) -> dict[str, list[list[int]]]:
        grids = [answer.grid.tolist() for answer in votes.ranking(task, pair.input)[:2]]
        first, second, *_ = 2 * grids or [NO_GRID, NO_GRID]
        return {"attempt_1": first, "attempt_2": second}

    return {task: [attempts(task, pair) for pair in pairs] for task, pairs in held_out.tasks.items()}


def is_submission(file: Path) -> bool:
    """Whether a file holds a submission."""
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError, OSError):
        return False
    return isinstance(content, dict) and all(
        isinstance(pairs, list) and all(isinstance(pair, dict) and "attempt_1" in pair for pair in pairs)
        for pairs in content.values()
    )


def write_submission(file: Path, content: Submission) -> None:
    """Write it, whole or not at all. Raises UserError where the disk says no."""
    with writing(file, "give another submission"):
        write_durably(file, json.dumps(content).encode())
