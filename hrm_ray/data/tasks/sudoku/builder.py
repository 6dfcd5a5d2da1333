"""Builds Sudoku: every puzzle is solved once, to be sure that it has one solution."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from hrm_ray.data.builder import Workers
from hrm_ray.data.format import from_tokens, to_tokens
from hrm_ray.data.recipe import GENERATOR, RowRecipe
from hrm_ray.data.rows import MAX_TRIES, RowBuilder
from hrm_ray.data.sources import Rows, Source
from hrm_ray.data.tasks.sudoku import MIN_CLUES, Sudoku


class SudokuRecipe(RowRecipe):
    """A recipe of task sudoku."""

    task: Literal["sudoku"] = "sudoku"
    """Puzzle family."""
    size: Literal[4, 6, 9] = 9
    """Of the Sudoku, 4, 6 (boxes of 2 rows and 3 columns) or 9."""
    num_clues: int | None = None
    """Digits given in a generated puzzle."""
    num_aug: int = Field(default=0, ge=0, le=10**6)
    """Symmetric copies of every training puzzle, beside the original."""
    min_difficulty: int | None = Field(default=None, ge=0)
    """Leave out puzzles rated lower."""
    rate: bool = False
    """Rate by the solver (number of guesses) instead of the source's rating."""
    keep_ratings: bool | None = None
    """Write the ratings into the data set, for curriculum.rating."""

    def make_task(self) -> Sudoku:
        return Sudoku(self.size)

    def needed(self) -> tuple[str, ...]:
        return *super().needed(), "num_clues"

    def of_generator(self) -> tuple[str, ...]:
        return *super().of_generator(), "num_clues"

    def of_files(self) -> tuple[str, ...]:
        return *super().of_files(), "min_difficulty", "rate", "keep_ratings"

    @model_validator(mode="after")
    def _clues_fit(self) -> Self:
        fewest, most = MIN_CLUES[self.size], self.size**2
        if self.source == GENERATOR and not fewest <= (self.num_clues or 0) <= most:
            raise ValueError(
                f"num_clues={self.num_clues}: {self.size}x{self.size} Sudoku can have {fewest}..{most} clues"
            )
        return self


class SudokuBuilder(RowBuilder, recipe=SudokuRecipe):
    """See the module."""

    recipe: SudokuRecipe
    task: Sudoku

    def __init__(self, recipe: SudokuRecipe):
        super().__init__(recipe)
        self.num_copies, self.keeps_ratings = recipe.num_aug, bool(recipe.keep_ratings)

    def read(self, source: Source, part: str, workers: Workers) -> Iterator[Rows]:
        recipe = self.recipe
        by_source = (recipe.min_difficulty is not None or self.keeps_ratings) and not recipe.rate
        chunks = source.read(part, self.task, self.bad, ratings=by_source)
        if recipe.rate:
            chunks = iter([Rows.concat(list(chunks), self.task.seq_len)])
        for rows in chunks:
            if recipe.rate:
                rows = self._solve(rows, source.parts[part], f"rate {part}", workers)
            if recipe.min_difficulty is not None:
                rows = rows.take(rows.ratings >= recipe.min_difficulty)
            yield rows

    def complete(self, rows: Rows, file: Path, label: str, workers: Workers) -> Rows:
        return rows if self.recipe.rate else self._solve(rows, file, label, workers)  # rating has solved them

    def _solve(self, rows: Rows, file: Path, label: str, workers: Workers) -> Rows:
        """Fill in the answers and, if the solver rates, the ratings; rows without exactly one solution go to `bad`."""
        if not len(rows):
            return rows
        per_task = int(np.clip(len(rows) // 64, 256, 16_384))
        column = from_tokens(rows.questions)
        blocks = [pa.table({"inputs": column[i : i + per_task]}) for i in range(0, len(rows), per_task)]
        solved = list(workers.map(partial(_solve_block, self.task), blocks, total=len(rows), label=label))
        answers = np.concatenate([to_tokens(block["answers"]) for block in solved])
        num_solutions = np.concatenate([block["num_solutions"].to_numpy() for block in solved])
        num_guesses = np.concatenate([block["num_guesses"].to_numpy() for block in solved])
        ratings = num_guesses if self.recipe.rate else rows.ratings
        for i in np.flatnonzero(num_solutions != 1):
            reason = "no solution" if num_solutions[i] == 0 else "several solutions"
            text = self.task.to_text(rows.questions[i])
            self.bad.add(file, int(rows.numbers[i]), f"question '{text}' has {reason}")
        return Rows(rows.questions, answers, ratings, rows.numbers).take(num_solutions == 1)

    def generator(self) -> Callable[[int, int], tuple[np.ndarray, np.ndarray]]:
        assert self.recipe.num_clues is not None
        return partial(
            self.task.generate, self.recipe.seed, num_clues=self.recipe.num_clues, max_tries=MAX_TRIES
        )

    def augmenter(self) -> Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        return partial(self.task.augment, num_aug=self.recipe.num_aug, seed=self.recipe.seed)

    def too_few(self, num_found: int, num_wanted: int) -> str:
        recipe = self.recipe
        return (
            f"found only {num_found} different {recipe.size}x{recipe.size} puzzles with {recipe.num_clues} clues, "
            f"{num_wanted} are wanted; lower num_train or num_test, or change num_clues"
        )

    def none_found(self) -> str:
        size = self.recipe.size
        return (
            f"no {size}x{size} puzzle with {self.recipe.num_clues} clues and one solution found in {MAX_TRIES} tries; "
            "ask for more clues"
        )


def _solve_block(task: Sudoku, block: pa.Table) -> pa.Table:
    """Runs in Ray's workers."""
    answers, num_solutions, num_guesses = task.solve(to_tokens(block["inputs"]))
    return pa.table(
        {"answers": from_tokens(answers), "num_solutions": num_solutions, "num_guesses": num_guesses}
    )
