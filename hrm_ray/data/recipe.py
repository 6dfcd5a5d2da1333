"""What a dataset is built from and how: typed, validated, read from datasets/*.yaml."""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from hrm_ray.config.validate import Settings, nearest, read_yaml_file, validated
from hrm_ray.data.tasks.sudoku import MIN_CLUES
from hrm_ray.errors import UserError

GENERATOR = "generator"


class Recipe(Settings):
    """A recipe; what it leaves out has these defaults."""

    listed_by: ClassVar[str] = "hrm-ray config show recipe"

    task: Literal["sudoku"] = "sudoku"
    """Puzzle family."""
    size: Literal[4, 6, 9] = 9
    """Of the Sudoku, 4, 6 (boxes of 2 rows and 3 columns) or 9."""
    source: str | None = None
    """generator, a file of puzzles in any usual layout, a folder or zip with a train (and test) file, or a Hugging Face
    id."""
    num_train: int | None = Field(default=None, ge=1, le=10**9)
    """Puzzles to generate for training (generator only)."""
    num_test: int | None = Field(default=None, ge=0, le=10**9)
    """Held-out puzzles: to generate, or to split off a source without a test part (0: none), or to sample from its test
    part (default: all of it)."""
    num_clues: int | None = None
    """Digits given in a generated puzzle."""
    subsample_size: int | None = Field(default=None, ge=1, le=10**9)
    """Training puzzles to draw from the source (default: all)."""
    num_aug: int = Field(default=0, ge=0, le=10**6)
    """Symmetric copies of every training puzzle, beside the original."""
    min_difficulty: int | None = Field(default=None, ge=0)
    """Leave out puzzles rated lower."""
    rate: bool = False
    """Rate by the solver (number of guesses) instead of the source's rating."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of every random decision."""
    on_bad: Literal["error", "skip"] = "error"
    """Whether an unusable row stops the build, or is skipped, counted and listed."""
    rows_per_shard: int = Field(default=131_072, ge=1, le=10**9)
    """Examples in a file, about."""

    @model_validator(mode="after")
    def _fields_fit(self) -> "Recipe":
        if self.source is None:
            raise ValueError(
                "'source' is not given; add source=PATH (a file of puzzles, or a folder with train.csv and "
                "test.csv), a Hugging Face id (source=sapientinc/sudoku-extreme), or source=generator"
            )
        if self.source == GENERATOR:
            for key in ("num_train", "num_test", "num_clues"):
                if getattr(self, key) is None:
                    raise ValueError(f"'{key}' is not given; source=generator needs {key}=NUMBER")
            for key in ("subsample_size", "min_difficulty"):
                if getattr(self, key) is not None:
                    raise ValueError(f"'{key}' does nothing with source=generator; leave it out")
            fewest, most = MIN_CLUES[self.size], self.size**2
            if not fewest <= (self.num_clues or 0) <= most:
                raise ValueError(
                    f"num_clues={self.num_clues}: {self.size}x{self.size} Sudoku can have {fewest}..{most} clues"
                )
        else:
            for key in ("num_train", "num_clues"):
                if getattr(self, key) is not None:
                    raise ValueError(f"'{key}' is for source=generator only; leave it out")
        return self


def recipe_folders() -> list[Path]:
    """Where recipes lie: beside the package in a checkout, inside it when installed."""
    package = Path(str(files("hrm_ray")))
    return [folder for folder in (package.parent / "datasets", package / "_datasets") if folder.is_dir()]


def recipe_names() -> list[str]:
    """The recipes that ship with hrm_ray."""
    return sorted({file.stem for folder in recipe_folders() for file in folder.glob("*.yaml")})


def load_recipe(name_or_file: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe by name, or from a YAML file, with `overrides` (key -> value) on top.

    Raises:
        UserError: no such recipe, unreadable YAML, an unknown key, a value that does not fit.
    """
    file = Path(name_or_file)
    if file.suffix not in (".yaml", ".yml"):
        there = [folder / f"{name_or_file}.yaml" for folder in recipe_folders()]
        found = [candidate for candidate in there if candidate.is_file()]
        if not found:
            raise UserError(f"unknown recipe '{name_or_file}'; {nearest(name_or_file, recipe_names())}")
        file = found[0]
    values = read_yaml_file(file, "recipe")
    if not isinstance(values, dict):
        raise UserError(f"recipe {file} must hold 'key: value' lines")
    return validated(Recipe, {**values, **(overrides or {})}, f"recipe {file.stem}")
