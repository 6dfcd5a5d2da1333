"""Mazes: find a shortest path from the start to the goal of a square grid.

Tokens, as published: 0 pad, 1 wall `#`, 2 free ` `, 3 start `S`, 4 goal `G`, 5 path `o`. The answer is the whole maze
with the path drawn in; a step goes to one of four neighbours.
"""

from functools import cached_property
from math import isqrt
from types import ModuleType
from typing import Literal

import numpy as np

from hrm_ray.data.dihedral import COUNT, cells_of
from hrm_ray.data.drawing import DARK, LIGHT, RIGHT, WAY, WRONG, Cell
from hrm_ray.data.tasks.base import Symmetry, WrittenTask
from hrm_ray.errors import UserError, shown

WALL, FREE, START, GOAL, PATH = 1, 2, 3, 4, 5
SYMBOLS = "# SGo"  # of tokens 1 to 5
LARGEST = 100
Walls = tuple[float, float] | Literal["perfect"]  # see `Maze.generate`
_TEXT = "?#.SGo"
_CELLS = {
    WALL: Cell(" ", DARK),
    FREE: Cell(" ", LIGHT),
    START: Cell("S", RIGHT),
    GOAL: Cell("G", WRONG),
    PATH: Cell("•", WAY),
}
_WALL = "█"  # where there are no colours


