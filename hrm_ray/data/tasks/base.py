"""What a puzzle family is to the rest of the system: tokens in, tokens out, and how to read and show them.

A task turns text into tokens and back, and says whether an answer solves its question. Families that can be
built from raw puzzles add more (see sudoku); `Tokens` is the family of data sets we know nothing else about.
"""

from abc import ABC, abstractmethod
from importlib import import_module
from typing import Any

import numpy as np

from hrm_ray.config.validate import nearest
from hrm_ray.data.layout import Cells
from hrm_ray.errors import UserError, shown


class Task(ABC):
    """A puzzle family of one fixed shape.

    Attributes:
        name: how the registry and manifests call it.
        options: what `get_task(name, **options)` needs to make this very task again.
        vocab_size: number of tokens, at most 256.
        seq_len: tokens in a question, and in an answer.
        pad_id, ignore_label_id, blank_identifier_id: as in the published data sets.
        checkable: whether `is_solution` can tell right from wrong.
        cells: how its puzzles are written, for the reader of files; None: as `parse` says, one a line.
    """

    name: str
    options: dict[str, Any]
    vocab_size: int
    seq_len: int
    pad_id: int = 0
    ignore_label_id: int | None = 0
    blank_identifier_id: int = 0
    checkable: bool = True
    cells: Cells | None = None

    @abstractmethod
    def parse(self, text: str) -> np.ndarray:
        """One puzzle from text, uint8[seq_len]. Raises UserError naming the first thing wrong with it."""

    @abstractmethod
    def to_text(self, tokens: np.ndarray) -> str:
        """The one-line text of tokens uint8[seq_len], which `parse` reads back."""

    @abstractmethod
    def render(self, tokens: np.ndarray, given: np.ndarray | None = None) -> str:
        """Several lines for a person. `given`, the question, sets apart what was asked from what was answered."""

    @abstractmethod
    def is_solution(self, inputs: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        """Whether each row of outputs (integers [n, seq_len]) fully and rightly solves its question; bool[n]."""

    def contradiction(self, question: np.ndarray) -> str | None:
        """What in a question (uint8[seq_len]) breaks the rules, in words; None: nothing, or the task cannot tell."""
        return None

    def num_solutions(self, question: np.ndarray) -> int | None:
        """Solutions of a question (uint8[seq_len]): 0, 1, or 2 for several; None: the task cannot tell."""
        return None

    def relabelings(self, count: int) -> np.ndarray:
        """`count` permutations of the tokens, integers [count, vocab_size], under which a puzzle remains one; the first
        changes nothing, and the others are always the same. Raises UserError if the task knows none."""
        raise UserError(f"votes={count}: task {self.name} has no relabelled copies of a puzzle; use votes=1")


class Tokens(Task):
    """A data set of an unknown family (imported): shown as numbers, answers cannot be checked."""

    name = "tokens"
    checkable = False

    def __init__(self, vocab_size: int, seq_len: int):
        self.options = {"vocab_size": vocab_size, "seq_len": seq_len}
        self.vocab_size = vocab_size
        self.seq_len = seq_len

    def parse(self, text: str) -> np.ndarray:
        """Numbers separated by spaces or commas."""
        words = text.replace(",", " ").split()
        for position, word in enumerate(words, start=1):
            if not word.isdecimal() or int(word) >= self.vocab_size:
                raise UserError(
                    f"token '{shown(word)}' at position {position}; allowed: 0..{self.vocab_size - 1}"
                )
        if len(words) != self.seq_len:
            raise UserError(f"{len(words)} tokens; {self.seq_len} are needed")
        return np.array(words, dtype=np.uint8)

    def to_text(self, tokens: np.ndarray) -> str:
        return " ".join(str(int(token)) for token in tokens)

    def render(self, tokens: np.ndarray, given: np.ndarray | None = None) -> str:
        """As a square if the length is a square number, else in lines of 32."""
        side = round(self.seq_len**0.5)
        width = side if side * side == self.seq_len else 32
        cell = len(str(self.vocab_size - 1))
        words = [f"{int(token):>{cell}}" for token in tokens]
        return "\n".join(" ".join(words[start : start + width]) for start in range(0, len(words), width))

    def is_solution(self, inputs: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        raise UserError("a data set of unknown task cannot tell whether an answer solves its question")


# Where each family lives; imported when asked for.
_TASKS = {
    "arc": "hrm_ray.data.tasks.arc:Arc",
    "sudoku": "hrm_ray.data.tasks.sudoku:Sudoku",
    "tokens": "hrm_ray.data.tasks.base:Tokens",
}


def get_task(name: str, **options: Any) -> Task:
    """The task called `name` with its options, e.g. ``get_task("sudoku", size=9)``.

    Raises:
        UserError: no such task, or options it does not take.
    """
    if name not in _TASKS:
        raise UserError(f"unknown task '{name}'; {nearest(name, _TASKS)}")
    module, _, cls = _TASKS[name].partition(":")
    try:
        return getattr(import_module(module), cls)(**options)
    except TypeError as error:
        raise UserError(f"task {name}: options {options} do not fit: {error}") from None
