"""Builds mazes: from the published table (columns question and answer) or a generator."""

from collections.abc import Callable
from functools import partial
from math import isqrt
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from hrm_ray.data.recipe import GENERATOR, RowRecipe
from hrm_ray.data.rows import RowBuilder
from hrm_ray.data.sources import Source
from hrm_ray.data.tasks.maze import LARGEST, Maze
from hrm_ray.errors import UserError

MAX_TRIES = 20_000  # grids for one maze, half a second at most
Share = Annotated[float, Field(ge=0, lt=1)]


class MazeRecipe(RowRecipe):
    """A recipe of task maze."""

    task: Literal["maze"] = "maze"
    """Puzzle family."""
    size: int | None = Field(default=None, ge=2, le=LARGEST)
    """Rows, and columns, of the maze; null: those of the first maze of the source."""
    aug: bool = False
    """Whether every training maze comes in all eight positions (rotated and mirrored)."""
    walls: tuple[Share, Share] | Literal["perfect"] = (0.2, 0.45)
    """Share of cells that are walls in a generated maze, from the least to the greatest; or perfect: the ways are a
    tree, so that one path only joins start and goal."""
    unique: bool = True
    """Whether a generated maze has one shortest path only."""
    min_path: int | None = Field(default=None, ge=1)
    """Least steps of the shortest path of a generated maze; null: as many as the maze has rows."""
    max_path: int | None = Field(default=None, ge=1)
    """Most steps of it; null: any number."""

    @property
    def path(self) -> tuple[int, int]:
        """Least and greatest number of steps."""
        size = self.size or LARGEST
        return self.min_path or size, self.max_path or size * size

    def of_generator(self) -> tuple[str, ...]:
        return *super().of_generator(), "walls", "unique", "min_path", "max_path"

    def make_task(self) -> Maze | None:
        return None if self.size is None else Maze(self.size)

    @model_validator(mode="after")
    def _ranges_fit(self) -> Self:
        if self.source == GENERATOR and self.size is None:
            raise ValueError("'size' is not given; source=generator needs size=NUMBER")
        if self.source == GENERATOR and not self.path[0] <= self.path[1]:
            raise ValueError(f"min_path={self.path[0]} is above max_path={self.path[1]}")
        if not isinstance(self.walls, str) and self.walls[0] > self.walls[1]:
            raise ValueError(f"walls=[{self.walls[0]},{self.walls[1]}]: give [LEAST,GREATEST]")
        return self


class MazeBuilder(RowBuilder, recipe=MazeRecipe):
    """See the module."""

    recipe: MazeRecipe
    task: Maze
    copies_on_ray = False

    def __init__(self, recipe: MazeRecipe):
        super().__init__(recipe)
        self.num_copies = 7 if recipe.aug else 0
        if recipe.size is None:
            self.task = Maze(_size_of(self.source))

    def generator(self) -> Callable[[int, int], tuple[np.ndarray, np.ndarray]]:
        recipe = self.recipe
        return partial(
            self.task.generate,
            recipe.seed,
            walls=recipe.walls,
            unique=recipe.unique,
            path=recipe.path,
            max_tries=MAX_TRIES,
        )

    def none_found(self) -> str:
        recipe = self.recipe
        mend = "" if recipe.walls == "perfect" else ", change walls, or give unique=false"
        return (
            f"no {recipe.size}x{recipe.size} maze with a path of {recipe.path[0]} to {recipe.path[1]} steps found in "
            f"{MAX_TRIES} tries; lower min_path{mend}"
        )


def _size_of(source: Source | None) -> int:
    """Rows of the first maze of a source. Raises UserError: it is not square."""
    assert source is not None  # a generator's size is given
    first = source.first_question("train", Maze())
    size = isqrt(len(first))
    if size * size != len(first) or not 2 <= size <= LARGEST:
        raise UserError(
            f"{source.parts['train']}: its first maze has {len(first)} characters, which is no square of 2 to "
            f"{LARGEST} rows; write a maze as its rows one behind the other"
        )
    return size
