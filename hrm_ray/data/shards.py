"""The dataset format: a folder of Arrow IPC files and the manifest that makes them valid.

    DIR/manifest.json            what the data is, and rows, bytes and SHA-256 of every shard; written last
    DIR/SPLIT/shard-NNNNN.arrow  one record batch; inputs, labels: fixed_size_list<uint8>[seq_len],
                                 puzzle_identifier, puzzle, group: int32

An example is a row. A puzzle is a run of rows with the same `puzzle`, a group a run of puzzles with the same
`group`; both count up from 0 through the split, and a shard begins and ends with whole groups. So `puzzle_starts`
and `group_starts` are the published layout's puzzle_indices and group_indices.

What always holds: a folder with a manifest is complete (`DatasetWriter` renames the finished folder into place),
equal data and recipe give equal bytes, the manifest's included, and no changed byte goes unnoticed: the manifest
carries its own digest and those of all files. Nothing here imports Ray.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from pyarrow import fs as pafs
from pydantic import field_validator

from hrm_ray.cache import cache_dir
from hrm_ray.config.validate import Settings, validated
from hrm_ray.data.tasks.base import Task, get_task
from hrm_ray.errors import UserError, first_line
from hrm_ray.manifest import MANIFEST, canonical, seal, unseal
from hrm_ray.remote import filesystem_of, reaching

FORMAT_VERSION = 1
IDS = ("puzzle_identifier", "puzzle", "group")


class File(Settings):
    """A file of the dataset; `file` is relative to its folder."""

    file: str
    bytes: int
    sha256: str

    @field_validator("file")
    @classmethod
    def _lies_inside(cls, file: str) -> str:
        """A manifest from elsewhere must not make us write into other folders."""
        if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            raise ValueError(f"file {file} lies outside the dataset's folder")
        return file


class Shard(File):
    """One file of a split."""

    rows: int


class SplitInfo(Settings):
    """Counts of a split, as in the published layout, and its files in order."""

    num_examples: int
    num_puzzles: int
    num_groups: int
    mean_puzzle_examples: float
    shards: tuple[Shard, ...]


class Manifest(Settings):
    """What `manifest.json` says.

    `recipe` is the whole recipe the data was built with (empty for imported data), `source_digest` the SHA-256 of
    what it was built from, `report` what the builder counted on the way (rows skipped, duplicates dropped, ...),
    `extra_files` what lies beside the splits (imported data: identifiers.json).
    """

    format_version: int = FORMAT_VERSION
    task: str
    task_options: dict[str, Any]
    vocab_size: int
    seq_len: int
    pad_id: int
    ignore_label_id: int | None
    blank_identifier_id: int
    num_puzzle_identifiers: int
    seed: int | None
    recipe: dict[str, Any]
    source_digest: str
    report: dict[str, Any]
    extra_files: tuple[File, ...] = ()
    splits: dict[str, SplitInfo]

    @property
    def files(self) -> list[File]:
        """All files but the manifest."""
        return [*self.extra_files, *(shard for info in self.splits.values() for shard in info.shards)]

    @property
    def fingerprint(self) -> str:
        """SHA-256, hex, of what training sees: the data and its meaning, not where it came from."""
        about = self.model_dump(exclude={"recipe", "source_digest", "report", "seed", "extra_files"})
        return hashlib.sha256(canonical(about)).hexdigest()

    def render(self) -> bytes:
        """The bytes of manifest.json."""
        return seal(self.model_dump(mode="json"))


def schema(seq_len: int) -> pa.Schema:
    """The columns of a shard."""
    tokens = pa.list_(pa.field("item", pa.uint8(), nullable=False), seq_len)
    return pa.schema(
        [pa.field(name, tokens, nullable=False) for name in ("inputs", "labels")]
        + [pa.field(name, pa.int32(), nullable=False) for name in IDS]
    )


def to_tokens(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """A fixed_size_list<uint8> column as uint8[n, seq_len], without copying if it is one chunk."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    # flatten() heeds the offset of a slice; .values would not.
    return column.flatten().to_numpy(zero_copy_only=True).reshape(-1, column.type.list_size)


