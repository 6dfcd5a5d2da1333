"""Builds grids from rows of question and answer, and from the puzzles of the package reasoning-gym that are grids.

What the task must know and no recipe says (the alphabet, the shape) is read from the training puzzles first.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from math import isqrt
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from hrm_ray.data.builder import Part, Workers
from hrm_ray.data.puzzle_files import PuzzleFile
from hrm_ray.data.recipe import RowRecipe
from hrm_ray.data.rows import RowBuilder
from hrm_ray.data.sources import Source
from hrm_ray.data.tasks.grid import Grid, read_rows
from hrm_ray.data.tasks.grid.reasoning_gym import PREFIX, Gym
from hrm_ray.errors import UserError


class GridRecipe(RowRecipe):
    """A recipe of task grid."""

    made_by = f"{PREFIX}NAME"

    task: Literal["grid"] = "grid"
    """Puzzle family."""
    source: str | None = None
    """A file of questions and answers in any usual layout, a folder or zip with a train (and test) file, a Hugging Face
    id, or reasoning_gym:NAME."""
    height: int | None = Field(default=None, ge=1, le=65_536)
    """Rows of every grid; null: found in the text, or a square, or one line."""
    width: int | None = Field(default=None, ge=1, le=65_536)
    """Cells of a row; null: likewise."""
    shapes: Literal["equal", "differ"] = "equal"
    """Whether grids may differ in shape; then they lie in a frame, with end marks."""
    max_height: int | None = Field(default=None, ge=1, le=65_536)
    """Of the frame; null: of the largest grid."""
    max_width: int | None = Field(default=None, ge=1, le=65_536)
    """Of the frame; null: of the largest grid."""
    separator: str | None = Field(default="/", min_length=1, max_length=1)
    """Stands between rows in a text, as a line end does; null: it is a cell like others."""
    alphabet: str | None = Field(default=None, min_length=1)
    """The characters of cells, in the order of their tokens; null: those of the training puzzles, sorted."""
    ignore: str = ""
    """Characters that carry no loss in an answer."""
    symmetries: tuple[str, ...] = ()
    """What keeps a puzzle a puzzle: rotations, mirrors, transpose, relabel:CHARS (exchangeable characters)."""
    num_aug: int = Field(default=0, ge=0, le=10**6)
    """Symmetric copies of every training puzzle, beside the original."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Of a puzzle of reasoning-gym."""

    @property
    def generates(self) -> bool:
        return self.source is not None and self.source.startswith(PREFIX)

    def of_generator(self) -> tuple[str, ...]:
        return *super().of_generator(), "options"

    @model_validator(mode="after")
    def _keys_fit(self) -> Self:
        of_equal, of_frame = ("height", "width"), ("max_height", "max_width")
        differ = self.shapes == "differ"
        for key in of_equal if differ else of_frame:
            if getattr(self, key) is not None:
                raise ValueError(f"'{key}' does nothing with shapes={self.shapes}; leave it out")
        if self.num_aug and not self.symmetries:
            raise ValueError(f"num_aug={self.num_aug} needs symmetries=, which say how copies are made")
        return self


class _AnyText(Grid):
    """Reads whatever is written, before the alphabet is known."""

    def __init__(self) -> None:
        super().__init__("?", 1, 1)

    def parse(self, text: str) -> np.ndarray:
        return np.ones(1, np.uint8)


