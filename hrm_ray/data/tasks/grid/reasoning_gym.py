"""The puzzles of the package reasoning-gym (an extra) that are grids, as texts of question and answer.

Puzzle number i of a seed is the same whoever makes it. A cell is one character: numbers above 9 become letters.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pyarrow as pa

from hrm_ray.config.validate import nearest
from hrm_ray.errors import UserError, first_line, shown

PREFIX = "reasoning_gym:"

_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_MORE_LETTERS = 0x100  # where Unicode has some hundreds of them
_SIZE = 2**31 - 1  # of a data set, which has no end

Grids = tuple[list[list[Any]], list[list[Any]]]  # question and answer
Entry = Mapping[str, Any]


def _matrices(question: str, answer: str = "solution") -> Callable[[Entry], Grids]:
    return lambda entry: (entry["metadata"][question], entry["metadata"][answer])


def _n_queens(entry: Entry) -> Grids:
    return entry["metadata"]["puzzle"], [row.split() for row in entry["answer"].splitlines()]


def _game_of_life(entry: Entry) -> Grids:
    board = entry["question"]
    return json.loads(board[board.rindex("[[") :].strip(" .")), json.loads(entry["answer"])


def _modulo_grid(entry: Entry) -> Grids:
    answer = entry["answer"].splitlines()
    return [list(row) for row in entry["question"].splitlines()[-len(answer) :]], [
        list(row) for row in answer
    ]


def _futoshiki(entry: Entry) -> Grids:
    """Numbers in every other row and column, the signs between them."""
    about = entry["metadata"]
    side = 2 * about["board_size"] - 1
    grids = []
    for numbers in (about["puzzle"], about["solution"]):
        grid: list[list[Any]] = [[" "] * side for _ in range(side)]
        for y, row in enumerate(numbers):
            for x, number in enumerate(row):
                grid[2 * y][2 * x] = number
        for y, x, other_y, other_x, sign in about["constraints"]:
            upright = {"<": "∧", ">": "∨"}
            grid[y + other_y][x + other_x] = sign if y == other_y else upright[sign]
        grids.append(grid)
    return grids[0], grids[1]


def _kakurasu(entry: Entry) -> Grids:
    """The sums stand at the right and below."""
    about = entry["metadata"]
    below = [*about["col_sums"], " "]
    return tuple(  # type: ignore[return-value]
        [*([*row, total] for row, total in zip(about[key], about["row_sums"], strict=True)), below]
        for key in ("puzzle", "solution")
    )


@dataclass(frozen=True)
class _Puzzle:
    """How the grids of a puzzle are found in an entry, and options without which the question does not say enough."""

    grids: Callable[[Entry], Grids]
    options: Mapping[str, Any] = field(default_factory=dict)


# Looked through at version 0.1.25: those whose question and answer are grids, and whose grids say all.
PUZZLES = {
    "binary_matrix": _Puzzle(_matrices("matrix")),
    "futoshiki": _Puzzle(_futoshiki),
    "game_of_life": _Puzzle(_game_of_life),
    "kakurasu": _Puzzle(_kakurasu),
    "mini_sudoku": _Puzzle(_matrices("puzzle")),
    "modulo_grid": _Puzzle(_modulo_grid),
    "n_queens": _Puzzle(_n_queens),
    "rotate_matrix": _Puzzle(_matrices("matrix"), {"min_rotations": 1, "max_rotations": 1}),
    "sudoku": _Puzzle(_matrices("puzzle")),
}


@dataclass(frozen=True)
class Gym:
    """One puzzle of the package, with a seed and options (JSON). Can be sent to other processes."""

    name: str
    seed: int
    options: str

    @staticmethod
    def of(source: str, seed: int, options: Mapping[str, Any]) -> "Gym":
        """The gym that ``reasoning_gym:NAME`` names.

        Raises:
            UserError: no such puzzle, it is no grid, its options do not fit, or the package is missing.
        """
        name = source.removeprefix(PREFIX)
        if name not in PUZZLES:
            hint = nearest(name, PUZZLES)
            raise UserError(f"source={shown(source)} is no puzzle of reasoning-gym that is a grid; {hint}")
        gym = Gym(name, seed, json.dumps({**PUZZLES[name].options, **options}, sort_keys=True))
        try:
            gym.texts(0)
        except ImportError as error:
            raise UserError(
                f"source={source} needs the package reasoning-gym ({first_line(error)}); "
                "pip install 'hrm-ray[reasoning-gym]'"
            ) from None
        except Exception as error:  # of the package: TypeError, AssertionError, ...
            raise UserError(f"source={source}, options={gym.options}: {first_line(error)}") from None
        return gym

    def version(self) -> str:
        """What the puzzles depend on, beside seed and options."""
        from importlib.metadata import PackageNotFoundError, version

        try:
            return f"reasoning-gym-{version('reasoning-gym')}:{self.name}"
        except PackageNotFoundError:  # a checkout
            return f"reasoning-gym:{self.name}"

    def texts(self, number: int) -> tuple[str, str]:
        """Question and answer number `number`: rows with line ends between them."""
        question, answer = PUZZLES[self.name].grids(_dataset(self)[number])
        return _text(question), _text(answer)

    def make(self, block: pa.Table) -> pa.Table:
        """The puzzles numbered by the column `index`; runs in Ray's workers."""
        questions, answers = zip(*map(self.texts, block["index"].to_pylist()), strict=True)
        return pa.table({"question": questions, "answer": answers})


@lru_cache(maxsize=1)
def _dataset(gym: Gym) -> Any:
    import reasoning_gym

    from hrm_ray.data.keyed_random import stream

    # The package draws puzzle i from seed + i: ours are so far apart that none share puzzles.
    seed = int(stream(gym.seed, 0, 0)) >> 2
    return reasoning_gym.create_dataset(gym.name, seed=seed, size=_SIZE, **json.loads(gym.options))


def _text(grid: list[list[Any]]) -> str:
    return "\n".join("".join(map(_symbol, row)) for row in grid)


def _symbol(cell: Any) -> str:
    if isinstance(cell, str):
        return cell
    return _DIGITS[cell] if cell < len(_DIGITS) else chr(_MORE_LETTERS + cell)
