"""What a dataset is built from and how: typed, validated, read from datasets/*.yaml."""

from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from hrm_ray.config.validate import Settings, abbreviated, in_one_line, nearest, read_yaml_file, validated
from hrm_ray.data.tasks.base import Task, family_names, import_family, trust
from hrm_ray.errors import UserError

GENERATOR = "generator"
DEFAULT_TASK = "sudoku"  # of a recipe that does not say


class Recipe(Settings):
    """The keys that the recipes of all families share. What a recipe leaves out has these defaults.

    A family's recipe derives from this and gives `task` its name as the default: that is what `task=` looks for.
    """

    classes: ClassVar[dict[str, type["Recipe"]]] = {}
    listed_by: ClassVar[str] = "hrm-ray config show recipe"

    task: str
    """Puzzle family."""
    source: str | None = None
    """Where the puzzles come from."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of every random decision."""
    rows_per_shard: int = Field(default=131_072, ge=1, le=10**9)
    """Examples in a file, about."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        name = cls.model_fields["task"].default
        if isinstance(name, str):  # else it is a base of others
            Recipe.classes[name] = cls
            cls.listed_by = f"{Recipe.listed_by}:{name}"

    def make_task(self) -> Task | None:
        """The task of the data set, if the recipe alone says it; None: the source decides."""
        return None


class RowRecipe(Recipe):
    """Of a family whose puzzles are a question and its answer."""

    made_by: ClassVar[str] = GENERATOR  # how messages call a source that makes puzzles

    source: str | None = None
    """generator, a file of puzzles in any usual layout, a folder or zip with a train (and test) file, or a Hugging Face
    id."""
    num_train: int | None = Field(default=None, ge=1, le=10**9)
    """Puzzles to generate for training (generator only)."""
    num_test: int | None = Field(default=None, ge=0, le=10**9)
    """Held-out puzzles: to generate, or to split off a source without a test part (0: none), or to sample from its test
    part (default: all of it)."""
    subsample_size: int | None = Field(default=None, ge=1, le=10**9)
    """Training puzzles to draw from the source (default: all)."""
    on_bad: Literal["error", "skip"] = "error"
    """Whether an unusable row stops the build, or is skipped, counted and listed."""

    @property
    def generates(self) -> bool:
        """Whether the puzzles are made, and not read."""
        return self.source == GENERATOR

    def needed(self) -> tuple[str, ...]:
        """The keys that the generator needs."""
        return "num_train", "num_test"

    def of_generator(self) -> tuple[str, ...]:
        """The keys that mean nothing without the generator."""
        return ("num_train",)

    def of_files(self) -> tuple[str, ...]:
        """The keys that mean nothing for the generator."""
        return "subsample_size", "on_bad"

    @model_validator(mode="after")
    def _fields_fit_the_source(self) -> Self:
        if self.source is None:
            raise ValueError(
                "'source' is not given; add source=PATH (a file of puzzles, or a folder with train.csv and "
                "test.csv), a Hugging Face id (source=sapientinc/sudoku-extreme), or source=generator"
            )
        if self.generates:
            for key in self.needed():
                if getattr(self, key) is None:
                    raise ValueError(f"'{key}' is not given; source={self.source} needs {key}=NUMBER")
        others, why = (
            (self.of_files(), f"does nothing with source={self.source}")
            if self.generates
            else (self.of_generator(), f"is for source={self.made_by} only")
        )
        for key in others:
            if getattr(self, key) != type(self).model_fields[key].get_default(call_default_factory=True):
                raise ValueError(f"'{key}' {why}; leave it out")
        return self


def recipe_class(task: Any) -> type[Recipe]:
    """The class of the recipes of a family. Raises UserError: no such family, or it is not built from a recipe."""
    if not isinstance(task, str):
        raise UserError(
            f"task={abbreviated(task)}: give the name of a puzzle family: {', '.join(family_names())}"
        )
    trust(task)
    module = import_family(task)
    if hasattr(module, "__path__"):
        import_module(f"{module.__name__}.builder")
    if task not in Recipe.classes:
        raise UserError(f"task={task} has no recipe: its data sets are imported (hrm-ray data import-npy)")
    return Recipe.classes[task]


def recipe_classes() -> list[type[Recipe]]:
    """Those of all families that ship."""
    found = []
    for name in family_names():
        with suppress(UserError):  # not built from a recipe
            found.append(recipe_class(name))
    return found


def recipe_folders() -> list[Path]:
    """Where recipes lie: beside the package in a checkout, inside it when installed."""
    package = Path(str(files("hrm_ray")))
    return [folder for folder in (package.parent / "datasets", package / "_datasets") if folder.is_dir()]


def recipe_names() -> list[str]:
    """The recipes that ship with hrm_ray."""
    return sorted({file.stem for folder in recipe_folders() for file in folder.glob("*.yaml")})


def read_recipe(name_or_file: str) -> tuple[dict[str, Any], str]:
    """What the recipe of a name, or of a YAML file, holds, and how a message calls it.

    Raises:
        UserError: no such recipe, unreadable YAML, or it is no mapping.
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
    return values, f"recipe {file.stem}"


def recipe_class_of(name_or_file: str) -> type[Recipe]:
    """The class of the recipe of a name, or of a YAML file. Raises UserError as `load_recipe` does."""
    values, where = read_recipe(name_or_file)
    with in_one_line(where):
        return recipe_class(values.get("task", DEFAULT_TASK))


def load_recipe(name_or_file: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe by name, or from a YAML file, with `overrides` (key -> value) on top.

    Raises:
        UserError: no such recipe, unreadable YAML, an unknown key, a value that does not fit.
    """
    values, where = read_recipe(name_or_file)
    values |= overrides or {}
    return validated(recipe_class(values.setdefault("task", DEFAULT_TASK)), values, where)
