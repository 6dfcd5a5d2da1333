"""Sudoku in sizes 4 (2x2 boxes), 6 (boxes of 2 rows and 3 columns) and 9.

Tokens: 0 pad, 1 blank, digit d is d + 1. Reading, checking and showing need numpy only; the solver, the
generator and the augmentation are compiled (`kernels`) and loaded when first used.
"""

import math
from functools import cached_property
from types import ModuleType

import numpy as np

from hrm_ray.data.drawing import Cell
from hrm_ray.data.layout import Cells
from hrm_ray.data.tasks.base import Symmetry, WrittenTask
from hrm_ray.errors import UserError, shown

BLANK = 1
FIRST_DIGIT = 2
BOX_SHAPES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}
MIN_CLUES = {4: 4, 6: 8, 9: 17}  # fewer never determine a solution

_RELABELING_KEY = 9  # any number; the copies of a puzzle that vote are always the same

# Rows checked at a time: bounds the memory of a check over millions.
_CHUNK = 65_536


class Sudoku(WrittenTask):
    """See the module. `size` is 4, 6 or 9."""

    name = "sudoku"
    fillable = True
    cells: Cells

    def __init__(self, size: int = 9):
        if size not in BOX_SHAPES:
            raise UserError(f"sudoku has no size {size}; choose 4, 6 or 9")
        self.options = {"size": size}
        self.size = size
        self.box_rows, self.box_cols = self.box = BOX_SHAPES[size]
        self.vocab_size = size + FIRST_DIGIT
        self.seq_len = size * size
        digits = "".join(str(digit) for digit in range(1, size + 1))
        self.cells = Cells(width=size, height=size, symbols=digits, blanks=".0")
        # Character code -> token; 0 where the character is impossible.
        self._token_of_char = np.zeros(256, np.uint8)
        self._token_of_char[[ord("."), ord("0")]] = BLANK
        self._token_of_char[[ord(digit) for digit in digits]] = np.arange(size) + FIRST_DIGIT

    @classmethod
    def of_arrays(
        cls, vocab_size: int, seq_len: int, pad_id: int, inputs: np.ndarray, labels: np.ndarray
    ) -> "Sudoku | None":
        for task in map(cls, BOX_SHAPES):
            if (vocab_size, seq_len, pad_id) == (task.vocab_size, task.seq_len, task.pad_id):
                return task if task.is_solution(inputs, labels).all() else None
        return None

    # Text

    def parse(self, text: str) -> np.ndarray:
        if puzzle := self.cells.whole(text):
            return self._token_of_char[[ord(char) for char in puzzle]]
        chars = "".join(text.split())
        for position, char in enumerate(chars[: self.seq_len]):
            if ord(char) > 255 or self._token_of_char[ord(char)] == 0:
                row, col = divmod(position, self.size)
                raise UserError(
                    f"impossible digit '{shown(char)}' in row {row + 1}, column {col + 1}; "
                    f"allowed: 1-{self.size}, and . or 0 for a blank"
                )
        raise UserError(f"{len(chars)} characters; a {self.size}x{self.size} Sudoku has {self.seq_len}")

    def encode(self, codes: np.ndarray) -> np.ndarray:
        return self._token_of_char[codes]

    def to_text(self, tokens: np.ndarray) -> str:
        return "".join(self.cell(token).symbol for token in tokens.tolist())

    def cell(self, token: int) -> Cell:
        if token == BLANK:
            return Cell(".")
        return Cell(str(token - 1) if FIRST_DIGIT <= token < self.vocab_size else "?")

    def render(self, tokens: np.ndarray, given: np.ndarray | None = None) -> str:
        """A grid with box lines. Digits that answer a blank of `given` are followed by an apostrophe, those that
        contradict a clue of it by an exclamation mark."""
        if given is None:
            marks = [""] * self.seq_len
        else:
            marks = [
                "'" if g == BLANK else " " if g == t else "!" for t, g in zip(tokens, given, strict=True)
            ]
        cells = [self.cell(token).symbol + mark for token, mark in zip(tokens.tolist(), marks, strict=True)]
        width = self.box_cols * (len(cells[0]) + 1) + 1
        line = "+".join(["", *["-" * width] * (self.size // self.box_cols), ""])
        lines = [line]
        for row in range(self.size):
            in_row = cells[row * self.size : (row + 1) * self.size]
            boxes = [
                " ".join(in_row[start : start + self.box_cols])
                for start in range(0, self.size, self.box_cols)
            ]
            lines.append("| " + " | ".join(boxes) + " |")
            if (row + 1) % self.box_rows == 0:
                lines.append(line)
        return "\n".join(lines)

    # Rules

    def _units(self, bits: np.ndarray, reduce: np.ufunc) -> np.ndarray:
        """Reduce uint16[n, seq_len] over the cells of every row, column and box: uint16[n, 3 * size]."""
        size, box_rows, box_cols = self.size, self.box_rows, self.box_cols
        n = len(bits)
        grid = bits.reshape(n, size, size)
        boxes = bits.reshape(n, size // box_rows, box_rows, size // box_cols, box_cols)
        in_boxes = reduce.reduce(reduce.reduce(boxes, axis=4, dtype=bits.dtype), axis=2, dtype=bits.dtype)
        rows = reduce.reduce(grid, axis=2, dtype=bits.dtype)
        cols = reduce.reduce(grid, axis=1, dtype=bits.dtype)
        return np.concatenate([rows, cols, in_boxes.reshape(n, size)], axis=1)

    @cached_property
    def _bit_of_token(self) -> np.ndarray:
        bits = np.zeros(256, np.uint16)
        bits[FIRST_DIGIT : self.vocab_size] = 1 << np.arange(self.size)
        return bits

    def contradicts(self, inputs: np.ndarray) -> np.ndarray:
        """Whether each question (uint8[n, seq_len]) has a digit twice in a row, column or box; bool[n]."""
        bits = self._bit_of_token[inputs]
        # A sum of distinct bits is their union; with a digit twice the sum is larger.
        return (self._units(bits, np.add) != self._units(bits, np.bitwise_or)).any(axis=1)

    def accepts(self, questions: np.ndarray) -> np.ndarray:
        """Nothing contradicts, and there is a blank."""
        return ~self.contradicts(questions) & (questions == BLANK).any(axis=1)

    def is_solution(self, inputs: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        """Complete, each digit once in every row, column and box, and all clues kept; bool[n]."""
        inputs, outputs = np.asarray(inputs), np.asarray(outputs)
        full = (1 << self.size) - 1
        solved = np.empty(len(outputs), bool)
        for start in range(0, len(outputs), _CHUNK):
            part = slice(start, start + _CHUNK)
            given, answer = inputs[part], outputs[part]
            in_range = (answer >= 0) & (answer < 256)  # model outputs may come as any integer type
            bits = self._bit_of_token[np.where(in_range, answer, 0)]
            valid = (self._units(bits, np.bitwise_or) == full).all(axis=1)
            solved[part] = valid & ((given == answer) | (given == BLANK)).all(axis=1)
        return solved

    def quoted(self, what: str, text: str) -> str:
        return f"{what} '{shown(text)}'"

    def why_no_question(self, question: np.ndarray) -> str | None:
        if contradiction := self.contradiction(question):
            return contradiction
        if not (question == BLANK).any():
            return "it has no blank; is it the answer of another? Give both as one row"
        return None

    def why_no_solution(self, question: np.ndarray, answer: np.ndarray) -> str:
        differ = np.flatnonzero((question != answer) & (question != BLANK))
        if len(differ):
            row, col = divmod(int(differ[0]), self.size)
            return f"it does not fit its question: clue in row {row + 1}, column {col + 1} differs"
        if (answer == BLANK).any():
            return "it is not complete"
        return f"it is no solution: {self._repetition(answer)}"

    def contradiction(self, question: np.ndarray) -> str | None:
        repetition = self._repetition(question)
        return repetition and f"its clues contradict: {repetition}"

    def _repetition(self, tokens: np.ndarray) -> str | None:
        cells_of_unit, _ = self._geometry
        for unit, cells in enumerate(cells_of_unit):
            digits, counts = np.unique(tokens[cells], return_counts=True)
            for digit in digits[(counts > 1) & (digits >= FIRST_DIGIT)]:
                kind = ("row", "column", "box")[unit // self.size]
                return f"{digit - 1} twice in {kind} {unit % self.size + 1}"
        return None

    # Compiled: solver, generator, symmetries

    @cached_property
    def _kernels(self) -> ModuleType:
        from hrm_ray.data.tasks.sudoku import kernels  # numba: seconds to import, not needed to read and show

        return kernels

    @cached_property
    def _geometry(self) -> tuple[np.ndarray, np.ndarray]:
        """The cells of every unit, int64[3 * size, size] (rows, columns, boxes), and the three units of every cell,
        int64[size * size, 3]."""
        coordinates = self.coordinates()
        assert coordinates is not None  # the grid is a square
        unit_of_cell = coordinates + self.size * np.arange(3)
        units = range(3 * self.size)
        return np.stack([np.flatnonzero((unit_of_cell == unit).any(axis=1)) for unit in units]), unit_of_cell

    def solve(self, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Solve questions uint8[n, seq_len].

        Returns:
            Solutions uint8[n, seq_len], zeros where there is none; the number of solutions, 0, 1 or 2 (meaning
            several), int64[n]; and the difficulty, int64[n]: how many guesses the search made, beyond what follows
            from single candidates and single places, to find the solution and prove it the only one.
        """
        return self._kernels.solve(np.ascontiguousarray(inputs), *self._geometry)

    def num_solutions(self, question: np.ndarray) -> int | None:
        try:
            _, counts, _ = self.solve(question[None])
        except ImportError:  # no numba
            return None
        return int(counts[0])

    def generate(
        self, seed: int, first: int, count: int, num_clues: int, max_tries: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Puzzles number first..first+count-1 of `seed`, with one solution and `num_clues` clues.

        Returns:
            Questions and answers, uint8[count, seq_len]; a question is all zeros if `max_tries` boards did not
            yield it, and so are all after it.
        """
        return self._kernels.generate(seed, first, count, num_clues, max_tries, *self._geometry)

    def augment(
        self, inputs: np.ndarray, labels: np.ndarray, groups: np.ndarray, num_aug: int, seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Each puzzle (rows of inputs and labels, uint8[n, seq_len]) followed by `num_aug` random symmetric copies.

        Copy k of group g (int64[n]) depends on (seed, g, k) alone. Returns uint8[n * (1 + num_aug), seq_len] twice.
        """
        return self._kernels.augment(
            np.ascontiguousarray(inputs),
            np.ascontiguousarray(labels),
            np.asarray(groups, np.int64),
            num_aug,
            seed,
            self.box_rows,
            self.box_cols,
        )

    def symmetries(self, count: int) -> list[Symmetry]:
        """Digits permuted, each time otherwise; pad and blank stay."""
        if count > math.factorial(self.size):
            raise UserError(
                f"votes={count}: {self.size}x{self.size} Sudoku has only {math.factorial(self.size)} relabelled copies"
            )
        words = np.random.Philox(key=_RELABELING_KEY)
        found = {tuple(range(self.size)): None}  # a dict, since it keeps the order
        while len(found) < count:
            found[tuple(words.random_raw(self.size).argsort(kind="stable").tolist())] = None
        tokens = np.tile(np.arange(self.vocab_size), (count, 1))
        tokens[:, FIRST_DIGIT:] = FIRST_DIGIT + np.array(list(found))
        return [Symmetry(np.arange(self.seq_len), relabeling) for relabeling in tokens]