class _Seen:
    """What is to be known of all grids, while they go by.

    Attributes:
        chars: of all cells.
        shape: rows and columns; where shapes differ, of the frame.
    """

    def __init__(self, recipe: GridRecipe):
        self._recipe = recipe
        self.chars: set[str] = set()
        self.shape: tuple[int, int] | None = None

    def add(self, texts: Iterable[str | None], *, chars: bool = True) -> None:
        """Grids, as they are written; what is none is left for the reader to refuse."""
        separator = self._recipe.separator
        size = self.shape[0] * self.shape[1] if self.shape else -1
        for text in texts:
            if not text:
                continue
            if len(text) == size and not ("\n" in text or (separator and separator in text)):
                rows = [text]
            else:
                try:
                    rows = read_rows(text, separator)
                except UserError:
                    continue
                if not self._fits(rows) and self._recipe.on_bad == "skip":
                    continue  # the row will be left out; if not, the build stops there
                assert self.shape is not None
                size = -1 if self._recipe.shapes == "differ" else self.shape[0] * self.shape[1]
            if chars:
                self.chars.update(*rows)

    def _fits(self, rows: list[str]) -> bool:
        """Whether these rows are a grid as the others; the first says how those are, and a frame grows."""
        recipe, shape = self._recipe, (len(rows), len(rows[0]))
        if recipe.shapes == "differ":
            largest = self.shape or (1, 1)
            self.shape = (
                recipe.max_height or max(largest[0], shape[0]),
                recipe.max_width or max(largest[1], shape[1]),
            )
            return shape[0] <= self.shape[0] and shape[1] <= self.shape[1]
        if self.shape is None:
            self.shape = _shape_of(shape, recipe)
        return shape == self.shape or shape == (1, self.shape[0] * self.shape[1])

    def task(self) -> Grid:
        """Raises UserError if no grid was seen, or what was seen does not fit the recipe."""
        recipe = self._recipe
        if self.shape is None:
            hint = f"; if {recipe.separator} is a cell, give separator=null" if recipe.separator else ""
            raise UserError(f"source={recipe.source} holds no grids{hint}")
        try:
            return Grid(
                recipe.alphabet or "".join(sorted(self.chars)),
                *self.shape,
                shapes=recipe.shapes,
                separator=recipe.separator,
                ignore=recipe.ignore,
                symmetries=recipe.symmetries,
            )
        except UserError as error:
            raise UserError(f"source={recipe.source}: {error}") from None


def _shape_of(found: tuple[int, int], recipe: GridRecipe) -> tuple[int, int]:
    """The shape of all grids by that of the first, which may be written in one line."""
    height, width = recipe.height, recipe.width
    if height and width:
        return height, width
    if found[0] > 1:
        return height or found[0], width or found[1]
    num_cells = found[1]
    given = height or width
    if given is None:
        side = isqrt(num_cells)
        return (side, side) if side * side == num_cells else (1, num_cells)
    if num_cells % given:
        key = "height" if height else "width"
        raise UserError(
            f"{key}={given}: the first grid has {num_cells} cells, which make no whole rows of it"
        )
    return (given, num_cells // given) if height else (num_cells // given, given)


class GridBuilder(RowBuilder, recipe=GridRecipe):
    """See the module."""

    recipe: GridRecipe
    task: Grid
    generated_per_task = 32  # plain Python: some take seconds
    copies_on_ray = False

    def __init__(self, recipe: GridRecipe):
        super().__init__(recipe)
        self.num_copies = recipe.num_aug
        self.gym = None
        if recipe.generates:
            assert recipe.source is not None
            self.gym = Gym.of(recipe.source, recipe.seed, recipe.options)

    def digest(self) -> str:
        return self.gym.version() if self.gym else super().digest()

    def parts(self, workers: Workers) -> Iterator[Part]:
        if self.source:
            self._set_task(self._look_at(self.source))
        yield from super().parts(workers)

    def _set_task(self, seen: _Seen) -> None:
        self.task = seen.task()
        if self.num_copies >= self.task.num_symmetries > 1:
            raise UserError(
                f"num_aug={self.num_copies}: a grid has only {self.task.num_symmetries - 1} other copies"
            )

    def _look_at(self, source: Source) -> _Seen:
        seen = _Seen(self.recipe)
        grows = self.recipe.shapes == "differ"
        for part, file in source.parts.items():
            if part == "train" or grows:
                for chunk in PuzzleFile(file, _AnyText()).chunks(skips=True):
                    for column in (chunk.questions, chunk.answers):
                        if column is not None:
                            seen.add(column.to_pylist(), chars=part == "train")
        return seen

    def generated(self, num_wanted: int, workers: Workers) -> tuple[np.ndarray, np.ndarray]:
        assert self.gym is not None
        made = self.distinct(self.gym.make, _first_made, num_wanted, workers)
        columns = [made[name].combine_chunks() for name in ("question", "answer")]
        seen = _Seen(self.recipe)
        for column in columns:
            seen.add(column.to_pylist())
        self._set_task(seen)
        questions, answers = (
            self.task.parse_all(column, are_answers=column is columns[1]) for column in columns
        )
        for row in np.flatnonzero(~(questions[1] & answers[1])):
            problem = self.task.problem(*(column[row].as_py() for column in columns))
            raise UserError(f"source={self.recipe.source}: puzzle {row}: {problem}")
        return questions[0], answers[0]

    def augmenter(self) -> Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        return partial(self.task.augment, num_aug=self.recipe.num_aug, seed=self.recipe.seed)


def _first_made(made: pa.Table) -> np.ndarray:
    return np.unique(made["question"].to_numpy().astype(str), return_index=True)[1]
