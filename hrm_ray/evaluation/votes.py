"""Votes over the augmented copies of a test pair: each row undoes its augmentation and votes for its answer.

What always holds: answers are ranked by their number of votes; the mean of sigmoid(q_halt) decides between equal
numbers, and what was seen first between equal means. Rows that several workers have counted, merged in the order of
their ranks, give the same votes as one worker's, but for the order of answers that are equal in both: sums are exact.
Only distinct answers are kept, never rows.

Source: the published evaluator (TRM, evaluators/arc.py), whose counts, ranks and means these are.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from hrm_ray.data.dihedral import turned
from hrm_ray.data.tasks.arc import SIDE, crop_shapes
from hrm_ray.errors import UserError
from hrm_ray.evaluation.names import Names

State = Mapping[str, np.ndarray]

_AT_ONCE = 4096  # rows; bounds the memory of `add`
# Sums of sigmoids are whole numbers of this many parts: no order of adding changes them.
_PARTS_BITS = 64


class Ranked(NamedTuple):
    """An answer with votes: the grid uint8[h, w], how many rows gave it, and their mean sigmoid(q_halt)."""

    grid: np.ndarray
    num_votes: int
    confidence: float


@dataclass
class _Poll:
    """Of one test input: packed answer -> [votes, sum of sigmoids], in order of first sight."""

    has_original: bool = False
    answers: dict[bytes, list[int]] = field(default_factory=dict)

    def vote(self, answer: bytes, count: int, total: int) -> None:
        votes = self.answers.setdefault(answer, [0, 0])
        votes[0] += count
        votes[1] += total


class Votes:
    """Counts votes; see the module.

    Args:
        names: of the puzzle identifiers.
    """

    def __init__(self, names: Names):
        self._names = names
        self._polls: defaultdict[tuple[int, bytes], _Poll] = defaultdict(_Poll)

    def reset(self) -> None:
        """Forget all votes."""
        self._polls.clear()

    def add(
        self,
        inputs: np.ndarray,
        predictions: np.ndarray,
        puzzle_identifiers: np.ndarray,
        q_halt_logits: np.ndarray,
    ) -> None:
        """Count the votes of rows, in their order.

        Args:
            inputs, predictions: tokens, integers [n, 900]. puzzle_identifiers: integers [n]; rows without a puzzle (see
            `Names`) do not vote. q_halt_logits: floats [n]; one that is not a number counts as certainty 0.

        Raises:
            UserError: an identifier without a name.
        """
        strange = (puzzle_identifiers < 0) | (puzzle_identifiers >= len(self._names))
        if strange.any():
            raise UserError(
                f"puzzle identifier {puzzle_identifiers[strange][0]}, but identifiers.json names 0.."
                f"{len(self._names) - 1}: identifiers of another build; give the data set that the outputs are of"
            )
        for start in range(0, len(inputs), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            self._add(inputs[part], predictions[part], puzzle_identifiers[part], q_halt_logits[part])

    def _add(self, inputs: np.ndarray, predictions: np.ndarray, ids: np.ndarray, q: np.ndarray) -> None:
        votes = self._names.task_of[ids] >= 0
        inputs, predictions, ids = inputs[votes], predictions[votes], ids[votes]
        with np.errstate(over="ignore"):
            certainty = np.nan_to_num(1 / (1 + np.exp(-q[votes].astype(np.float64))))
        questions, answers = self._undone(inputs, ids), self._undone(predictions, ids)
        rows = zip(
            self._names.task_of[ids].tolist(),
            questions,
            answers,
            np.ldexp(certainty, _PARTS_BITS).tolist(),
            self._names.is_original[ids].tolist(),
            strict=True,
        )
        for task, question, answer, parts, is_original in rows:
            poll = self._polls[task, question]
            poll.has_original |= is_original
            poll.vote(answer, 1, int(parts))

    def _undone(self, tokens: np.ndarray, ids: np.ndarray) -> Iterable[bytes]:
        """The packed grid of each row of tokens (integers [n, 900]) with its augmentation undone."""
        shapes = crop_shapes(tokens).tolist()
        frames = tokens.reshape(-1, SIDE, SIDE)
        symmetries = self._names.undoes[ids].tolist()
        for frame, (height, width), symmetry, colours in zip(
            frames, shapes, symmetries, self._names.colours[ids], strict=True
        ):
            yield _pack(colours[turned(frame[:height, :width], symmetry)])

    def state(self) -> dict[str, np.ndarray]:
        """All votes as arrays, for `merge` on another worker.

        Returns:
            of each test input `tasks` int32[p], `has_original` bool[p], `num_answers` int32[p]; of each answer, in
            order, `counts` int64[a], `sums` uint64[a, 2] (high and low half); `grids` uint8[b]: for each test input
            itself and its answers, each as height, width and cells.
        """
        grids, counts, sums = bytearray(), [], []
        for (_, question), poll in self._polls.items():
            grids += question
            for answer, (count, total) in poll.answers.items():
                grids += answer
                counts.append(count)
                sums.append(divmod(total, 1 << 64))
        polls = self._polls.values()
        return {
            "tasks": np.array([task for task, _ in self._polls], np.int32),
            "has_original": np.array([poll.has_original for poll in polls], bool),
            "num_answers": np.array([len(poll.answers) for poll in polls], np.int32),
            "counts": np.array(counts, np.int64),
            "sums": np.array(sums, np.uint64).reshape(-1, 2),
            "grids": np.frombuffer(bytes(grids), np.uint8),
        }

    def merge(self, states: Iterable[State]) -> None:
        """Add the votes of others that have the same names, in the order given: that of the workers' ranks."""
        for state in states:
            grids = _split(state["grids"].tobytes())
            answers = zip(state["counts"].tolist(), state["sums"].tolist(), strict=True)
            for task, has_original, num_answers in zip(
                *(state[name].tolist() for name in ("tasks", "has_original", "num_answers")), strict=True
            ):
                poll = self._polls[task, next(grids)]
                poll.has_original |= has_original
                for _ in range(num_answers):
                    count, (high, low) = next(answers)
                    poll.vote(next(grids), count, (high << 64) + low)

    # What came out

    def _poll(self, task: str, question: np.ndarray) -> _Poll:
        return self._polls.get((self._names.tasks.get(task, -1), _pack(question)), _Poll())

    def ranking(self, task: str, question: np.ndarray) -> list[Ranked]:
        """The answers to a test input (uint8[h, w]) of a task, best first; [] if no row was of it."""
        answers = sorted(self._poll(task, question).answers.items(), key=lambda item: item[1], reverse=True)
        return [
            Ranked(_unpack(answer), count, total / (count << _PARTS_BITS))
            for answer, (count, total) in answers
        ]

    def num_votes(self, task: str, question: np.ndarray) -> int:
        """Rows that were of a test input (uint8[h, w]) of a task."""
        return sum(count for count, _ in self._poll(task, question).answers.values())

    def has_original(self, task: str, question: np.ndarray) -> bool:
        """Whether one of them was not augmented."""
        return self._poll(task, question).has_original


# Grids as keys: height, width, cells. They are what the published code hashes, and short enough to be kept.


def _pack(grid: np.ndarray) -> bytes:
    return bytes(grid.shape) + grid.tobytes()


def _unpack(packed: bytes) -> np.ndarray:
    return np.frombuffer(packed, np.uint8, offset=2).reshape(packed[0], packed[1])


def _split(packed: bytes) -> Iterator[bytes]:
    """Packed grids, one after the other."""
    start = 0
    while start < len(packed):
        stop = start + 2 + packed[start] * packed[start + 1]
        yield packed[start:stop]
        start = stop
