"""Grids of characters whose rules are not known: your own puzzles, as questions and answers.

A cell is one character, a space included. Where all grids have one shape, tokens are 0 pad and 1, 2, ... the characters
of the alphabet, in its order, row by row. Where shapes differ, each grid lies at the top left of a frame, 1 is its end
mark (see `hrm_ray.data.frame`), and the characters begin at 2.
"""

import math
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hrm_ray.data import frame
from hrm_ray.data.dihedral import COUNT, cells_of
from hrm_ray.data.drawing import Cell
from hrm_ray.data.tasks.base import Symmetry, Task
from hrm_ray.errors import UserError, shown

MOST_TOKENS = 256
MOST_CELLS = 1 << 16
# Which symmetries of the square (see `dihedral`) a declaration means; two of them make all eight.
TURNS = {"rotations": (0, 1, 2, 3), "mirrors": (0, 2, 4, 5), "transpose": (0, 6)}
RELABEL = "relabel:"

_DRAW_KEY = 9  # any number; the copies of a puzzle that vote are always the same
_LINE_END = re.compile(r"\r\n|\r|\n")
_LAST_CODE = 0x10FFFF  # of Unicode


class Grid(Task):
    """See the module.

    Args:
        alphabet: the characters of cells, in the order of their tokens.
        height, width: of every grid; where shapes differ, of the frame.
        shapes: whether all grids have this shape.
        separator: stands between rows in a text, as a line end does; None: it is a cell like others.
        ignore: characters that carry no loss in an answer.
        symmetries: what keeps a puzzle a puzzle: `rotations`, `mirrors`, `transpose`, and ``relabel:CHARS`` for
            characters that may be exchanged for each other.

    Raises:
        UserError: these do not fit each other.
    """

    name = "grid"
    checkable = False
    keeps_spaces = True
    meaning = ("alphabet", "height", "width")
    width: int

    def __init__(
        self,
        alphabet: str,
        height: int,
        width: int,
        shapes: Literal["equal", "differ"] = "equal",
        separator: str | None = "/",
        ignore: str = "",
        symmetries: Sequence[str] = (),
    ):
        self.options: dict[str, Any] = {
            "alphabet": alphabet,
            "height": height,
            "width": width,
            "shapes": shapes,
        }
        self.options |= {"separator": separator, "ignore": ignore, "symmetries": list(symmetries)}
        self.alphabet, self.height, self.width, self.separator = alphabet, height, width, separator
        self.is_framed = shapes == "differ"
        self.first_token = frame.END + 1 if self.is_framed else 1
        self.vocab_size = self.first_token + len(alphabet)
        self.seq_len = height * width
        self._check(ignore)
        self._token_of = {char: token for token, char in enumerate(alphabet, start=self.first_token)}
        self._ignored = [self._token_of[char] for char in ignore if char in self._token_of]
        self._unknown = next(char for char in "?·□\ufffd" if char not in alphabet or char == "\ufffd")
        self.turns = self._turns([kind for kind in symmetries if not kind.startswith(RELABEL)])
        self.classes_of_tokens = self._classes(
            [kind for kind in symmetries if kind.startswith(RELABEL)], ignore
        )

    def _check(self, ignore: str) -> None:
        if self.vocab_size > MOST_TOKENS:
            most = MOST_TOKENS - self.first_token
            raise UserError(f"{len(self.alphabet)} different characters; a grid has at most {most}")
        if not self.alphabet or self.seq_len > MOST_CELLS or min(self.height, self.width) < 1:
            raise UserError(f"{self.height}x{self.width} cells; a grid has 1 to {MOST_CELLS} of them")
        for number, char in enumerate(self.alphabet):
            if char in self.alphabet[:number]:
                raise UserError(f"alphabet: '{shown(char)}' is in it twice")
            if char in "\r\n" or char == self.separator:
                raise UserError(f"alphabet: {char!r} stands between rows and is no cell; see separator=")
        if self.is_framed and self.separator is None:
            raise UserError("shapes=differ needs a separator, which stands between rows")
        if self.is_framed and ignore:
            raise UserError("ignore= needs grids of one shape; leave it out, or shapes=differ")

    # Symmetries that are declared

    def _turns(self, kinds: list[str]) -> tuple[int, ...]:
        """The symmetries of the square that `kinds` make, the identity first."""
        for kind in kinds:
            if kind not in TURNS:
                known = ", ".join([*TURNS, f"{RELABEL}CHARS"])
                raise UserError(f"symmetries: '{shown(kind)}' is none; known: {known}")
            if self.is_framed:
                raise UserError(
                    f"symmetries={kind} needs grids of one shape; with shapes=differ give {RELABEL}CHARS"
                )
        if len(set(kinds)) > 1:
            turns = tuple(range(COUNT))
        else:
            turns = TURNS[kinds[0]] if kinds else (0,)
        if self.height != self.width and any(turn in (1, 3, 6, 7) for turn in turns):
            alone = "; mirrors alone would do" if "mirrors" in kinds else "; mirrors would do"
            raise UserError(
                f"symmetries={','.join(kinds)} needs square grids, these have {self.height} rows of {self.width} "
                f"cells{alone}"
            )
        return turns

    def _classes(self, kinds: list[str], ignore: str) -> list[np.ndarray]:
        """The tokens of each class of characters that are exchangeable."""
        taken, found = set(ignore), []
        for kind in kinds:
            chars = kind.removeprefix(RELABEL)
            if len(chars) < 2:
                raise UserError(f"symmetries={kind}: name two or more characters that can be exchanged")
            for number, char in enumerate(chars):
                if char not in self._token_of:
                    raise UserError(f"symmetries={kind}: '{shown(char)}' is in no training puzzle")
                if char in taken or char in chars[:number]:
                    raise UserError(f"symmetries={kind}: '{shown(char)}' is named before, or ignored")
            taken |= set(chars)
            found.append(np.array([self._token_of[char] for char in chars], np.uint8))
        return found

    @property
    def num_symmetries(self) -> int:
        """All that are declared, and the identity."""
        return len(self.turns) * math.prod(math.factorial(len(tokens)) for tokens in self.classes_of_tokens)

    @cached_property
    def cells_of_turns(self) -> np.ndarray:
        """int64 [turns, seq_len]: cell i of a grid under turn k is its cell `result[k, i]`."""
        return np.stack([cells_of(turn, self.height, self.width) for turn in self.turns])

    def symmetries(self, count: int) -> list[Symmetry]:
        """Turned and relabelled, each time otherwise."""
        if count > 1 and self.num_symmetries == 1:
            raise UserError(
                f"votes={count}: no symmetry is declared for these puzzles; use votes=1, or build the data with "
                "symmetries="
            )
        if count > self.num_symmetries:
            raise UserError(f"votes={count}: these puzzles have only {self.num_symmetries} symmetric copies")
        if not self.classes_of_tokens:
            return [Symmetry(cells, np.arange(self.vocab_size)) for cells in self.cells_of_turns[:count]]
        words = np.random.Philox(key=_DRAW_KEY)
        found = {(0, bytes(range(self.vocab_size))): None}  # a dict, since it keeps the order
        while len(found) < count:
            turn = int(words.random_raw() % len(self.turns))
            tokens = np.arange(self.vocab_size, dtype=np.uint8)
            for of_class in self.classes_of_tokens:
                tokens[of_class] = of_class[words.random_raw(len(of_class)).argsort(kind="stable")]
            found[turn, tokens.tobytes()] = None
        return [
            Symmetry(self.cells_of_turns[turn], np.frombuffer(tokens, np.uint8).astype(np.int64))
            for turn, tokens in found
        ]

    def augment(
        self, inputs: np.ndarray, labels: np.ndarray, groups: np.ndarray, num_aug: int, seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Each puzzle (rows of inputs and labels, uint8 [n, seq_len]) followed by `num_aug` random symmetric copies.

        Copy k of group g (int64 [n]) depends on (seed, g, k) alone; no turn repeats before all were dealt out. Returns
        uint8 [n * (1 + num_aug), seq_len] twice.
        """
        from hrm_ray.data.tasks.grid import kernels  # numba: seconds to import, not needed to read and show

        return kernels.augment(
            np.ascontiguousarray(inputs),
            np.ascontiguousarray(labels),
            np.asarray(groups, np.int64),
            num_aug,
            seed,
            self.cells_of_turns,
            np.concatenate([np.empty(0, np.uint8), *self.classes_of_tokens]),
            np.cumsum([0, *map(len, self.classes_of_tokens)]),
        )

    # Text

    def parse(self, text: str) -> np.ndarray:
        """A grid in one line, or its rows with line ends or the separator between them."""
        rows = read_rows(text, self.separator)
        shape = len(rows), len(rows[0])
        if self.is_framed:
            if shape[0] > self.height or shape[1] > self.width:
                raise UserError(f"{shape[0]}x{shape[1]} cells; at most {self.height}x{self.width} fit")
        elif shape[0] > 1 and shape != (self.height, self.width):
            raise UserError(f"{shape[0]}x{shape[1]} cells; {self._wanted()}")
        elif shape[0] == 1 and shape[1] != self.seq_len:
            raise UserError(f"{shape[1]} cells; {self._wanted()}")
        width = self.width if not self.is_framed else shape[1]
        for position, char in enumerate("".join(rows)):
            if char not in self._token_of:
                row, col = divmod(position, width)
                raise UserError(
                    f"'{shown(char)}' in row {row + 1}, column {col + 1} is not in the alphabet "
                    f"'{shown(self.alphabet)}', which is that of the training puzzles"
                )
        tokens = np.array([self._token_of[char] for row in rows for char in row], np.uint8)
        return frame.place(tokens.reshape(shape), self.height, self.width) if self.is_framed else tokens

    def _wanted(self) -> str:
        return f"the other grids have {self.height}x{self.width} (a recipe with shapes=differ takes several shapes)"

    def parse_all(self, texts: pa.Array, *, are_answers: bool = False) -> tuple[np.ndarray, np.ndarray]:
        texts = pc.fill_null(texts, "")
        fits = pc.equal(pc.utf8_length(texts), self.seq_len).to_numpy(zero_copy_only=False).copy()
        fits &= not self.is_framed
        tokens = np.zeros((len(texts), self.seq_len), np.uint8)
        plain = "".join(texts.filter(pa.array(fits)).to_pylist())
        codes = np.frombuffer(plain.encode("utf-32-le"), np.uint32)
        tokens[fits] = self._token_of_code[codes].reshape(-1, self.seq_len)
        good = np.asarray((tokens != 0).all(axis=1))
        others = np.flatnonzero(~good)  # in several rows, or no grid
        tokens[others], good[others] = super().parse_all(texts.take(pa.array(others)))
        if are_answers:
            tokens[np.isin(tokens, self._ignored)] = frame.PAD
        return tokens, good

    @cached_property
    def _token_of_code(self) -> np.ndarray:
        tokens = np.zeros(_LAST_CODE + 1, np.uint8)
        tokens[[ord(char) for char in self.alphabet]] = list(self._token_of.values())
        return tokens

    def to_text(self, tokens: np.ndarray) -> str:
        return (self.separator or "" if self.is_framed else "").join(self._rows(tokens))

    def cell(self, token: int) -> Cell:
        return Cell(self._symbol(token) if token >= self.first_token else "+" if token == frame.END else ".")

    def render(self, tokens: np.ndarray, given: np.ndarray | None = None) -> str:
        """The rows of the grid, a space between cells. A cell that is not as in the question has an apostrophe."""
        rows = self._rows(tokens)
        is_other = np.zeros(self.seq_len, bool) if given is None else np.asarray(tokens) != np.asarray(given)
        marks = is_other.reshape(self.height, self.width)
        between = " " if given is None else ""
        return "\n".join(
            between.join(
                char if given is None else f"{char}'" if marks[y, x] else f"{char} "
                for x, char in enumerate(row)
            )
            for y, row in enumerate(rows)
        )

    def _rows(self, tokens: np.ndarray) -> list[str]:
        """The text of each row of the grid that tokens hold."""
        cells = np.asarray(tokens).reshape(self.height, self.width)
        if self.is_framed:
            is_cell = (cells >= self.first_token) & (cells < self.vocab_size)
            height, width = frame.shapes(is_cell[None])[0]
            cells = cells[:height, :width]
        return ["".join(map(self._symbol, row)) for row in cells.tolist()]

    def _symbol(self, token: int) -> str:
        return (
            self.alphabet[token - self.first_token]
            if self.first_token <= token < self.vocab_size
            else self._unknown
        )

    def is_solution(self, inputs: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        raise UserError("task grid does not know the rules of its puzzles; compare with the label")


def read_rows(text: str, separator: str | None) -> list[str]:
    """The rows of a grid in a text. Raises UserError: no cells, or rows of several lengths.

    Where a text has spaces, its lines are filled up with them: at the end of a line they are easily lost.
    """
    lines = _LINE_END.split(text.strip("\r\n"))
    if " " in text:
        longest = max(map(len, lines))
        lines = [line.ljust(longest) for line in lines]
    rows = [row for line in lines for row in (line.split(separator) if separator else [line])]
    for number, row in enumerate(rows, start=1):
        if len(row) != len(rows[0]):
            raise UserError(f"row {number} has {len(row)} cells, row 1 has {len(rows[0])}; all need as many")
    if not rows[0]:
        raise UserError("a grid without cells")
    return rows
