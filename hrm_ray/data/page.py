"""The page of a data set: one HTML file to browse its groups in, with a model's answers if they are given.

The examples lie in the page as JSON, tokens as strings of one character a cell, without rows and columns that hold
nothing but padding; `page.js` draws them.
"""

import json
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from hrm_ray.data.drawing import RIGHT, WRONG, as_grid, row_width, used
from hrm_ray.data.format import IDENTIFIERS
from hrm_ray.data.shards import Dataset, Split
from hrm_ray.errors import UserError
from hrm_ray.html import document

MAX_EXAMPLES = 12  # of a puzzle
MAX_CELLS = 4_000_000  # in a page, about its size in bytes

_GENERATOR = '<meta name="generator" content="hrm-ray data show">\n'
# A character for each of 256 tokens; none of them means anything in HTML or JSON.
_ALPHABET = "".join(islice((chr(code) for code in range(48, 1000) if chr(code).isalnum()), 256))
_CHARACTERS = np.array(list(_ALPHABET))


class Steps(Protocol):
    """See `hrm_ray.api.Steps`."""

    @property
    def tokens(self) -> np.ndarray: ...
    @property
    def confidence(self) -> np.ndarray: ...
    @property
    def halts(self) -> np.ndarray: ...


class Choice(NamedTuple):
    """What of a split a page shows.

    Attributes:
        groups: the examples' numbers, by group and puzzle: {group: {puzzle: [example, ...]}}.
        copies: puzzles of a group at most.
        rows: the examples in this order, see `Split.rows`.
    """

    groups: dict[int, dict[int, list[int]]]
    copies: int
    rows: dict[str, np.ndarray]


