"""The published dataset layout, for import: a folder a split with dataset.json and {set}__*.npy.

    DIR/identifiers.json                     names of the puzzle identifiers
    DIR/SPLIT/dataset.json                   vocabulary, ids, counts, names of the sets
    DIR/SPLIT/SET__{inputs,labels}.npy       [examples, seq_len]
    DIR/SPLIT/SET__puzzle_identifiers.npy    [puzzles]
    DIR/SPLIT/SET__puzzle_indices.npy        [puzzles + 1]: where each puzzle's examples begin
    DIR/SPLIT/SET__group_indices.npy         [groups + 1]: where each group's puzzles begin

Groups, puzzles, identifiers and the order of examples are kept; the sets of a split are joined.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hrm_ray.config.validate import Settings, validated
from hrm_ray.data.format import Manifest, SplitInfo
from hrm_ray.data.tasks.base import Task, Tokens
from hrm_ray.data.tasks.sudoku import BOX_SHAPES, Sudoku
from hrm_ray.data.writer import DatasetWriter, balanced_cuts
from hrm_ray.errors import UserError

SPLITS = ("train", "test")
IDENTIFIERS = "identifiers.json"

_ROWS_PER_SHARD = 131_072
_ROWS_PER_READ = 65_536
_ROWS_TO_RECOGNISE = 1_000


class _About(Settings):
    """What dataset.json says of the data's meaning; the same in every split."""

    pad_id: int
    ignore_label_id: int | None
    blank_identifier_id: int
    vocab_size: int
    seq_len: int
    num_puzzle_identifiers: int


@dataclass
class _Set:
    """The arrays of one set, mapped from disk, and their check."""

    inputs: np.ndarray
    labels: np.ndarray
    puzzle_identifiers: np.ndarray
    puzzle_indices: np.ndarray
    group_indices: np.ndarray

    def check(self, where: str, about: _About) -> None:
        shape = (len(self.inputs), about.seq_len)
        for name in ("inputs", "labels"):
            if getattr(self, name).shape != shape:
                raise UserError(f"{where}__{name}.npy has shape {getattr(self, name).shape}, not {shape}")
        counts = {"puzzle_indices": shape[0], "group_indices": len(self.puzzle_identifiers)}
        for name, count in counts.items():
            starts = getattr(self, name)
            if len(starts) < 1 or starts[0] != 0 or starts[-1] != count or (np.diff(starts) <= 0).any():
                raise UserError(f"{where}__{name}.npy must rise from 0 to {count} without empty entries")
        if len(self.puzzle_indices) != len(self.puzzle_identifiers) + 1:
            raise UserError(f"{where}__puzzle_identifiers.npy and __puzzle_indices.npy differ in puzzles")

    def rows(self, where: str, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels of a range, uint8."""
        tokens = []
        for name in ("inputs", "labels"):
            values = getattr(self, name)[start:stop]
            if values.size and not 0 <= values.min() <= values.max() <= 255:
                raise UserError(f"{where}__{name}.npy has tokens outside 0..255")
            tokens.append(values.astype(np.uint8))
        return tokens[0], tokens[1]


def import_npy(source_dir: str | Path, out: str | Path, *, overwrite: bool = False) -> Manifest:
    """Convert a folder of the published layout into a dataset, verified.

    The task is recognised where it is Sudoku; any other data becomes task "tokens".

    Raises:
        UserError: a file is missing or does not fit the others, or `out` cannot be used.
    """
    folder = Path(source_dir)
    names = [name for name in SPLITS if (folder / name / "dataset.json").is_file()]
    if not names:
        raise UserError(f"{folder} has no train/dataset.json or test/dataset.json: not the published layout")
    read = {name: _read_split(folder / name) for name in names}
    about = read[names[0]][0]
    for name in names[1:]:
        if read[name][0] != about:
            raise UserError(f"{folder}: the dataset.json of {names[0]} and {name} describe different data")
    if about.vocab_size > 256:
        raise UserError(
            f"{folder}: a vocabulary of {about.vocab_size}, where at most 256 tokens are supported"
        )

    task = _recognise(about, next(iter(read[names[0]][1].values())))
    with DatasetWriter(out, overwrite=overwrite) as writer:
        splits = {name: _copy_split(writer, name, about, folder, sets) for name, (_, sets) in read.items()}
        extra = []
        if (folder / IDENTIFIERS).is_file():
            extra.append(writer.add_file(IDENTIFIERS, (folder / IDENTIFIERS).read_bytes()))
        manifest = Manifest(
            task=task.name,
            task_options=task.options,
            **about.model_dump(),
            seed=None,
            recipe={},
            source_digest=_digest(folder),
            report={"imported_sets": {name: list(sets) for name, (_, sets) in read.items()}},
            extra_files=tuple(extra),
            splits=splits,
        )
        writer.finish(manifest)
    return manifest


def _read_split(folder: Path) -> tuple[_About, dict[str, _Set]]:
    where = folder / "dataset.json"
    try:
        values = json.loads(where.read_text())
        sets = values["sets"]
        about = {key: value for key, value in values.items() if key in _About.model_fields}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{where} is damaged: not the JSON of a published data set") from None
    parsed = validated(_About, about, str(where))
    return parsed, {name: _open_set(folder, name, parsed) for name in sets}


def _open_set(folder: Path, name: str, about: _About) -> _Set:
    arrays = {}
    for field in _Set.__dataclass_fields__:
        file = folder / f"{name}__{field}.npy"
        try:
            arrays[field] = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read: {error}") from None
    opened = _Set(**arrays)
    opened.check(str(folder / name), about)
    return opened


def _recognise(about: _About, first: _Set) -> Task:
    """Sudoku if shape and vocabulary are its and the first answers are solutions; else we know nothing."""
    for size in BOX_SHAPES:
        task = Sudoku(size)
        if (task.vocab_size, task.seq_len, task.pad_id) == (about.vocab_size, about.seq_len, about.pad_id):
            head = slice(0, _ROWS_TO_RECOGNISE)
            if task.is_solution(first.inputs[head], first.labels[head]).all():
                return task
    return Tokens(about.vocab_size, about.seq_len)


def _copy_split(
    writer: DatasetWriter, name: str, about: _About, folder: Path, sets: dict[str, _Set]
) -> SplitInfo:
    rows_per_group = [np.diff(part.puzzle_indices[part.group_indices]) for part in sets.values()]
    cuts = balanced_cuts(np.concatenate(rows_per_group), _ROWS_PER_SHARD)
    split = writer.split(name, about.seq_len, cuts)
    first_puzzle = first_group = 0
    for set_name, part in sets.items():
        for start in range(0, len(part.inputs), _ROWS_PER_READ):
            stop = min(start + _ROWS_PER_READ, len(part.inputs))
            inputs, labels = part.rows(str(folder / name / set_name), start, stop)
            puzzles = np.searchsorted(part.puzzle_indices, np.arange(start, stop), side="right") - 1
            groups = np.searchsorted(part.group_indices, puzzles, side="right") - 1
            identifiers = part.puzzle_identifiers[puzzles].astype(np.int32)
            split.add(inputs, labels, identifiers, first_puzzle + puzzles, first_group + groups)
        first_puzzle += len(part.puzzle_indices) - 1
        first_group += len(part.group_indices) - 1
    return split.finish()


def _digest(folder: Path) -> str:
    total = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.suffix in (".npy", ".json"):
            with file.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
            total.update(f"{file.relative_to(folder)}:{digest}\n".encode())
    return total.hexdigest()
