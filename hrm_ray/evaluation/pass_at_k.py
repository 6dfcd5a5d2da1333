"""pass@K of votes, as the two published systems count it. Both rank alike, and differ in what they average.

- TRM (`pass@K`): the mean over all test tasks of the share of a task's test pairs whose solution is among the K best.
- HRM (`hrm_pass@K`): the share of tasks all of whose pairs are solved so. A pair of which no row without augmentation
  was predicted does not count, nor does a task that has only such pairs.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from hrm_ray.data.tasks.arc import NO_GRID
from hrm_ray.evaluation.held_out import HeldOut, Pair
from hrm_ray.evaluation.votes import Votes

KS = (1, 2, 5, 10, 100, 1000)


class Outcome(NamedTuple):
    """Of a test pair: the place of its solution among the answers (0 the best; None: nobody gave it), how many rows
    voted, how many of them for the solution, and whether one of them was not augmented."""

    place: int | None
    num_votes: int
    num_right: int
    has_original: bool

    def within(self, k: int) -> bool:
        """Whether the solution is among the k best."""
        return self.place is not None and self.place < k


def outcomes(votes: Votes, held_out: HeldOut) -> dict[str, list[Outcome]]:
    """Of each task whose solutions are known: the outcomes of its test pairs."""
    return {task: [_outcome(votes, task, pair) for pair in pairs] for task, pairs in held_out.solved.items()}


def _outcome(votes: Votes, task: str, pair: Pair) -> Outcome:
    assert pair.output is not None
    ranking = votes.ranking(task, pair.input)
    place = next((i for i, answer in enumerate(ranking) if np.array_equal(answer.grid, pair.output)), None)
    return Outcome(
        place,
        num_votes=sum(answer.num_votes for answer in ranking),
        num_right=0 if place is None else ranking[place].num_votes,
        has_original=votes.has_original(task, pair.input),
    )


def pass_at_k(votes: Votes, held_out: HeldOut) -> dict[str, float]:
    """`pass@K` and `hrm_pass@K` for each K of `KS`, and `row_accuracy`: the share of rows that gave the solution, which
    is what a single answer is worth. What would be a mean of nothing is left out.
    """
    tasks = list(outcomes(votes, held_out).values())
    with_original = [[pair for pair in pairs if pair.has_original] for pairs in tasks]
    with_original = [pairs for pairs in with_original if pairs]
    metrics = _each_k("pass", tasks, lambda solved: sum(solved) / len(solved))
    metrics |= _each_k("hrm_pass", with_original, all)
    if num_votes := sum(pair.num_votes for pairs in tasks for pair in pairs):
        metrics["row_accuracy"] = sum(pair.num_right for pairs in tasks for pair in pairs) / num_votes
    return metrics


def _each_k(name: str, tasks: list[list[Outcome]], score: Callable[[list[bool]], float]) -> dict[str, float]:
    """The mean over tasks of a score of which of its pairs are solved."""
    if not tasks:
        return {}
    return {
        f"{name}@{k}": sum(score([pair.within(k) for pair in pairs]) for pairs in tasks) / len(tasks)
        for k in KS
    }


def notes(votes: Votes, held_out: HeldOut) -> list[str]:
    """What a reader of the numbers must know, a line each."""
    said = []
    num_tasks, num_solved = len(held_out.tasks), len(held_out.solved)
    if not num_solved:
        said.append("the data set has no solutions of its test tasks: no pass@k")
    elif num_solved < num_tasks:
        said.append(f"{num_tasks - num_solved} of {num_tasks} test tasks have no solutions, and do not count")
    pairs = [(task, pair.input) for task, pairs in held_out.tasks.items() for pair in pairs]
    if missing := sum(not votes.num_votes(task, question) for task, question in pairs):
        said.append(
            f"{missing} of {len(pairs)} test pairs have no prediction; a submission holds {NO_GRID} in their places"
        )
    return said
