"""The published dataset layout, for import: a folder a split with dataset.json and {set}__*.npy.

    DIR/identifiers.json                     names of the puzzle identifiers
    DIR/test_puzzles.json                    of ARC: the test pairs, for votes
    DIR/SPLIT/dataset.json                   vocabulary, ids, counts, names of the sets
    DIR/SPLIT/SET__{inputs,labels}.npy       [examples, seq_len]
    DIR/SPLIT/SET__puzzle_identifiers.npy    [puzzles]
    DIR/SPLIT/SET__puzzle_indices.npy        [puzzles + 1]: where each puzzle's examples begin
    DIR/SPLIT/SET__group_indices.npy         [groups + 1]: where each group's puzzles begin

Groups, puzzles, identifiers and the order of examples are kept; the sets of a split are joined. What does not hold
together is refused: no number is changed to make it fit.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import Field

from hrm_ray.config.validate import Settings, validated
from hrm_ray.data.files import sha256
from hrm_ray.data.format import IDENTIFIERS, TEST_PUZZLES, Manifest, SplitInfo
from hrm_ray.data.placing import is_remote, placed
from hrm_ray.data.tasks.base import Task, family_names, task_class
from hrm_ray.data.tasks.tokens import Tokens
from hrm_ray.data.writer import DatasetWriter, balanced_cuts
from hrm_ray.errors import UserError, first_line
from hrm_ray.interop.files import check_regular, read_bytes
from hrm_ray.manifest import MANIFEST
from hrm_ray.published import DATASET_FILE, SPLITS, dataset_hint

BESIDE = IDENTIFIERS, TEST_PUZZLES
INT32_MAX = 2**31 - 1  # puzzles, groups and identifiers are int32 columns

_MAX_ABOUT_BYTES, _MAX_BESIDE_BYTES = 10_000_000, 1_000_000_000
_ROWS_PER_SHARD = 131_072
_ROWS_PER_READ = 65_536
_ROWS_TO_RECOGNISE = 1_000

Token = Annotated[int, Field(strict=True, ge=0, le=255)]
Count = Annotated[int, Field(strict=True, ge=1, le=INT32_MAX)]


class _About(Settings):
    """What dataset.json says of the data's meaning; the same in every split."""

    pad_id: Token
    ignore_label_id: Annotated[int, Field(strict=True, ge=-INT32_MAX, le=INT32_MAX)] | None
    blank_identifier_id: Annotated[int, Field(strict=True, ge=0, le=INT32_MAX)]
    vocab_size: Count
    seq_len: Count
    num_puzzle_identifiers: Count