def choose(dataset: Dataset, split: str, *, count: int, copies: int, num_steps: int) -> Choice:
    """`count` groups of a split, evenly spread, and the first `copies` puzzles of each; fewer if a page cannot hold so
    many.

    Args:
        num_steps: answers of a model to each example.

    Raises:
        UserError: no such split.
    """
    part = dataset.split(split)
    while True:
        choice = _spread(part, min(count, part.num_groups), copies)
        cells = sum(
            _size(question, dataset) + _size(answer, dataset) * (1 + num_steps)
            for question, answer in zip(choice.rows["inputs"], choice.rows["labels"], strict=True)
        )
        largest = max(len(puzzles) for puzzles in choice.groups.values())
        if cells <= MAX_CELLS or (largest == 1 and len(choice.groups) == 1):
            return choice
        if largest > 1:
            copies = max(1, min(largest - 1, largest * MAX_CELLS // cells))
        else:
            count = max(1, min(len(choice.groups) - 1, len(choice.groups) * MAX_CELLS // cells))


def _spread(part: Split, count: int, copies: int) -> Choice:
    groups = {}
    for group in (np.arange(count) * part.num_groups // count).tolist():
        first, end = part.group_starts[group : group + 2].tolist()
        groups[group] = {
            puzzle: list(range(start, min(stop, start + MAX_EXAMPLES)))
            for puzzle in range(first, min(end, first + copies))
            for start, stop in [part.puzzle_starts[puzzle : puzzle + 2].tolist()]
        }
    ids = [example for puzzles in groups.values() for examples in puzzles.values() for example in examples]
    return Choice(groups, copies, part.rows(np.array(ids)))


def _grid(tokens: np.ndarray, dataset: Dataset) -> np.ndarray:
    return as_grid(tokens, row_width(dataset.task), dataset.manifest.pad_id)


def _window(grid: np.ndarray, dataset: Dataset) -> tuple[slice, slice]:
    """The rows and columns of a grid that are shown."""
    return used(grid, dataset.manifest.pad_id) if dataset.task.is_padded else (slice(None), slice(None))


def _size(tokens: np.ndarray, dataset: Dataset) -> int:
    grid = _grid(tokens, dataset)
    return grid[_window(grid, dataset)].size


def page(dataset: Dataset, split: str, choice: Choice, steps: Steps | None = None, run: str = "") -> str:
    """The page as HTML.

    Args:
        steps: what a model answers to the examples of `choice`, in their order.
        run: how that model is called.

    Raises:
        UserError: the names of the puzzle identifiers cannot be read.
    """
    content = json.dumps(_content(dataset, split, choice, steps, run), ensure_ascii=False)
    content = content.replace("<", "\\u003c")  # ends no script, begins no comment
    title = _clean(str(dataset.path))
    body = (
        f'<main>\n<h1>{escape(title)}</h1>\n<p id="about"></p>\n'
        "<noscript><p>This page is drawn by JavaScript, which is switched off here.</p></noscript>\n"
        '<div id="browser"></div>\n</main>\n'
        f'<script type="application/json" id="data">{content}</script>'
    )
    here = Path(__file__)
    return document(
        escape(f"{title}, {split}"),
        body,
        css=here.with_suffix(".css").read_text(),
        script=here.with_suffix(".js").read_text(),
        head=_GENERATOR,
    )


def _content(dataset: Dataset, split: str, choice: Choice, steps: Steps | None, run: str) -> dict[str, Any]:
    task, manifest, part = dataset.task, dataset.manifest, dataset.split(split)
    names = _read_names(dataset.root)
    examples, identifiers = _examples(dataset, choice, steps), choice.rows["puzzle_identifiers"].tolist()
    rows = iter(range(len(examples)))
    groups = []
    for group, puzzles in choice.groups.items():
        shown = []
        for puzzle, ids in puzzles.items():
            own = [next(rows) for _ in ids]
            identifier = identifiers[own[0]]
            shown.append(
                {
                    "puzzle": puzzle,
                    "identifier": identifier,
                    "name": _clean(names[identifier]) if identifier < len(names) else "",
                    "examples": [
                        {"example": example, **examples[row]} for example, row in zip(ids, own, strict=True)
                    ],
                }
            )
        num_puzzles = int(np.diff(part.group_starts[group : group + 2])[0])
        groups.append({"group": group, "num_puzzles": num_puzzles, "puzzles": shown})
    return {
        "about": _about(part, choice, steps, run),
        "alphabet": _ALPHABET,
        "cells": [task.cell(token) for token in range(max(manifest.vocab_size, task.vocab_size))],
        "box": task.box,
        "ignored": manifest.ignore_label_id,
        "checkable": task.checkable,
        "num_steps": 0 if steps is None else steps.tokens.shape[1],
        "right": RIGHT,
        "wrong": WRONG,
        "groups": groups,
    }


def _about(part: Split, choice: Choice, steps: Steps | None, run: str) -> str:
    shown, all_groups = len(choice.groups), part.num_groups
    which = (
        f"all {all_groups:,} groups"
        if shown == all_groups
        else f"{shown:,} of {all_groups:,} groups, evenly spread"
    )
    largest = int(np.diff(part.group_starts).max())
    if largest > choice.copies:
        which += f"; of each group at most {choice.copies:,} of up to {largest:,} puzzles"
    about = f"Split {part.name}: {which}."
    if steps is not None:
        number = steps.tokens.shape[1]
        about += f" Answered by {run}, in {number} ACT step{'s' if number > 1 else ''}."
    return _clean(about)


def _examples(dataset: Dataset, choice: Choice, steps: Steps | None) -> list[dict[str, Any]]:
    """Question and answer of each example, each as [columns in a row, cells], and a model's answers."""
    task = dataset.task
    examples: list[dict[str, Any]] = []
    is_valid = None
    if steps is not None and task.checkable:
        n, num_steps, _ = steps.tokens.shape
        questions = np.repeat(choice.rows["inputs"], num_steps, axis=0)
        is_valid = task.is_solution(questions, steps.tokens.reshape(len(questions), -1)).reshape(n, num_steps)
    for number, (question, answer) in enumerate(
        zip(choice.rows["inputs"], choice.rows["labels"], strict=True)
    ):
        asked, label = _grid(question, dataset), _grid(answer, dataset)
        where = _window(label, dataset)
        example: dict[str, Any] = {
            "question": _text(asked[_window(asked, dataset)]),
            "answer": _text(label[where]),
        }
        if steps is not None:
            # What lies outside the label's window is not scored.
            example["steps"] = [_text(_grid(tokens, dataset)[where])[1] for tokens in steps.tokens[number]]
            example["confidence"] = np.round(steps.confidence[number].astype(float), 3).tolist()
            example["halts"] = _first(steps.halts[number])
        if is_valid is not None:
            example["valid"] = is_valid[number].tolist()
        examples.append(example)
    return examples


def _text(grid: np.ndarray) -> tuple[int, str]:
    return grid.shape[1], "".join(_CHARACTERS[grid.reshape(-1)].tolist())


def _first(flags: np.ndarray) -> int | None:
    return int(flags.argmax()) if flags.any() else None


def _read_names(root: Path) -> list[str]:
    """Those of the puzzle identifiers; none if the data set has no such file."""
    file = root / IDENTIFIERS
    if not file.is_file():
        return []
    try:
        names = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{file} is no list of names; build the data set again")
    return names


def _clean(text: str) -> str:
    """Text of a file or a path as UTF-8 can hold it."""
    return text.encode(errors="replace").decode()


def is_page(file: Path) -> bool:
    """Whether a file is a page of a data set."""
    with file.open("rb") as stream:
        return _GENERATOR.encode() in stream.read(1_000)
