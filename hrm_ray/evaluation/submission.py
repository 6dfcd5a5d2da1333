"""Kaggle's submission.json: the best answers to every test pair."""

import json
from pathlib import Path

from hrm_ray.data.files import write_durably, writing
from hrm_ray.data.tasks.arc import NO_GRID
from hrm_ray.evaluation.held_out import HeldOut, Pair
from hrm_ray.evaluation.votes import Votes

Submission = dict[str, list[dict[str, list[list[int]]]]]


def submission(votes: Votes, held_out: HeldOut, num_attempts: int = 2) -> Submission:
    """``{task: [{"attempt_1": grid, "attempt_2": grid} for each test pair]}``.

    Of fewer answers than attempts the best fills the rest. A test pair without any answer keeps its place, with
    ``[[0]]`` as its attempts: the published evaluator leaves it out, so that the pairs after it move up to a place
    that is not theirs.
    """

    def attempts(task: str, pair: Pair) -> dict[str, list[list[int]]]:
        grids = [answer.grid.tolist() for answer in votes.ranking(task, pair.input)[:num_attempts]]
        grids += (grids[:1] or [NO_GRID]) * (num_attempts - len(grids))
        return {f"attempt_{number}": grid for number, grid in enumerate(grids, start=1)}

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
