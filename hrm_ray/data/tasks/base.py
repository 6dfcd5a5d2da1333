"""What a puzzle family is to the rest of the system: tokens in, tokens out, and how to read and show them.

A family is a module of this room, or one of yours that is named by its import path (`my_puzzles.latin`); its name is
the module's. It holds a class of `Task`, which turns text into tokens and back and says whether an answer solves its
question. A family that can be built from raw puzzles also has a recipe and a builder (see `hrm_ray.data.builder`), in
the same module or, where the module is a package, in its `builder`.
"""

import os
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from types import ModuleType
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hrm_ray.config.validate import nearest
from hrm_ray.data.drawing import Cell, known_width, row_width
from hrm_ray.data.layout import Cells
from hrm_ray.errors import UserError, shown


class Symmetry(NamedTuple):
    """What turns a puzzle into another one, and its answer into the other's: x -> tokens[x[cells]].

    Attributes:
        cells: int64 [seq_len], a permutation: cell i of the copy is cell cells[i].
        tokens: int64 [vocab_size], a permutation: token t becomes tokens[t].
    """

    cells: np.ndarray
    tokens: np.ndarray


class Task(ABC):
    """A puzzle family of one fixed shape. A class that gives itself a `name` is found by it.

    Attributes:
        name: how recipes and manifests call it: the name of its module.
        options: what `get_task(name, **options)` needs to make this very task again.
        vocab_size: number of tokens, at most 256.
        seq_len: tokens in a question, and in an answer.
        pad_id, ignore_label_id, blank_identifier_id: as in the published data sets.
        is_padded: whether `pad_id` is no token of puzzles, so that drawings leave it out.
        is_recognised: whether arrays surely are of this family where `of_arrays` says so; if not, a user must name it.
        checkable: whether `is_solution` can tell right from wrong.
        fillable: whether an answer is its question with cells filled in, so that training may give some of them away.
        answer_cells: all labels are in the last so many cells; None: they may be anywhere.
        answers_are_inputs: whether a question shows its answer in a later cell; only a causal model does not see it.
        meaning: names of `options` that say, beside `vocab_size` and `seq_len`, what tokens mean and what answers are
            right; a model is used on data alone that agree in them.
        chance: exact accuracy of one who guesses; None: nobody knows.
        cells: how its puzzles are written, for the reader of files; None: as `parse` says, one a line.
        keeps_spaces: whether a space is a cell like others.
        width: cells in a row; None: see `hrm_ray.data.drawing.known_width`.
        box: rows and columns of the boxes that a grid is made of; None: there are no boxes.
        separator: what stands between the rows of a puzzle that is written in one line, if anything does.
    """

    classes: ClassVar[dict[str, type["Task"]]] = {}

    name: str
    options: dict[str, Any]
    vocab_size: int
    seq_len: int
    pad_id: int = 0
    ignore_label_id: int | None = 0
    blank_identifier_id: int = 0
    is_padded: ClassVar[bool] = True
    is_recognised: ClassVar[bool] = True
    checkable: bool = True
    fillable: bool = False
    answer_cells: int | None = None
    answers_are_inputs: bool = False
    meaning: ClassVar[tuple[str, ...]] = ()
    chance: float | None = None
    cells: Cells | None = None
    keeps_spaces: bool = False
    width: int | None = None
    box: tuple[int, int] | None = None
    separator: str | None = None

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):
            Task.classes[cls.name] = cls

    @abstractmethod
    def parse(self, text: str) -> np.ndarray:
        """One puzzle from text, uint8[seq_len]. Raises UserError naming the first thing wrong with it."""

    @abstractmethod
    def to_text(self, tokens: np.ndarray) -> str:
        """The one-line text of tokens uint8[seq_len], which `parse` reads back."""

    def cell(self, token: int) -> Cell:
        """How a token 0..255 looks, also one that is none of the vocabulary; here its number, without a colour."""
        return Cell(str(token))

    def misfits(self, given: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """The cells in which `tokens` cannot be an answer to the question `given` (both uint8[seq_len]), such as a clue
        that is not kept; bool[seq_len]. Here none."""
        return np.zeros(self.seq_len, bool)

    def render(self, tokens: np.ndarray, given: np.ndarray | None = None) -> str:
        """Several lines for a person: the symbols of `cell`, unless a task does better.

        `given`, the question, sets apart what was asked from what was answered: an apostrophe may follow what was
        answered, an exclamation mark what cannot answer the question.
        """
        symbols = [self.cell(token).symbol for token in tokens.tolist()]
        longest = max(len(self.cell(token).symbol) for token in range(self.vocab_size))
        width = row_width(self)
        rows = (symbols[start : start + width] for start in range(0, len(symbols), width))
        return "\n".join(" ".join(symbol.rjust(longest) for symbol in row) for row in rows)

    def coordinates(self) -> np.ndarray | None:
        """Where each cell lies: in which row, which column and, if there are boxes, which box.

        Returns:
            int64 [seq_len, n], n coordinates of each cell, every one counted from 0; None: nobody knows.
        """
        width = known_width(self)
        if width is None:
            return None
        row, col = np.divmod(np.arange(self.seq_len), width)
        if self.box is None:
            return np.stack([row, col], axis=1)
        box_rows, box_cols = self.box
        boxes_across = -(-width // box_cols)
        return np.stack([row, col, row // box_rows * boxes_across + col // box_cols], axis=1)

    @abstractmethod
    def is_solution(self, inputs: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        """Whether each row of outputs (integers [n, seq_len]) fully and rightly solves its question; bool[n].

        Threads of a build may call it at the same time.
        """

    def labels_fit(self, inputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Whether each row of labels (uint8 [n, seq_len]) may stand beside its question in a data set; bool[n].

        Asked if the task is `checkable`. Here a label must solve its question.
        """
        return self.is_solution(inputs, labels)

    def about(self, num_examples: Mapping[str, int]) -> list[str]:
        """What to tell people, in lines, before a model is trained on so many examples of each split; here nothing."""
        return []

    def parse_all(self, texts: pa.Array, *, are_answers: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Many puzzles at once, as `parse` reads them.

        Args:
            texts: strings or nulls.
            are_answers: whether they are to become labels.

        Returns:
            Tokens uint8 [n, seq_len], and whether each text is a puzzle, bool [n]; where not, its tokens mean nothing.
        """
        tokens, good = np.zeros((len(texts), self.seq_len), np.uint8), np.zeros(len(texts), bool)
        for i, text in enumerate(texts.to_pylist()):
            try:
                tokens[i], good[i] = self.parse(text or ""), True
            except UserError:
                continue
        return tokens, good

    def accepts(self, questions: np.ndarray) -> np.ndarray:
        """Whether each question (uint8 [n, seq_len]) may be one, as far as can be seen without solving it; bool [n]."""
        return np.array([self.contradiction(question) is None for question in questions], bool)

    def problem(self, question: str, answer: str | None = None) -> str | None:
        """What is wrong with a puzzle as far as can be seen without solving it, in words; None: nothing."""
        try:
            inputs = self.parse(question)
        except UserError as error:
            return f"{self.quoted('question', question)}: {error}"
        if wrong := self.why_no_question(inputs):
            return f"{self.quoted('question', question)}: {wrong}"
        if not answer:
            return None
        try:
            outputs = self.parse(answer)
        except UserError as error:
            return f"{self.quoted('answer', answer)}: {error}"
        if self.checkable and not self.is_solution(inputs[None], outputs[None])[0]:
            return f"{self.quoted('answer', answer)}: {self.why_no_solution(inputs, outputs)}"
        return None

    def quoted(self, what: str, text: str) -> str:
        """How a message names a question or an answer; with its text where that is short."""
        return what

    def why_no_question(self, question: np.ndarray) -> str | None:
        """Why a question (uint8[seq_len]) in a file is none, in words; None: nothing is wrong."""
        return self.contradiction(question)

    def why_no_solution(self, question: np.ndarray, answer: np.ndarray) -> str:
        """Why an answer that is no solution (both uint8[seq_len]) is none, in words."""
        return "it does not solve the question"

    @classmethod
    def of_arrays(
        cls, vocab_size: int, seq_len: int, pad_id: int, inputs: np.ndarray, labels: np.ndarray
    ) -> Self | None:
        """The task of this family whose puzzles arrays hold; None: they hold others, or nobody can tell.

        Args:
            vocab_size, seq_len, pad_id: as they are described.
            inputs, labels: uint8 [n, seq_len], some of their rows.
        """
        return None

    def contradiction(self, question: np.ndarray) -> str | None:
        """What in a question (uint8[seq_len]) breaks the rules, in words; None: nothing, or the task cannot tell."""
        return None

    def num_solutions(self, question: np.ndarray) -> int | None:
        """Solutions of a question (uint8[seq_len]): 0, 1, or 2 for several; None: the task cannot tell."""
        return None

    def vary(self, inputs: np.ndarray, labels: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Examples (uint8 [n, seq_len] twice) as training sees them on a visit, decided by a random key, uint64 [n]."""
        return inputs, labels

    def symmetries(self, count: int) -> list[Symmetry]:
        """`count` symmetries, whose copies of a puzzle can vote; the first changes nothing, and the others are always
        the same. Raises UserError if the task has not so many."""
        raise UserError(f"votes={count}: task {self.name} has no symmetric copies of a puzzle; use votes=1")


class WrittenTask(Task):
    """A task whose puzzles are written with one ASCII character a cell, so that files of many are read fast."""

    @abstractmethod
    def encode(self, codes: np.ndarray) -> np.ndarray:
        """Tokens of many puzzles at once: character codes uint8 [n, seq_len] -> uint8 [n, seq_len], 0 (pad) where a
        character is impossible."""

    def parse_all(self, texts: pa.Array, *, are_answers: bool = False) -> tuple[np.ndarray, np.ndarray]:
        raw = pc.fill_null(texts, "")
        texts = raw if self.keeps_spaces else pc.utf8_trim_whitespace(raw)
        fits = pc.equal(pc.binary_length(texts), self.seq_len).to_numpy(zero_copy_only=False)
        fitting = texts.filter(pa.array(fits))
        tokens = np.zeros((len(texts), self.seq_len), np.uint8)
        if len(fitting):
            tokens[fits] = self.encode(flat_bytes(fitting).reshape(-1, self.seq_len))
        good = (tokens != 0).all(axis=1)
        given = pc.greater(pc.binary_length(texts), 0).to_numpy(zero_copy_only=False)
        for i in np.flatnonzero(given & ~good):  # the few that are not written as most are
            text = raw[i].as_py()
            chars = self.cells.whole(text) if self.cells else text  # spaces may be blanks
            with suppress(UserError):
                tokens[i], good[i] = self.parse(chars or ""), True
        return tokens, good


def flat_bytes(texts: pa.Array) -> np.ndarray:
    """All bytes of a string column without nulls, one text behind the other; uint8 [n], not copied."""
    if not len(texts):
        return np.empty(0, np.uint8)
    ends = np.frombuffer(texts.buffers()[1], np.int32)[texts.offset : texts.offset + len(texts) + 1]
    return np.frombuffer(texts.buffers()[2] or b"", np.uint8)[ends[0] : ends[-1]]


ROOM = "hrm_ray.data.tasks"  # where the families are


def family_names() -> list[str]:
    """The families that ship."""
    names = (module.name for module in pkgutil.iter_modules(import_module(ROOM).__path__))
    return sorted(name for name in names if name != "base")


TRUSTED = "HRM_RAY_TASKS"  # the environment's list of packages, a comma between, whose tasks may be imported
_named_here: set[str] = set()  # packages that a recipe of this process has named


def trust(name: str) -> None:
    """The user has named the task `name` by itself, not a file from elsewhere: its package may be imported."""
    _named_here.add(name.partition(".")[0])


def import_family(name: str) -> ModuleType:
    """The module of the family `name`.

    The name may be from the manifest of a data set or checkpoint of somebody else's, which is not to run code: a module
    outside this package is imported only if the user has named its package (see `trust` and `TRUSTED`).

    Raises:
        UserError: there is none, it may not be imported, or cannot be.
    """
    if "." in name:
        path, package = name, name.partition(".")[0]
        if package not in {*_named_here, *os.environ.get(TRUSTED, "").split(",")}:
            raise UserError(
                f"task '{shown(name)}' is Python code; if the package {shown(package)} is yours or you trust it, set "
                f"{TRUSTED}={shown(package)}"
            )
    else:
        path = f"{ROOM}.{name}"
        if name not in family_names():
            raise UserError(f"unknown task '{shown(name)}'; {nearest(name, family_names())}")
    try:
        return import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise UserError(f"task {name}: {path} cannot be imported: {error!r}") from error
        raise UserError(
            f"task '{shown(name)}' is no module that Python finds; put its folder on PYTHONPATH, or install it"
        ) from None
    except Exception as error:  # code of the user's
        raise UserError(f"task {name}: {path} cannot be imported: {error!r}") from error


def task_class(name: str) -> type[Task]:
    """The class of the task called `name`. Raises UserError: there is none."""
    import_family(name)
    if name not in Task.classes:
        raise UserError(f"task {name}: its module has no class of Task with name = '{name}'")
    return Task.classes[name]


def get_task(name: str, **options: Any) -> Task:
    """The task called `name` with its options, e.g. ``get_task("sudoku", size=9)``.

    Raises:
        UserError: no such task, or options it does not take.
    """
    kind = task_class(name)
    try:
        return kind(**options)
    except TypeError as error:
        raise UserError(f"task {name}: options {options} do not fit: {error}") from None
