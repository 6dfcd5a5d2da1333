"""Data sets of either layout, to look at: those in the published one are read where they lie, not converted."""

from pathlib import Path

import numpy as np

from hrm_ray.data.files import sha256
from hrm_ray.data.format import IDENTIFIERS, File, Manifest, SplitInfo
from hrm_ray.data.shards import Dataset, Split, open_dataset
from hrm_ray.data.tasks.arc import Arc
from hrm_ray.data.tasks.base import Task, task_class
from hrm_ray.data.tasks.tokens import Tokens
from hrm_ray.interop.dataset import Published, read_published
from hrm_ray.manifest import MANIFEST
from hrm_ray.published import DATASET_FILE, SPLITS


def open_any(path: str | Path, family: str | None = None) -> Dataset:
    """A data set of this project, or a folder in the published layout.

    Args:
        family: whose puzzles the published arrays are taken for if they can be, such as that of a model that is to
            answer them; None, or if they cannot be: the one that recognises them, else "tokens".

    Raises:
        UserError: neither, or damaged.
    """
    folder = Path(path)
    is_published = any((folder / split / DATASET_FILE).is_file() for split in SPLITS)
    if not is_published or (folder / MANIFEST).is_file():
        return open_dataset(path)
    return _published(folder, family)


class _PublishedSplit(Split):
    """The sets of a split, one behind the other."""

    def __init__(self, root: Path, name: str, published: Published):
        sets = self._sets = list(published.sets[name].values())
        self._first_rows = np.cumsum([0, *(len(part.inputs) for part in sets)])
        puzzles = np.cumsum([0, *(len(part.puzzle_identifiers) for part in sets)])
        self.puzzle_starts = _joined([part.puzzle_indices for part in sets], self._first_rows)
        self.group_starts = _joined([part.group_indices for part in sets], puzzles)
        num_examples, num_puzzles = int(self.puzzle_starts[-1]), int(self.group_starts[-1])
        info = SplitInfo(
            num_examples=num_examples,
            num_puzzles=num_puzzles,
            num_groups=len(self.group_starts) - 1,
            mean_puzzle_examples=num_examples / num_puzzles,
            shards=(),
        )
        super().__init__(root, name, info, published.about.seq_len)

    def rows(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """One after the other: for a few."""
        rows = [self._row(int(row)) for row in ids]
        names = ("inputs", "labels", "puzzle_identifiers")
        return {name: np.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}

    def _row(self, row: int) -> tuple[np.ndarray, np.ndarray, np.int32]:
        number = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        part, row = self._sets[number], row - int(self._first_rows[number])
        inputs, labels = part.rows(row, row + 1)
        puzzle = int(np.searchsorted(part.puzzle_indices, row, side="right")) - 1
        return inputs[0], labels[0], np.int32(part.puzzle_identifiers[puzzle])


def _joined(starts: list[np.ndarray], firsts: np.ndarray) -> np.ndarray:
    """Where each part begins, and the end, in all sets together."""
    return np.concatenate([[0], *(own[1:] + first for own, first in zip(starts, firsts[:-1], strict=True))])


def _published(folder: Path, family: str | None) -> Dataset:
    published = read_published(folder)
    splits: dict[str, Split] = {name: _PublishedSplit(folder, name, published) for name in published.sets}
    first = next(iter(splits.values())).rows(np.zeros(1, np.int64))
    layout = published.about.vocab_size, published.about.seq_len, published.about.pad_id

    def as_if(kind: type[Task]) -> Task | None:
        return kind.of_arrays(*layout, first["inputs"], first["labels"])

    task = (as_if(task_class(family)) if family else None) or published.task
    names = folder / IDENTIFIERS
    manifest = Manifest(
        task=task.name,
        task_options=task.options,
        **published.about.model_dump(),
        seed=None,
        recipe={},
        source_digest="",
        report={},
        # What their numbers mean to a model.
        extra_files=(File(file=IDENTIFIERS, bytes=names.stat().st_size, sha256=sha256(names)),)
        if names.is_file()
        else (),
        splits={},
    )
    dataset = Dataset(folder, folder, manifest)
    dataset.splits = splits
    # How they are drawn. Nothing in its arrays proves that they are of ARC, but they can be drawn so.
    known = (known for known in (task, published.task, as_if(Arc)) if known and not isinstance(known, Tokens))
    dataset.task = next(known, task)
    return dataset