class Maze(WrittenTask):
    """See the module. `size` is the number of rows, and of columns."""

    name = "maze"
    keeps_spaces = True
    fillable = True

    def __init__(self, size: int = 30):
        if not 2 <= size <= LARGEST:
            raise UserError(f"maze has no size {size}; choose 2 to {LARGEST}")
        self.options = {"size": size}
        self.size = size
        self.vocab_size = 1 + len(SYMBOLS)
        self.seq_len = size * size
        self._token_of_char = np.zeros(256, np.uint8)
        self._token_of_char[[ord(symbol) for symbol in SYMBOLS]] = np.arange(len(SYMBOLS)) + 1
        self._token_of_char[ord(".")] = FREE  # where a space would be lost

    @classmethod
    def of_arrays(
        cls, vocab_size: int, seq_len: int, pad_id: int, inputs: np.ndarray, labels: np.ndarray
    ) -> "Maze | None":
        size = isqrt(seq_len)
        if (
            (vocab_size, pad_id) != (1 + len(SYMBOLS), cls.pad_id)
            or size * size != seq_len
            or not 2 <= size <= LARGEST
        ):
            return None
        task = cls(size)
        return task if task.accepts(inputs).all() and task.is_solution(inputs, labels).all() else None

    # Text

    def parse(self, text: str) -> np.ndarray:
        """A maze in one line of size * size characters, or in lines of `size`; a free cell is a space or a dot."""
        rows = text.strip("\r\n").splitlines()
        if len(rows) > 1:  # at the end of a line spaces are easily lost
            rows = [row.ljust(self.size) for row in rows]
        chars = "".join(rows)
        if len(chars) != self.seq_len:
            raise UserError(f"{len(chars)} characters; a {self.size}x{self.size} maze has {self.seq_len}")
        tokens = self._token_of_char[np.frombuffer(chars.encode("latin-1", "replace"), np.uint8)]
        if not tokens.all():
            position = int(np.flatnonzero(tokens == 0)[0])
            raise UserError(
                f"impossible character '{shown(chars[position])}' in {self._place(position)}; allowed: # wall, space "
                "or . free, S start, G goal, o path"
            )
        return tokens

    def _place(self, cell: int) -> str:
        row, col = divmod(cell, self.size)
        return f"row {row + 1}, column {col + 1}"

    def encode(self, codes: np.ndarray) -> np.ndarray:
        return self._token_of_char[codes]

    def to_text(self, tokens: np.ndarray) -> str:
        """Free cells are dots here, since spaces at the ends of lines are easily lost."""
        return "".join(_TEXT[token] if token < len(_TEXT) else "?" for token in tokens.tolist())

    def cell(self, token: int) -> Cell:
        return _CELLS.get(token, Cell("?"))

    def misfits(self, given: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """An answer may change free cells into path, and nothing else."""
        return (tokens != given) & ~((given == FREE) & (tokens == PATH))

    def render(self, tokens: np.ndarray, given: np.ndarray | None = None) -> str:
        """A picture in a frame. A cell in which the answer changes what was given, but for the path, shows `!`."""
        cells = [_WALL if token == WALL else self.cell(token).symbol for token in tokens.tolist()]
        if given is not None:
            for cell in np.flatnonzero(self.misfits(given, tokens)):
                cells[cell] = "!"
        line = "-" * (2 * self.size)
        rows = (cells[start : start + self.size] for start in range(0, self.seq_len, self.size))
        inside = ["|" + "".join(2 * c if c == _WALL else f"{c} " for c in row) + "|" for row in rows]
        return "\n".join([f"+{line}+", *inside, f"+{line}+"])

    # Rules

    @cached_property
    def _kernels(self) -> ModuleType:
        from hrm_ray.data.tasks.maze import kernels  # numba: seconds to import, not needed to read and show

        return kernels

    def accepts(self, questions: np.ndarray) -> np.ndarray:
        """One start, one goal, no path; whether there is a way is seen from the answer."""
        return (
            ((questions == START).sum(1) == 1)
            & ((questions == GOAL).sum(1) == 1)
            & ~((questions == PATH) | (questions == 0)).any(1)
        )

    def is_solution(self, inputs: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        """A valid path: nothing but free cells is changed, and only into path; start, goal and path are connected."""
        return self._kernels.is_valid(*self._as_tokens(inputs, outputs), self.size)

    def is_shortest(self, inputs: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        """A valid path (see `is_solution`) than which there is no shorter one; bool [n]."""
        return self._kernels.is_shortest(*self._as_tokens(inputs, outputs), self.size)

    def _as_tokens(self, inputs: np.ndarray, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8; values of other types that no token has become pads, which no answer has."""
        inputs, outputs = np.asarray(inputs), np.asarray(outputs)
        if outputs.size and not 0 <= outputs.min() <= outputs.max() < self.vocab_size:
            outputs = np.where((outputs >= 0) & (outputs < self.vocab_size), outputs, 0)
        return np.ascontiguousarray(inputs, np.uint8), np.ascontiguousarray(outputs, np.uint8)

    def why_no_solution(self, question: np.ndarray, answer: np.ndarray) -> str:
        changed = np.flatnonzero((question != answer) & ~((question == FREE) & (answer == PATH)))
        if len(changed):
            return f"{self._place(int(changed[0]))} is not as in the question"
        return "the path does not connect start and goal"

    def contradiction(self, question: np.ndarray) -> str | None:
        for token, what in ((START, "start (S)"), (GOAL, "goal (G)")):
            count = int((question == token).sum())
            if count != 1:
                return f"it has {count or 'no'} {what}; one is needed"
        if (question == PATH).any():
            return "it has a path (o) already; is it the answer of another?"
        return None if self.num_solutions(question) else "there is no way from start to goal"

    def num_solutions(self, question: np.ndarray) -> int | None:
        """Shortest paths: 0, 1, or 2 for several."""
        try:
            kernels = self._kernels
        except ImportError:  # no numba
            return None
        return int(kernels.num_shortest(np.ascontiguousarray(question, np.uint8), self.size))

    def symmetries(self, count: int) -> list[Symmetry]:
        """Rotations and mirror images."""
        if count > COUNT:
            raise UserError(f"votes={count}: a maze has only {COUNT} rotations and mirror images")
        tokens = np.arange(self.vocab_size)
        return [Symmetry(cells_of(turn, self.size, self.size), tokens) for turn in range(count)]

    def generate(
        self,
        seed: int,
        first: int,
        count: int,
        *,
        walls: Walls,
        unique: bool,
        path: tuple[int, int],
        max_tries: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mazes number first..first+count-1 of `seed`.

        Args:
            walls: least and greatest share of cells that are walls; or "perfect": the free cells are a tree, so that
                there is one way only between any two.
            unique: whether there is one shortest path only.
            path: least and greatest number of steps of it.

        Returns:
            Questions and answers, uint8 [count, seq_len]; a question is all zeros if `max_tries` grids did not yield
            it, and so are all after it.
        """
        is_perfect = isinstance(walls, str)
        shares = (0.0, 0.0) if isinstance(walls, str) else walls
        return self._kernels.generate(
            seed, first, count, self.size, is_perfect, *shares, unique, *path, max_tries
        )