def from_tokens(tokens: np.ndarray) -> pa.FixedSizeListArray:
    """uint8[n, seq_len] as a fixed_size_list<uint8> column; shares the memory if it is contiguous."""
    seq_len = tokens.shape[1]
    flat = pa.array(np.ascontiguousarray(tokens).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, type=schema(seq_len).field("inputs").type)


# Reading


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
        if damage := _damage(self._root, self.info.shards):
            raise UserError(f"{self._root}/{damage[0]}; {_mend(self._root)}")

    @cached_property
    def _shards(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        views = []
        for shard in self.info.shards:
            batch = _read_batch(self._root / shard.file, self._seq_len)
            if batch.num_rows != shard.rows:
                raise UserError(
                    f"{self._root / shard.file} has {batch.num_rows} rows, not {shard.rows}; {_mend(self._root)}"
                )
            tokens = [to_tokens(batch[name]) for name in ("inputs", "labels")]
            views.append((*tokens, *(batch[name].to_numpy() for name in IDS)))
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
        """The split called `name`; UserError naming those there are."""
        if name not in self.splits:
            raise UserError(f"{self.path} has no split '{name}'; it has: {', '.join(self.splits)}")
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
        if damage := _wrong_size(root, entry):
            raise UserError(f"{root}/{damage}; {_mend(root)}")
    return Dataset(path, root, manifest)


def _mend(path: Path) -> str:
    """What to do about a damaged file or folder `path`, for messages."""
    cache = cache_dir() / "datasets"
    if path.is_relative_to(cache) and path != cache:
        return f"delete {cache / path.relative_to(cache).parts[0]} to fetch it again"
    return "build the dataset again (overwrite=true)"


def read_manifest(root: Path) -> Manifest:
    """The manifest of a local dataset folder. Raises UserError as `open_dataset` does."""
    if not root.is_dir():
        raise UserError(
            f"no dataset folder {root}; build one with: hrm-ray data build recipe=NAME out={root}"
        )
    if not (root / MANIFEST).is_file():
        raise UserError(f"{root} has no {MANIFEST}: no dataset, or its build did not finish; build it again")
    return _parse_manifest((root / MANIFEST).read_bytes(), str(root / MANIFEST), _mend(root))


def _parse_manifest(content: bytes, where: str, mend: str) -> Manifest:
    values = unseal(content, where, newest_format=FORMAT_VERSION, mend=mend)
    if "splits" not in values:
        raise UserError(f"{where} is not of a dataset; give a dataset folder")
    return validated(Manifest, values, where)


def _read_batch(file: Path, seq_len: int) -> pa.RecordBatch:
    try:
        with pa.memory_map(str(file)) as source:
            reader = pa.ipc.open_file(source)
            if reader.schema != schema(seq_len) or reader.num_record_batches != 1:
                raise UserError(f"{file} is damaged: not one batch of the expected columns; {_mend(file)}")
            batch = reader.get_batch(0)
            batch.validate(full=True)
            return batch
    except (pa.ArrowException, OSError) as error:
        reason = first_line(error)
        raise UserError(f"{file} is damaged: no valid Arrow file ({reason}); {_mend(file)}") from None


# Remote folders


def local_root(path: str | Path) -> Path:
    """Where the dataset lies on this machine: `path` itself, or the cached copy of a URI.

    Raises:
        UserError: a URI of unknown scheme, unreachable, or without a dataset.
    """
    if "://" not in str(path):
        return Path(path)
    filesystem, inner = filesystem_of(str(path), f"cannot read dataset {path}")
    if isinstance(filesystem, pafs.LocalFileSystem):
        return Path(inner)
    return _cached(filesystem, inner.rstrip("/"), str(path))


def _cached(filesystem: pafs.FileSystem, folder: str, uri: str) -> Path:
    """Copy a remote dataset into the cache, once a node however many processes ask at the same time."""
    try:
        content = b"".join(_chunks(filesystem, f"{folder}/{MANIFEST}", uri))
    except FileNotFoundError:
        raise UserError(f"{uri} has no {MANIFEST}: no dataset, or its build did not finish") from None
    manifest = _parse_manifest(content, f"{uri}: {MANIFEST}", _COPY_AGAIN)
    # Named by content: a rebuilt dataset at the same address is another entry.
    target = cache_dir() / "datasets" / hashlib.sha256(content).hexdigest()[:32]
    with _writing(target, "set HRM_RAY_CACHE to another folder"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with (target.parent / f"{target.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_dir():
                aside = target.with_suffix(".partial")
                shutil.rmtree(aside, ignore_errors=True)
                for entry in manifest.files:
                    _fetch(filesystem, folder, entry, aside, uri)
                _write_durably(aside / MANIFEST, content)
                aside.rename(target)
    return target


_COPY_AGAIN = "copy the dataset there again"


def _fetch(filesystem: pafs.FileSystem, folder: str, entry: File, root: Path, uri: str) -> None:
    """Copy one file of the remote dataset `uri` to the folder `root`."""
    local = root / entry.file
    local.parent.mkdir(parents=True, exist_ok=True)
    try:
        with local.open("wb") as copy:
            copy.writelines(_chunks(filesystem, f"{folder}/{entry.file}", uri))
    except FileNotFoundError:
        raise UserError(f"{uri}: {entry.file} is missing; {_COPY_AGAIN}") from None
    if _sha256(local) != entry.sha256:
        raise UserError(f"{uri}: {entry.file} is damaged: its SHA-256 is not the manifest's; {_COPY_AGAIN}")


def _chunks(filesystem: pafs.FileSystem, path: str, uri: str) -> Iterator[bytes]:
    """The content of a file of the remote dataset `uri`. Raises FileNotFoundError, StorageError."""
    with reaching(uri, f"cannot read dataset {uri}"), filesystem.open_input_stream(path) as stream:
        while chunk := stream.read(1 << 22):
            yield chunk


# Writing


class _HashingFile:
    """A file that computes the SHA-256 of what is written to it."""

    def __init__(self, path: Path):
        self._file = path.open("wb")
        self._hash = hashlib.sha256()
        self.size = 0
        self.closed = False

    def write(self, data: Any) -> int:
        self._hash.update(data)
        self._file.write(data)
        size = memoryview(data).nbytes
        self.size += size
        return size

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        if not self.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self.closed = True

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write which is at `path` whole or not at all: written aside, flushed to disk, renamed at the end."""
    aside = path.with_name(path.name + ".tmp")
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _write_durably(path: Path, content: bytes) -> None:
    with whole_file(path) as file:
        file.write(content)


@contextmanager
def _writing(folder: Path, otherwise: str = "pick another out") -> Iterator[None]:
    """Turns what the disk says no to into a UserError that names `folder`."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UserError(f"cannot write to {folder}: {reason}; mend that, or {otherwise}") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def balanced_cuts(rows_per_group: np.ndarray, rows_per_shard: int) -> np.ndarray:
    """Where to cut groups into shards of nearly equal rows, none cutting a group.

    Args:
        rows_per_group: integers [num_groups].
        rows_per_shard: wished upper bound; exceeded by less than one group.

    Returns:
        int64[num_shards + 1], group numbers: shard k holds groups cuts[k]..cuts[k + 1]. No shard is empty.
    """
    ends = np.cumsum(rows_per_group, dtype=np.int64)
    if not len(ends):
        return np.zeros(1, np.int64)
    num_shards = max(1, -(-int(ends[-1]) // rows_per_shard))
    wished = ends[-1] * np.arange(1, num_shards, dtype=np.int64) // num_shards
    cuts = np.searchsorted(ends, wished) + 1
    return np.unique(np.concatenate([[0], np.minimum(cuts, len(ends)), [len(ends)]])).astype(np.int64)


class SplitWriter:
    """Collects the rows of a split, in order, into its shards; at most one shard is in memory.

    Args:
        root: the folder being built.
        name: of the split.
        cuts: see `balanced_cuts`; the numbers are those given as `groups` to `add`.
    """

    def __init__(self, root: Path, name: str, seq_len: int, cuts: np.ndarray):
        self._root, self._name, self._seq_len = root, name, seq_len
        self._cuts = cuts
        self._pending: list[tuple[np.ndarray, ...]] = []
        self._shard = 0  # index into cuts of the shard being collected
        self._shards: list[Shard] = []
        self._num_examples = self._num_puzzles = self._num_groups = 0
        self._last = (-1, -1)  # puzzle and group as given, of the last row written
        with _writing(root):
            (root / name).mkdir(parents=True)

    def add(
        self,
        inputs: np.ndarray,
        labels: np.ndarray,
        identifiers: np.ndarray,
        puzzles: np.ndarray,
        groups: np.ndarray,
    ) -> None:
        """Append rows.

        Args:
            inputs, labels: uint8[n, seq_len].
            identifiers: int32[n].
            puzzles, groups: int64[n], ascending from call to call; gaps close (files count up without any).
        """
        start = 0
        while start < len(groups):
            stop = int(np.searchsorted(groups, self._cuts[self._shard + 1]))
            if stop > start:
                part = slice(start, stop)
                self._pending.append(
                    (inputs[part], labels[part], identifiers[part], puzzles[part], groups[part])
                )
            if stop < len(groups):
                self._flush()
                self._shard += 1
            start = stop

    def _flush(self) -> None:
        if not self._pending:  # every row of these groups was dropped
            return
        inputs, labels, identifiers, puzzles, groups = map(np.concatenate, zip(*self._pending, strict=True))
        self._pending.clear()
        starts_puzzle = np.diff(puzzles, prepend=self._last[0]) != 0
        starts_group = np.diff(groups, prepend=self._last[1]) != 0
        columns = [
            from_tokens(inputs),
            from_tokens(labels),
            pa.array(identifiers, pa.int32()),
            pa.array(self._num_puzzles - 1 + np.cumsum(starts_puzzle), pa.int32()),
            pa.array(self._num_groups - 1 + np.cumsum(starts_group), pa.int32()),
        ]
        self._last = (puzzles[-1], groups[-1])
        self._num_examples += len(inputs)
        self._num_puzzles += int(starts_puzzle.sum())
        self._num_groups += int(starts_group.sum())

        file = f"{self._name}/shard-{len(self._shards):05d}.arrow"
        batch = pa.record_batch(columns, schema=schema(self._seq_len))
        with _writing(self._root):
            sink = _HashingFile(self._root / file)
            with pa.PythonFile(sink, mode="w") as out, pa.ipc.new_file(out, batch.schema) as writer:
                writer.write_batch(batch)
        self._shards.append(Shard(file=file, rows=len(inputs), bytes=sink.size, sha256=sink.hexdigest()))

    def finish(self) -> SplitInfo:
        """Write what is left; returns the split's part of the manifest."""
        self._flush()
        return SplitInfo(
            num_examples=self._num_examples,
            num_puzzles=self._num_puzzles,
            num_groups=self._num_groups,
            mean_puzzle_examples=self._num_examples / max(1, self._num_puzzles),
            shards=tuple(self._shards),
        )


class DatasetWriter:
    """Builds a dataset aside, in OUT.building, and renames it to OUT when it is whole.

    A context manager: left with an error, or without `finish`, it removes what it wrote. What a killed process
    left behind is removed by the next build of the same OUT.

    Raises:
        UserError: OUT exists and may not be replaced, cannot be written, or another process is building it.
    """

    def __init__(self, out: str | Path, *, overwrite: bool = False):
        self.out = writable_folder(out, overwrite=overwrite)
        self.root = self.out.with_name(self.out.name + ".building")
        self._overwrite = overwrite

    def __enter__(self) -> "DatasetWriter":
        with _writing(self.out):
            self.root.mkdir(parents=True, exist_ok=True)
        # Dies with the process, unlike a file that says "in use".
        self._lock = os.open(self.root, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise UserError(
                f"another process is building {self.out}; wait for it, or pick another out"
            ) from None
        for leftover in self.root.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.root, ignore_errors=True)  # nothing there after `finish`
        os.close(self._lock)

    def split(self, name: str, seq_len: int, cuts: np.ndarray) -> SplitWriter:
        """Begin a split."""
        return SplitWriter(self.root, name, seq_len, cuts)

    def add_file(self, name: str, content: bytes) -> File:
        """Write a file that belongs to no split."""
        with _writing(self.out):
            _write_durably(self.root / name, content)
        return File(file=name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

    def finish(self, manifest: Manifest) -> None:
        """Write the manifest, read everything back, and move the folder into place.

        Raises:
            UserError: what is on the disk is not what was written.
        """
        with _writing(self.out):
            _write_durably(self.root / MANIFEST, manifest.render())
        if problems := verify(self.root):
            raise UserError(f"what was written does not read back: {problems[0]} ({len(problems)} problems)")
        writable_folder(self.out, overwrite=self._overwrite)  # somebody may have made it meanwhile
        with _writing(self.out):
            if self.out.exists():
                replaced = self.out.with_name(self.out.name + ".replaced")
                shutil.rmtree(replaced, ignore_errors=True)
                self.out.rename(replaced)
                self.root.rename(self.out)
                shutil.rmtree(replaced)
            else:
                self.root.rename(self.out)


def writable_folder(out: str | Path, *, overwrite: bool) -> Path:
    """`out` as a path where a dataset may be put.

    Raises:
        UserError: it is a URI, a file, a dataset without overwrite, or a folder of something else.
    """
    if "://" in str(out):
        raise UserError(f"out={out}: datasets are built in a local folder; build there and copy the folder")
    path = Path(out).resolve()
    if path.is_dir() and any(path.iterdir()):
        if not (path / MANIFEST).is_file():
            raise UserError(f"out={out} is a folder with other things in it; pick another out")
        if not overwrite:
            raise UserError(
                f"out={out} holds another dataset already; pick another out, or pass overwrite=true"
            )
    elif path.exists() and not path.is_dir():
        raise UserError(f"out={out} is a file; pick another out")
    return path


# Verifying


def verify(path: str | Path) -> list[str]:
    """Check every byte and every rule of a dataset. Returns the problems found, each naming its file; none is good.

    Raises:
        UserError: there is no dataset to check.
    """
    root = local_root(path)
    try:
        manifest = read_manifest(root)
        task = get_task(manifest.task, **manifest.task_options)
    except UserError as error:
        if not (root / MANIFEST).is_file():
            raise
        return [f"{MANIFEST}: {error}"]
    problems = []
    if (task.vocab_size, task.seq_len) != (manifest.vocab_size, manifest.seq_len):
        problems.append(f"{MANIFEST}: vocab_size or seq_len does not fit task {manifest.task}")
    known = {MANIFEST} | {entry.file for entry in manifest.files}
    there = {str(file.relative_to(root)) for file in root.rglob("*") if not file.is_dir()}
    problems += [f"{file}: not in the manifest" for file in sorted(there - known)]
    damaged = _damage(root, manifest.files)
    if damaged:  # a file that is not what was written is not worth parsing, nor safe to
        return problems + damaged
    for name, info in manifest.splits.items():
        problems += _verify_split(root, name, info, manifest, task)
    return problems


def _damage(root: Path, files: Sequence[File]) -> list[str]:
    """What is wrong with the bytes of `files`, a line each, beginning with the file's name in `root`."""

    def check(entry: File) -> str | None:
        problem = _wrong_size(root, entry)
        if problem is None and _sha256(root / entry.file) != entry.sha256:
            problem = f"{entry.file} is damaged: its SHA-256 is not the manifest's"
        return problem

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the GIL
        return [problem for problem in pool.map(check, files) if problem]


def _wrong_size(root: Path, entry: File) -> str | None:
    file = root / entry.file
    if not file.is_file():
        return f"{entry.file} is missing"
    if (size := file.stat().st_size) != entry.bytes:
        return f"{entry.file} is damaged: {size} bytes, not {entry.bytes}"
    return None


def _verify_split(root: Path, name: str, info: SplitInfo, manifest: Manifest, task: Task) -> Iterator[str]:
    num_examples, last = 0, {"puzzle": -1, "group": -1}
    for shard in info.shards:
        try:
            batch = _read_batch(root / shard.file, manifest.seq_len)
        except UserError as error:
            yield f"{shard.file}: {str(error).removeprefix(f'{root / shard.file} ')}"
            continue
        if batch.num_rows != shard.rows:
            yield f"{shard.file}: {batch.num_rows} rows, where the manifest says {shard.rows}"
        if any(column.null_count for column in batch.columns):
            yield f"{shard.file}: has empty values"
            continue
        num_examples += batch.num_rows
        for problem in _verify_batch(batch, manifest, task, last):
            yield f"{shard.file}: {problem}"
    if num_examples != info.num_examples:
        yield f"{name}: {num_examples} examples, where the manifest says {info.num_examples}"
    for kind, count in (("puzzle", info.num_puzzles), ("group", info.num_groups)):
        if last[kind] + 1 != count:
            yield f"{name}: {last[kind] + 1} {kind}s, where the manifest says {count}"


def _verify_batch(
    batch: pa.RecordBatch, manifest: Manifest, task: Task, last: dict[str, int]
) -> Iterator[str]:
    """The rules inside a shard. `last` carries the last puzzle and group from shard to shard."""
    inputs, labels = to_tokens(batch["inputs"]), to_tokens(batch["labels"])
    if not len(inputs):
        return
    for column, tokens in (("inputs", inputs), ("labels", labels)):
        if tokens.max() >= manifest.vocab_size:
            row = int(np.flatnonzero((tokens >= manifest.vocab_size).any(axis=1))[0])
            yield f"row {row}: {column} has token {tokens[row].max()}, outside the vocabulary of {manifest.vocab_size}"
    identifiers = batch["puzzle_identifier"].to_numpy()
    if identifiers.min() < 0 or identifiers.max() >= manifest.num_puzzle_identifiers:
        yield f"a puzzle identifier is outside 0..{manifest.num_puzzle_identifiers - 1}"
    steps = {}
    for kind in ("puzzle", "group"):
        values = batch[kind].to_numpy()
        steps[kind] = np.diff(values, prepend=last[kind])
        if ((steps[kind] < 0) | (steps[kind] > 1)).any():
            yield f"{kind} does not count up by ones"
        last[kind] = int(values[-1])
    if steps["group"][0] != 1:
        yield "does not begin with a new group"
    if (steps["group"] > steps["puzzle"]).any():
        yield "a puzzle lies in two groups"
    if ((np.diff(identifiers) != 0) & (steps["puzzle"][1:] == 0)).any():
        yield "a puzzle has two identifiers"
    if task.checkable and not (solved := task.is_solution(inputs, labels)).all():
        yield f"row {int(np.flatnonzero(~solved)[0])}: the answer does not solve its question"
