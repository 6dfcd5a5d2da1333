"""What a puzzle family adds to be built from raw puzzles: a recipe, and a `Builder` that turns it into splits.

A builder reads or generates puzzles and says in which order examples follow; `hrm_ray.data.pipeline`, which knows no
puzzle, writes them. What takes long is mapped over blocks by `Workers`: on Ray Data, or in this process where it is
little. Random decisions are keyed by what they are for, so the same recipe gives the same bytes wherever it runs.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from hrm_ray.data.recipe import Recipe
from hrm_ray.data.tasks.base import Task


class Examples(NamedTuple):
    """Rows of a split, in order.

    Attributes:
        inputs, labels: uint8 [n, seq_len].
        identifiers: int32 [n], numbers of the puzzle identifiers.
        puzzles, groups: int64 [n], ascending; gaps are closed when they are written.
        ratings: int64 [n], how hard each is; None, for all of a split, if nobody has rated them.
    """

    inputs: np.ndarray
    labels: np.ndarray
    identifiers: np.ndarray
    puzzles: np.ndarray
    groups: np.ndarray
    ratings: np.ndarray | None = None


class Part(NamedTuple):
    """A split to be written.

    Attributes:
        name: of the split.
        rows_per_group: integers [num_groups], at most so many rows; shards are cut by them.
        blocks: the examples; `groups` counts the entries of `rows_per_group`.
    """

    name: str
    rows_per_group: np.ndarray
    blocks: Iterator[Examples]


class Workers(Protocol):
    """Where work is done."""

    show_progress: bool

    def map(
        self,
        function: Callable[[pa.Table], pa.Table],
        blocks: list[pa.Table],
        *,
        total: int,
        label: str,
        on_ray: bool = True,
    ) -> Iterator[pa.Table]:
        """The results of `function` for `blocks`, in their order.

        Args:
            total: rows of all results, for the progress bar that `label` names.
            on_ray: whether it is enough work to start Ray for it, and to send what it makes between processes; else
                threads of this process do it.
        """

    def share(self, value: Any) -> Callable[[], Any]:
        """Something for all tasks of `map`, sent to each worker once: call the result there to have it."""


class Builder(ABC):
    """Builds the data sets of one family; a class names its recipe's class: ``class Mine(Builder, recipe=MyRecipe)``.

    Attributes:
        recipe: what is built.
        task: the data set's task, known from the start or once `parts` has begun.
        num_puzzle_identifiers: with the blank one, known once all parts have been read.
    """

    classes: ClassVar[dict[type[Recipe], type["Builder"]]] = {}

    task: Task
    num_puzzle_identifiers: int = 1

    def __init_subclass__(cls, recipe: type[Recipe] | None = None) -> None:
        if recipe is not None:
            Builder.classes[recipe] = cls

    def __init__(self, recipe: Any):
        """Finds the source. Raises UserError if there is none."""
        self.recipe = recipe

    @abstractmethod
    def digest(self) -> str:
        """What the data are built from, for the manifest: the SHA-256, hex, of all files; or the generator's name."""

    @abstractmethod
    def parts(self, workers: Workers) -> Iterator[Part]:
        """The splits, train first. Each is read to its end before the next is asked for.

        Raises:
            UserError: the source, or something in it, cannot be used.
        """

    def files(self) -> Mapping[str, bytes]:
        """What else belongs to the data set, by file name; asked for when all parts have been read."""
        return {}

    def report(self) -> dict[str, Any]:
        """What was left out or found, for the manifest; asked for when all parts have been read."""
        return {}

    def notes(self) -> Iterator[str]:
        """The same for a person, in lines; nothing to tell, no line."""
        return iter(())


def builder_of(recipe: Recipe) -> Builder:
    """The builder of a recipe's family."""
    return Builder.classes[type(recipe)](recipe)
