"""The test pairs of an ARC data set, and the names of its puzzle identifiers: what votes are counted against."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hrm_ray.data.format import IDENTIFIERS, TEST_PUZZLES
from hrm_ray.data.tasks.arc import NO_GRID, as_grid
from hrm_ray.errors import UserError, first_line, shown
from hrm_ray.evaluation.names import Names
from hrm_ray.remote import filesystem_of, reaching


class Pair(NamedTuple):
    """A test input uint8[h, w] and its solution uint8[h, w], None if it is unknown."""

    input: np.ndarray
    output: np.ndarray | None


class HeldOut(NamedTuple):
    """The test pairs of every test task, in order, and the names of the puzzle identifiers."""

    names: Names
    tasks: dict[str, list[Pair]]

    @property
    def solved(self) -> dict[str, list[Pair]]:
        """The tasks whose solutions are known."""
        return {
            task: pairs
            for task, pairs in self.tasks.items()
            if all(pair.output is not None for pair in pairs)
        }


def read_held_out(path: str) -> HeldOut:
    """Read `identifiers.json` and `test_puzzles.json` of a folder or URI: a data set, or these two files alone.

    Where every output of a task is missing or ``[[0]]``, its solutions are unknown.

    Raises:
        UserError: one of them is missing, damaged, or not of this form.
    """
    names = _read_json(path, IDENTIFIERS)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: {IDENTIFIERS} is no list of names; build the data set again")
    puzzles = _read_json(path, TEST_PUZZLES)
    if not isinstance(puzzles, dict) or not puzzles:
        raise UserError(f"{path}: {TEST_PUZZLES} holds no tasks; build the data set again")
    try:
        known = Names(names)
    except UserError as error:
        raise UserError(f"{path}: {IDENTIFIERS}: {error}; build the data set again") from None
    return HeldOut(
        known,
        {task: _pairs(puzzle, f"{path}: {TEST_PUZZLES}, task {task}") for task, puzzle in puzzles.items()},
    )


def _pairs(puzzle: Any, where: str) -> list[Pair]:
    tests = puzzle.get("test") if isinstance(puzzle, dict) else None
    if not isinstance(tests, list) or not tests or not all(isinstance(test, dict) for test in tests):
        raise UserError(f"{where} has no test pairs; build the data set again")
    is_solved = any(test.get("output", NO_GRID) != NO_GRID for test in tests)
    pairs = []
    for number, test in enumerate(tests):
        try:
            output = as_grid(test["output"]) if is_solved and "output" in test else None
            pairs.append(Pair(as_grid(test.get("input")), output))
        except UserError as error:
            raise UserError(f"{where}, test pair {number}: {error}") from None
    return pairs


def _read_json(path: str, name: str) -> Any:
    try:
        return json.loads(_read(path, name))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: {name} is damaged: {shown(first_line(error))}; build the data set again"
        ) from None


def _read(path: str, name: str) -> bytes:
    """A file of a folder or URI."""
    try:
        if "://" not in path:
            return (Path(path) / name).read_bytes()
        what = f"cannot read data set {path}"
        filesystem, folder = filesystem_of(path, what)
        with reaching(path, what), filesystem.open_input_stream(f"{folder.rstrip('/')}/{name}") as stream:
            return stream.read()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path} has no {name}: no ARC data set with test tasks; give one that `hrm-ray data build recipe=arc` or "
            "TRM's builder has made"
        ) from None
