"""Reading a dataset (see `format`): its rows, by number, from memory-mapped shards."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hrm_ray.cache import cache_dir
from hrm_ray.data.fetch import local_root
from hrm_ray.data.files import sha256
from hrm_ray.data.format import IDS, RATING, File, Manifest, SplitInfo, parse_manifest, schema, to_tokens
from hrm_ray.data.tasks.base import Task, get_task
from hrm_ray.errors import UserError, first_line
from hrm_ray.manifest import MANIFEST
from hrm_ray.published import checkpoint_hint, dataset_hint


class Split:
    """One split of a dataset, read from memory-mapped files.

    Attributes:
        name, info: as in the manifest.
        num_examples, num_puzzles, num_groups: counts.
    """

    def __init__(self, root: Path, name: str, info: SplitInfo, seq_len: int):
        self.name = name
        self.info = info
        self.num_examples = info.num_examples
        self.num_puzzles = info.num_puzzles
        self.num_groups = info.num_groups
        self._root = root
        self._seq_len = seq_len
        self._shard_starts = np.concatenate([[0], np.cumsum([shard.rows for shard in info.shards])]).astype(
            np.int64
        )

    def check_files(self) -> None:
        """Compare the size and SHA-256 of every file with the manifest's; reads them all, about a second a GB.

        Raises:
            UserError: names the first file that is not as it was built.
        """
        if damage := damages(self._root, self.info.shards):
            raise UserError(f"{self._root}/{damage[0]}; {_mend(self._root)}")

    @cached_property
    def _shards(self) -> list[tuple[np.ndarray, ...]]:
        views = []
        for shard in self.info.shards:
            batch = read_batch(self._root / shard.file, self._seq_len)
            if batch.num_rows != shard.rows:
                raise UserError(
                    f"{self._root / shard.file} has {batch.num_rows} rows, not {shard.rows}; {_mend(self._root)}"
                )
            tokens = [to_tokens(batch[name]) for name in ("inputs", "labels")]
            numbers = (batch[name].to_numpy() for name in (*IDS, RATING) if name in batch.schema.names)
            views.append((*tokens, *numbers))
        return views

    def _column(self, index: int) -> np.ndarray:
        return np.concatenate([shard[index] for shard in self._shards] or [np.empty(0, np.int32)])

    @cached_property
    def puzzle_starts(self) -> np.ndarray:
        """int64[num_puzzles + 1]: puzzle p owns examples puzzle_starts[p]..puzzle_starts[p + 1]."""
        return _starts(self._column(3))

    @cached_property
    def group_starts(self) -> np.ndarray:
        """int64[num_groups + 1]: group g owns puzzles group_starts[g]..group_starts[g + 1]."""
        return _starts(self._column(4)[self.puzzle_starts[:-1]])

    @cached_property
    def ratings(self) -> np.ndarray | None:
        """int64[num_groups]: how hard the puzzles of each group are, the higher the harder; None: nobody rated them."""
        if any(len(shard) == 5 for shard in self._shards):
            return None
        return self._column(5)[self.puzzle_starts[self.group_starts[:-1]]]

    def rows(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """The examples `ids` (integers [n], any order, repeats allowed), copied out of the mapped files.

        Returns:
            inputs and labels uint8[n, seq_len], puzzle_identifiers int32[n].

        Raises:
            IndexError: an id outside 0..num_examples-1.
        """
        ids = np.asarray(ids, np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= self.num_examples):
            raise IndexError(f"example ids must lie in 0..{self.num_examples - 1}")
        shard_of = np.searchsorted(self._shard_starts, ids, side="right") - 1
        out: dict[str, np.ndarray] = {
            "inputs": np.empty((len(ids), self._seq_len), np.uint8),
            "labels": np.empty((len(ids), self._seq_len), np.uint8),
            "puzzle_identifiers": np.empty(len(ids), np.int32),
        }
        for shard in np.unique(shard_of):
            here = np.flatnonzero(shard_of == shard)
            local = ids[here] - self._shard_starts[shard]
            for target, source in zip(out.values(), self._shards[shard], strict=False):
                target[here] = source[local]
        return out


def _starts(column: np.ndarray) -> np.ndarray:
    """Where each run of equal values begins, and the end; int64[runs + 1]."""
    if not len(column):
        return np.zeros(1, np.int64)
    return np.concatenate([[0], np.flatnonzero(np.diff(column)) + 1, [len(column)]]).astype(np.int64)


class Dataset:
    """A finished dataset; made by `open_dataset`. Pickles as its path, so it can be sent to Ray workers.

    Attributes:
        path: what was opened; root: where it lies on this machine.
        manifest: its Manifest. fingerprint: see Manifest.fingerprint. task: its Task.
        splits: name -> Split.
    """

    def __init__(self, path: str | Path, root: Path, manifest: Manifest):
        self.path = path
        self.root = root
        self.manifest = manifest
        self.fingerprint = manifest.fingerprint
        self.task: Task = get_task(manifest.task, **manifest.task_options)
        self.splits = {
            name: Split(root, name, info, manifest.seq_len) for name, info in manifest.splits.items()
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return open_dataset, (self.path,)

    def split(self, name: str) -> Split:
        """The split called `name`. Raises UserError if there is none, naming those there are, or it is empty."""
        if name not in self.splits:
            raise UserError(f"{self.path} has no split '{name}'; it has: {', '.join(self.splits)}")
        if not self.splits[name].num_examples:
            raise UserError(f"{self.path}: split '{name}' holds no examples; build the data set again")
        return self.splits[name]


def open_dataset(path: str | Path) -> Dataset:
    """Open a dataset folder, local or of any pyarrow filesystem (s3://, gs://, ...; cached once a node).

    Checks the manifest and the sizes of all files, not their content (see `Split.check_files` and `verify`).

    Raises:
        UserError: no such folder, no manifest, a newer format, a missing or truncated shard.
    """
    root = local_root(path)
    manifest = read_manifest(root)
    for entry in manifest.files:
        if damage := wrong_size(root, entry):
            raise UserError(f"{root}/{damage}; {_mend(root)}")
    return Dataset(path, root, manifest)


def read_manifest(root: Path) -> Manifest:
    """The manifest of a local dataset folder. Raises UserError as `open_dataset` does."""
    if not root.is_dir():
        raise UserError(
            f"no dataset folder {root}; build one with: hrm-ray data build recipe=NAME out={root}"
        )
    if not (root / MANIFEST).is_file():
        if hint := dataset_hint(root) or checkpoint_hint(root):
            raise UserError(hint)
        raise UserError(f"{root} has no {MANIFEST}: no dataset, or its build did not finish; build it again")
    return parse_manifest((root / MANIFEST).read_bytes(), str(root / MANIFEST), _mend(root))


def read_batch(file: Path, seq_len: int) -> pa.RecordBatch:
    """The one batch of a shard, memory-mapped. Raises UserError: it is not that."""
    try:
        with pa.memory_map(str(file)) as source:
            reader = pa.ipc.open_file(source)
            known = schema(seq_len), schema(seq_len, is_rated=True)
            if reader.schema not in known or reader.num_record_batches != 1:
                raise UserError(f"{file} is damaged: not one batch of the expected columns; {_mend(file)}")
            batch = reader.get_batch(0)
            batch.validate(full=True)
            return batch
    except (pa.ArrowException, OSError) as error:
        reason = first_line(error)
        raise UserError(f"{file} is damaged: no valid Arrow file ({reason}); {_mend(file)}") from None


def damages(root: Path, files: Sequence[File]) -> list[str]:
    """What is wrong with the bytes of `files`, a line each, beginning with the file's name in `root`."""

    def check(entry: File) -> str | None:
        problem = wrong_size(root, entry)
        if problem is None and sha256(root / entry.file) != entry.sha256:
            problem = f"{entry.file} is damaged: its SHA-256 is not the manifest's"
        return problem

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the GIL
        return [problem for problem in pool.map(check, files) if problem]


def wrong_size(root: Path, entry: File) -> str | None:
    """What is wrong with a file without reading it, beginning with its name in `root`; None: nothing."""
    file = root / entry.file
    if not file.is_file():
        return f"{entry.file} is missing"
    if (size := file.stat().st_size) != entry.bytes:
        return f"{entry.file} is damaged: {size} bytes, not {entry.bytes}"
    return None


def _mend(path: Path) -> str:
    """What to do about a damaged file or folder `path`, for messages."""
    cache = cache_dir() / "datasets"
    if path.is_relative_to(cache) and path != cache:
        return f"delete {cache / path.relative_to(cache).parts[0]} to fetch it again"
    return "build the dataset again (overwrite=true)"
