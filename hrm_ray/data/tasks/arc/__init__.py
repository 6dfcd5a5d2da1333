"""ARC-AGI: coloured grids of up to 30x30 cells, and the names of their augmented copies.

A grid is uint8[h, w] of colours 0..9. As tokens it lies in a frame of 30x30 cells, row by row: 0 pad, 1 end of the
grid (the row below it and the column to its right), colour k is k + 2. All numbers and names are those of the
published data sets.
"""

import json
import re
from typing import Any, NamedTuple

import numpy as np

from hrm_ray.data import frame as frames
from hrm_ray.data.dihedral import turned
from hrm_ray.data.drawing import COLOURS, Cell
from hrm_ray.data.frame import PAD
from hrm_ray.data.tasks.base import Task
from hrm_ray.errors import UserError, shown

SIDE = 30
NUM_COLOURS = 10
FIRST_COLOUR = 2
NO_GRID = [[0]]  # what the published code writes for an output that is not known
BLANK_NAME = "<blank>"  # of identifiers that stand for no task

_CELLS = (Cell("."), Cell("+"), *(Cell(str(number), colour) for number, colour in enumerate(COLOURS)))


class Arc(Task):
    """See the module. Its answers cannot be checked: the rule of a task is what is to be found."""

    name = "arc"
    vocab_size = FIRST_COLOUR + NUM_COLOURS
    seq_len = SIDE * SIDE
    checkable = False
    is_recognised = False

    def __init__(self, translate: bool = False) -> None:
        """`translate`: in training, the grids lie at another place on every visit."""
        self.options = {"translate": translate}
        self.translates = translate

    @classmethod
    def of_arrays(
        cls, vocab_size: int, seq_len: int, pad_id: int, inputs: np.ndarray, labels: np.ndarray
    ) -> "Arc | None":
        """By the layout: the grids are those of any task, wherever they lie."""
        is_alike = (vocab_size, seq_len, pad_id) == (cls.vocab_size, cls.seq_len, cls.pad_id)
        return cls() if is_alike else None

    def parse(self, text: str) -> np.ndarray:
        """A grid as JSON, ``[[0,1],[2,3]]``, or its rows of digits, ``01/23``, or one row a line."""
        text = text.strip()
        if text.startswith("["):
            try:
                rows = json.loads(text)
            except (ValueError, RecursionError):
                raise UserError(f"'{shown(text)}' is no grid; write [[0,1],[2,3]] or 01/23") from None
        else:
            rows = [_digits(row) for row in re.split(r"[/\n]", text)]
        return place(as_grid(rows))

    def to_text(self, tokens: np.ndarray) -> str:
        """The rows of the grid (see `crop`) with / between them."""
        return "/".join("".join(map(str, row)) for row in crop(tokens).tolist())

    def cell(self, token: int) -> Cell:
        return _CELLS[token] if token < len(_CELLS) else Cell("?")

    def render(self, tokens: np.ndarray, given: np.ndarray | None = None) -> str:
        """All that is in the frame, wherever it lies: digits for colours, + for an end mark, . for a pad."""
        frame = np.asarray(tokens).reshape(SIDE, SIDE)
        used = np.argwhere(frame != PAD)
        height, width = used.max(axis=0) + 1 if len(used) else (1, 1)
        rows = frame[:height, :width].tolist()
        return "\n".join(" ".join(self.cell(token).symbol for token in row) for row in rows)

    def vary(self, inputs: np.ndarray, labels: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Both grids of an example, which lie in the corner, moved to a place drawn by its key."""
        if not self.translates:
            return inputs, labels
        from hrm_ray.data.tasks.arc import kernels  # numba: seconds to import, not needed otherwise

        return kernels.translated(inputs, labels, keys)

    def is_solution(self, inputs: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        raise UserError(
            "an ARC task does not say whether an answer solves its question; compare with the label"
        )


def _digits(row: str) -> list[Any]:
    """The cells of a row of digits; what is no digit stays as it is, for `as_grid` to refuse."""
    return [int(char) if char in "0123456789" else char for char in "".join(row.split())]


# Grids


def as_grid(rows: Any) -> np.ndarray:
    """A grid from lists of whole numbers, as in JSON; uint8[h, w].

    Raises:
        UserError: no list of rows, empty, ragged, larger than 30x30, or a colour outside 0..9.
    """
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise UserError("a grid is a list of rows of colours, such as [[0,1],[2,3]]")
    if not rows or not rows[0]:
        raise UserError("a grid without cells")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(rows[0]):
            raise UserError(f"row {number} has {len(row)} cells, row 1 has {len(rows[0])}; all need as many")
    if max(len(rows), len(rows[0])) > SIDE:
        raise UserError(f"a grid of {len(rows)}x{len(rows[0])} cells; at most {SIDE}x{SIDE} are possible")
    for number, row in enumerate(rows, start=1):
        for column, colour in enumerate(row, start=1):
            if type(colour) is not int or not 0 <= colour < NUM_COLOURS:
                raise UserError(
                    f"colour '{shown(str(colour))}' in row {number}, column {column}; allowed: 0..9"
                )
    return np.array(rows, np.uint8)


def place(grid: np.ndarray, row: int = 0, col: int = 0) -> np.ndarray:
    """The tokens uint8[900] of a grid uint8[h, w] whose first cell lies at (row, col), see `frame.place`."""
    return frames.place(grid + FIRST_COLOUR, SIDE, SIDE, row, col)


def crop_shapes(tokens: np.ndarray) -> np.ndarray:
    """Height and width of the grid that each row of tokens (integers [n, 900]) holds, see `frame.shapes`."""
    is_colour = (tokens >= FIRST_COLOUR) & (tokens < FIRST_COLOUR + NUM_COLOURS)
    return frames.shapes(is_colour.reshape(len(tokens), SIDE, SIDE))


def crop(tokens: np.ndarray) -> np.ndarray:
    """The grid that tokens (integers [900]) hold, see `crop_shapes`; uint8[h, w]."""
    tokens = np.asarray(tokens)
    height, width = crop_shapes(tokens[None])[0]
    return (tokens.reshape(SIDE, SIDE)[:height, :width] - FIRST_COLOUR).astype(np.uint8)


# Augmented copies


class Plan(NamedTuple):
    """How a task was augmented: every colour k becomes `colours[k]`, then the grid is turned (see `dihedral`)."""

    symmetry: int
    colours: tuple[int, ...]

    def apply(self, grid: np.ndarray) -> np.ndarray:
        """The augmented copy of a grid uint8[h, w]."""
        return turned(np.array(self.colours, np.uint8)[grid], self.symmetry)


def read_name(name: str) -> tuple[str, Plan | None]:
    """The task and the augmentation (None: the task as it is) that a name in `identifiers.json` means.

    An augmented name is ``ID|||tK|||DDDDDDDDDD`` (TRM's data sets) or ``ID_tK_DDDDDDDDDD`` (HRM's): symmetry K and the
    ten images of the colours. Only the last two parts are looked at, so that an ID may contain the separator.

    Raises:
        UserError: a name with ``|||`` that is not of this form.
    """
    for separator in ("|||", "_"):
        task, *plan = name.rsplit(separator, 2)
        if len(plan) == 2 and re.fullmatch("t[0-7]", plan[0]) and sorted(plan[1]) == list("0123456789"):
            return task, Plan(int(plan[0][1]), tuple(map(int, plan[1])))
    if "|||" in name:
        raise UserError(f"'{shown(name)}' names no augmentation; ID|||t0|||0123456789 would")
    return name, None


def format_name(task: str, plan: Plan | None) -> str:
    """The name of a task under an augmentation, as in TRM's data sets."""
    return task if plan is None else f"{task}|||t{plan.symmetry}|||{''.join(map(str, plan.colours))}"


def format_names(task: str, plans: np.ndarray, separator: str = "|||") -> list[str]:
    """The names of a task (first, the plan of no change) and of its augmented copies.

    Args:
        plans: uint8 [n, 11], symmetry and images of the ten colours.
        separator: ``|||`` as in TRM's data sets, ``_`` as in HRM's.
    """
    digits, width = (plans + ord("0")).astype(np.uint8).tobytes().decode(), plans.shape[1]
    starts = range(width, len(digits), width)
    first = f"{task}{separator}t"
    return [task, *(f"{first}{digits[i]}{separator}{digits[i + 1 : i + width]}" for i in starts)]