@dataclass
class _Set:
    """The arrays of one set, mapped from disk; `where` is the beginning of their files' names.

    Raises UserError, made or used, naming the file and what is wrong with it.
    """

    where: str
    about: _About
    inputs: np.ndarray
    labels: np.ndarray
    puzzle_identifiers: np.ndarray
    puzzle_indices: np.ndarray
    group_indices: np.ndarray

    def __post_init__(self) -> None:
        num_examples, num_puzzles = len(self.inputs), len(self.puzzle_identifiers)
        for name in ("inputs", "labels"):
            shape, expected = getattr(self, name).shape, (num_examples, self.about.seq_len)
            if shape != expected:
                raise UserError(f"{self.file(name)} has shape {shape}, not {expected}")
        if not num_examples:
            raise UserError(f"{self.file('inputs')} holds no examples; take its set out of {DATASET_FILE}")
        if len(self.puzzle_indices) != num_puzzles + 1:
            raise UserError(
                f"{self.file('puzzle_indices')} has {len(self.puzzle_indices)} entries, where "
                f"{self.file('puzzle_identifiers')} has {num_puzzles}; it must have one more"
            )
        self.puzzle_indices = self._rising("puzzle_indices", num_examples)
        self.group_indices = self._rising("group_indices", num_puzzles)
        self._check_range("puzzle_identifiers", self.puzzle_identifiers, self.about.num_puzzle_identifiers)

    def file(self, name: str) -> str:
        return f"{self.where}__{name}.npy"

    def _rising(self, name: str, count: int) -> np.ndarray:
        """The indices, int64, which say where each part begins; `count` is where the last ends."""
        starts = getattr(self, name)
        # The ends first: of a file of a terabyte the rest would take long to read. Compared as they are: unsigned
        # numbers that fall have positive differences, and large ones turn negative in another type.
        if (
            not 2 <= len(starts) <= min(count, INT32_MAX) + 1
            or (int(starts[0]), int(starts[-1])) != (0, count)
            or (starts[1:] <= starts[:-1]).any()
        ):
            raise UserError(f"{self.file(name)} must rise from 0 to {count} without empty entries")
        return starts.astype(np.int64)

    def _check_range(self, name: str, values: np.ndarray, stop: int, first_row: int = 0) -> None:
        """Raise UserError if some of `values` are not in 0..stop-1."""
        if values.size and not 0 <= int(values.min()) <= int(values.max()) < stop:
            row = int(
                np.flatnonzero(((values < 0) | (values >= stop)).reshape(len(values), -1).any(axis=1))[0]
            )
            wrong = values[row][(values[row] < 0) | (values[row] >= stop)].flat[0]
            raise UserError(f"{self.file(name)}: row {first_row + row} has {wrong}, outside 0..{stop - 1}")

    def rows(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels of a range, uint8."""
        for name in ("inputs", "labels"):
            self._check_range(name, getattr(self, name)[start:stop], self.about.vocab_size, start)
        return self.inputs[start:stop].astype(np.uint8), self.labels[start:stop].astype(np.uint8)


class Published(NamedTuple):
    """A folder of the published layout: its sets by split and name, mapped from disk, and the task that they are of."""

    about: _About
    task: Task
    sets: dict[str, dict[str, _Set]]


ARRAYS = tuple(field.name for field in fields(_Set) if field.type is np.ndarray)


def import_npy(
    source_dir: str | Path, out: str | Path, *, task: str | None = None, overwrite: bool = False
) -> Manifest:
    """Convert a folder of the published layout into a dataset in `out`, a folder or URI, verified.

    Args:
        task: the puzzle family; None: the one that recognises its puzzles, else "tokens".

    Raises:
        UserError: a file is missing or does not fit the others, the puzzles are not of `task`, or `out` cannot be used.
    """
    with placed(out, overwrite=overwrite) as folder:
        return _import(Path(source_dir), folder, task, overwrite=overwrite or is_remote(out))


def read_published(folder: Path, task_name: str | None = None) -> Published:
    """What a folder of the published layout holds; the rows are checked when they are read.

    Args:
        task_name: the puzzle family; None: the one that recognises its puzzles, else "tokens".

    Raises:
        UserError: a file is missing, or does not fit the others, or the puzzles are not of that family.
    """
    if not any(os.path.lexists(folder / name / DATASET_FILE) for name in SPLITS):
        raise UserError(_not_published(folder))
    names = [
        name for name in SPLITS if os.path.lexists(folder / name)
    ]  # one without its file is not left out
    read = {name: _read_split(folder / name) for name in names}
    about = read[names[0]][0]
    for name in names[1:]:
        if read[name][0] != about:
            raise UserError(f"{folder}: the {DATASET_FILE} of {names[0]} and {name} describe different data")
    task = _task_of(task_name, folder, about, next(iter(read[names[0]][1].values())))
    return Published(about, task, {name: sets for name, (_, sets) in read.items()})


def _import(folder: Path, out: Path, task_name: str | None, *, overwrite: bool) -> Manifest:
    about, task, read = read_published(folder, task_name)
    extra = [folder / name for name in BESIDE if (folder / name).exists()]
    contents = {file.name: read_bytes(file, _MAX_BESIDE_BYTES) for file in extra}
    _check_room(out, about, [part for sets in read.values() for part in sets.values()])
    with DatasetWriter(out, overwrite=overwrite) as writer:
        splits = {name: _copy_split(writer, name, task, sets) for name, sets in read.items()}
        manifest = Manifest(
            task=task.name,
            task_options=task.options,
            **about.model_dump(),
            seed=None,
            recipe={},
            source_digest=_digest(folder, [*_files(folder, read), *extra]),
            report={"imported_sets": {name: list(sets) for name, sets in read.items()}},
            extra_files=tuple(writer.add_file(name, content) for name, content in contents.items()),
            splits=splits,
        )
        writer.finish(manifest)
    return manifest


def _not_published(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: no such folder; give one with train/{DATASET_FILE}"
    if (folder / MANIFEST).is_file():
        return f"{folder} is a data set of hrm_ray already; use it as it is"
    return dataset_hint(folder) or (
        f"{folder} has no train/{DATASET_FILE} or test/{DATASET_FILE}: not the published layout"
    )


def _read_split(folder: Path) -> tuple[_About, dict[str, _Set]]:
    where = folder / DATASET_FILE
    content = read_bytes(where, _MAX_ABOUT_BYTES)
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{where} is damaged: not the JSON of a published data set")
    sets = values.get("sets")
    if not isinstance(sets, list) or not sets or not all(isinstance(n, str) and n for n in sets):
        raise UserError(f"{where}: 'sets' must list the names of the sets, as [\"all\"]")
    plain = {name for name in sets if name == Path(name).name and name.isprintable()}
    if strange := [name for name in sets if name not in plain or sets.count(name) > 1]:
        raise UserError(f"{where}: 'sets' must list each set once, by its plain name; it has {strange[0]!r}")
    about = validated(
        _About, {key: value for key, value in values.items() if key in _About.model_fields}, str(where)
    )
    if about.vocab_size > 256:
        raise UserError(f"{where}: a vocabulary of {about.vocab_size} tokens; at most 256 are supported")
    if about.blank_identifier_id >= about.num_puzzle_identifiers:
        raise UserError(
            f"{where}: blank_identifier_id={about.blank_identifier_id} must be below "
            f"num_puzzle_identifiers={about.num_puzzle_identifiers}"
        )
    return about, {name: _open_set(folder, name, about) for name in sets}


def _open_set(folder: Path, name: str, about: _About) -> _Set:
    where = str(folder / name)
    arrays = {array: _open_array(Path(f"{where}__{array}.npy")) for array in ARRAYS}
    for array, opened in arrays.items():
        num_axes = 2 if array in ("inputs", "labels") else 1
        if opened.ndim != num_axes:
            raise UserError(
                f"{where}__{array}.npy has shape {opened.shape}; it must have {num_axes} "
                f"{'axes' if num_axes > 1 else 'axis'}"
            )
    return _Set(where, about, **arrays)


def _open_array(file: Path) -> np.ndarray:
    """An array of whole numbers, mapped from disk."""
    check_regular(file)
    try:
        array = np.lib.format.open_memmap(file, mode="r")
    except Exception as error:  # a header is a Python literal: there are many ways in which it may be wrong
        raise UserError(f"{file} cannot be read as an array of numbers: {first_line(error)}") from None
    if array.dtype.kind not in "iu":
        raise UserError(f"{file} holds {array.dtype}, not whole numbers; save it as an array of integers")
    size, expected = file.stat().st_size, array.offset + array.nbytes
    if size != expected:
        raise UserError(f"{file} has {size} bytes, where its header says {expected}; copy it again")
    return array


def _check_room(out: Path, about: _About, sets: list[_Set]) -> None:
    """Raise UserError if the disk is too small, before hours of copying show it."""
    needed = sum(len(part.inputs) * (2 * about.seq_len + 12) for part in sets)
    there = next(folder for folder in out.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise UserError(
            f"out={out} needs {needed / 1e9:,.1f} GB, and {there} has {free / 1e9:,.1f} GB free; pick another out"
        )


def _task_of(name: str | None, folder: Path, about: _About, first: _Set) -> Task:
    """The task that is named, or that recognises the first examples; else we know nothing."""
    described = about.vocab_size, about.seq_len, about.pad_id
    rows = first.rows(0, _ROWS_TO_RECOGNISE)
    if name is not None:
        task = task_class(name).of_arrays(*described, *rows)
        if task is None:
            raise UserError(
                f"task={name}: {folder} holds no such puzzles ({about.vocab_size} tokens, {about.seq_len} cells); "
                "leave task= out to have them recognised"
            )
        return task
    for kind in map(task_class, family_names()):
        if kind.is_recognised and (task := kind.of_arrays(*described, *rows)):
            return task
    return Tokens(about.vocab_size, about.seq_len)


def _copy_split(writer: DatasetWriter, name: str, task: Task, sets: dict[str, _Set]) -> SplitInfo:
    rows_per_group = [np.diff(part.puzzle_indices[part.group_indices]) for part in sets.values()]
    cuts = balanced_cuts(np.concatenate(rows_per_group), _ROWS_PER_SHARD)
    split = writer.split(name, task, cuts)
    first_puzzle = first_group = 0
    for part in sets.values():
        for start in range(0, len(part.inputs), _ROWS_PER_READ):
            stop = min(start + _ROWS_PER_READ, len(part.inputs))
            inputs, labels = part.rows(start, stop)
            puzzles = np.searchsorted(part.puzzle_indices, np.arange(start, stop), side="right") - 1
            groups = np.searchsorted(part.group_indices, puzzles, side="right") - 1
            identifiers = part.puzzle_identifiers[puzzles].astype(np.int32)
            split.add(inputs, labels, identifiers, first_puzzle + puzzles, first_group + groups)
        first_puzzle += len(part.puzzle_indices) - 1
        first_group += len(part.group_indices) - 1
    return split.finish()


def _files(folder: Path, read: dict[str, dict[str, _Set]]) -> Iterator[Path]:
    """All files of the splits that were read."""
    for name, sets in read.items():
        yield folder / name / DATASET_FILE
        for part in sets.values():
            yield from (Path(part.file(array)) for array in ARRAYS)


def _digest(folder: Path, files: list[Path]) -> str:
    total = hashlib.sha256()
    for file in sorted(files):
        total.update(f"{file.relative_to(folder)}:{sha256(file)}\n".encode())
    return total.hexdigest()
