"""How tokens look to people: their colours, and grids of them on a terminal that shows colours.

A task says for each of its tokens the symbol and the colour (`Task.cell`). The page of a data set (`hrm_ray.data.page`)
draws from the same.
"""

import math
import re
from functools import cache
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from hrm_ray.data.tasks.base import Task

# The palette. The ten colours of ARC are those in which its authors show it.
COLOURS = (
    *("#000000", "#0074d9", "#ff4136", "#2ecc40", "#ffdc00"),
    *("#aaaaaa", "#f012be", "#ff851b", "#7fdbff", "#870c25"),
)
DARK, LIGHT, WAY = "#39424c", "#ece8dd", "#4ea1e0"
RIGHT, WRONG = "#2ecc40", "#ff4136"


class Cell(NamedTuple):
    """How a token looks: a symbol of one character or a few, and "#rrggbb", or None for the colour of the ground."""

    symbol: str
    colour: str | None = None


def draw(
    task: "Task", tokens: np.ndarray, given: np.ndarray | None = None, *, in_colour: bool = False
) -> str:
    """Tokens uint8 [seq_len] in lines for a person.

    Args:
        given: the question, if `tokens` are an answer to it.
        in_colour: with ANSI escapes: cells in their colours, without rows and columns that hold nothing but padding;
            if the task gives its tokens no colours, as `render` does, with coloured marks. Else as `render` does.
    """
    cells = [task.cell(token) for token in range(256)] if in_colour else []
    if not any(cell.colour for cell in cells[: task.vocab_size]):
        text = task.render(tokens, given)
        return _MARKED.sub(_colour_mark, text) if in_colour else text
    is_wrong = np.zeros(task.seq_len, bool) if given is None else task.misfits(given, tokens)
    grid, wrong = as_grid(tokens, row_width(task), task.pad_id), as_grid(is_wrong, row_width(task), False)
    rows, cols = used(grid, task.pad_id)
    width = max(2, *(len(cell.symbol) for cell in cells[: task.vocab_size]))
    lines = [
        "".join(
            _ansi("!", WRONG, width) if bad else _ansi(cells[token].symbol, cells[token].colour, width)
            for token, bad in zip(*pair, strict=True)
        )
        for pair in zip(grid[rows, cols].tolist(), wrong[rows, cols].tolist(), strict=True)
    ]
    return "\n".join(lines)


def known_width(task: "Task") -> int | None:
    """Cells in a row: as the task says, else those of a square if seq_len is a square number; None: nobody knows."""
    side = math.isqrt(task.seq_len)
    return task.width or (side if side * side == task.seq_len else None)


def row_width(task: "Task") -> int:
    """Cells in a row of a drawing: as far as is known, else 32."""
    return known_width(task) or 32


def as_grid(cells: np.ndarray, width: int, filler: int | bool) -> np.ndarray:
    """Cells [n] in rows of `width`, the last one filled up; [h, width]."""
    missing = -len(cells) % width
    return np.concatenate([cells, np.full(missing, filler, cells.dtype)]).reshape(-1, width)


def used(grid: np.ndarray, pad_id: int) -> tuple[slice, slice]:
    """The rows and columns of a grid [h, w] from the first to the last that holds more than padding; all if none."""
    is_used = grid != pad_id
    if not is_used.any():
        return slice(0, grid.shape[0]), slice(0, grid.shape[1])
    rows, cols = (np.flatnonzero(is_used.any(axis)) for axis in (1, 0))
    return slice(rows[0], rows[-1] + 1), slice(cols[0], cols[-1] + 1)


def beside(left: str, right: str) -> str:
    """Two drawings side by side."""
    lines = left.splitlines()
    width = max(map(_shown_width, lines))
    pairs = zip_longest(lines, right.splitlines(), fillvalue="")
    return "\n".join(f"{a}{' ' * (width - _shown_width(a))}   {b}" for a, b in pairs)


_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
_MARKED = re.compile(r"\S['!]")  # see `Task.render`


def _shown_width(line: str) -> int:
    return len(_ESCAPE.sub("", line))


def _colour_mark(found: re.Match[str]) -> str:
    text = found.group()
    return f"\x1b[1;38;5;{_terminal_colour(RIGHT if text[1] == chr(39) else WRONG)}m{text}\x1b[0m"


def _ansi(symbol: str, colour: str | None, width: int) -> str:
    text = symbol.ljust(width)
    if colour is None:
        return text
    ink = 16 if _brightness(colour) > 0.4 else 231  # black, white
    return f"\x1b[38;5;{ink};48;5;{_terminal_colour(colour)}m{text}\x1b[0m"


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _brightness(colour: str) -> float:
    red, green, blue = _rgb(colour)
    return (0.299 * red + 0.587 * green + 0.114 * blue) / 255


@cache
def _terminal_colour(colour: str) -> int:
    """The nearest of the 240 colours that are the same on every terminal of 256: a cube, then greys."""
    levels = (0, 95, 135, 175, 215, 255)
    cube = [(r, g, b) for r in levels for g in levels for b in levels]
    known = np.array([*cube, *((grey,) * 3 for grey in range(8, 248, 10))])
    return 16 + int(((known - _rgb(colour)) ** 2).sum(axis=1).argmin())
