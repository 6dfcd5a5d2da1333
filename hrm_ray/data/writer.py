"""Writing a dataset (see `format`) aside, in order, and moving it into place when it is whole.

What is deleted on the way is only what a build has written: a folder with any other file in it is refused.
"""

import fcntl
import hashlib
import os
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from hrm_ray.data.files import ComparingFile, HashingFile, delete_matching, write_durably, writing
from hrm_ray.data.format import (
    IDS,
    OUR_FILES,
    UNFINISHED,
    File,
    Manifest,
    Shard,
    SplitInfo,
    from_tokens,
    schema,
)
from hrm_ray.data.shards import read_manifest
from hrm_ray.data.tasks.base import Task
from hrm_ray.data.verify import verify, wrong_tokens
from hrm_ray.errors import UserError
from hrm_ray.manifest import MANIFEST

_NUM_THREADS = min(
    4, os.cpu_count() or 1
)  # that write shards: more than a disk can follow, and each holds one in memory

_Submit = Callable[[Callable[[], Shard]], Future[Shard]]


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
    """Collects the rows of a split, in order, into its shards. Made by `DatasetWriter.split`.

    Shards are written, checked and read back by threads, while the next is being collected.

    Args:
        root: the folder being built.
        name: of the split.
        task: what its rows are of.
        cuts: see `balanced_cuts`; the numbers are those given as `groups` to `add`.
        submit: has a function called by another thread, perhaps after waiting for an earlier one.
    """

    def __init__(self, root: Path, name: str, task: Task, cuts: np.ndarray, submit: _Submit):
        self._root, self._name, self._task = root, name, task
        self._cuts = cuts
        self._submit = submit
        self._pending: list[tuple[np.ndarray, ...]] = []
        self._shard = 0  # index into cuts of the shard being collected
        self._shards: list[Future[Shard]] = []
        self._num_examples = self._num_puzzles = self._num_groups = 0
        self._last = (-1, -1)  # puzzle and group as given, of the last row written
        with writing(root):
            (root / name).mkdir(parents=True)

    def add(
        self,
        inputs: np.ndarray,
        labels: np.ndarray,
        identifiers: np.ndarray,
        puzzles: np.ndarray,
        groups: np.ndarray,
        ratings: np.ndarray | None = None,
    ) -> None:
        """Append rows, which must not change until the split is finished.

        Args:
            inputs, labels: uint8[n, seq_len].
            identifiers: int32[n].
            puzzles, groups: int64[n], ascending from call to call; gaps close (files count up without any).
            ratings: int64[n], of all rows of the split, or None.

        Raises:
            UserError: a shard before could not be written, or its rows are not of the task.
        """
        start = 0
        while start < len(groups):
            stop = int(np.searchsorted(groups, self._cuts[self._shard + 1]))
            if stop > start:
                part = slice(start, stop)
                tokens = np.ascontiguousarray(inputs[part]), np.ascontiguousarray(labels[part])
                rated = [] if ratings is None else [ratings[part]]
                self._pending.append((*tokens, identifiers[part], puzzles[part], groups[part], *rated))
            if stop < len(groups):
                self._flush()
                self._shard += 1
            start = stop

    def _flush(self) -> None:
        if not self._pending:  # every row of these groups was dropped
            return
        inputs, labels, *ids = zip(*self._pending, strict=True)
        self._pending = []
        identifiers, puzzles, groups, *rated = map(np.concatenate, ids)
        starts_puzzle = np.diff(puzzles, prepend=self._last[0]) != 0
        starts_group = np.diff(groups, prepend=self._last[1]) != 0
        numbers = [
            pa.array(identifiers, pa.int32()),
            pa.array(self._num_puzzles - 1 + np.cumsum(starts_puzzle), pa.int32()),
            pa.array(self._num_groups - 1 + np.cumsum(starts_group), pa.int32()),
            *(pa.array(ratings, pa.int64()) for ratings in rated),
        ]
        self._last = (puzzles[-1], groups[-1])
        self._num_examples += len(puzzles)
        self._num_puzzles += int(starts_puzzle.sum())
        self._num_groups += int(starts_group.sum())
        file = f"{self._name}/shard-{len(self._shards):05d}.arrow"
        self._shards.append(
            self._submit(partial(_write_shard, self._root, file, self._task, inputs, labels, numbers))
        )

    def finish(self) -> SplitInfo:
        """Write what is left; returns the split's part of the manifest. Raises UserError as `add` does."""
        self._flush()
        return SplitInfo(
            num_examples=self._num_examples,
            num_puzzles=self._num_puzzles,
            num_groups=self._num_groups,
            mean_puzzle_examples=self._num_examples / max(1, self._num_puzzles),
            shards=tuple(shard.result() for shard in self._shards),
        )


def _write_shard(
    root: Path,
    file: str,
    task: Task,
    inputs: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    numbers: list[pa.Array],
) -> Shard:
    """Write one shard, then compare what is in the file with what was to be written.

    Args:
        inputs, labels: uint8 [some, seq_len] each, to be joined.
        numbers: the columns `format.IDS`, and that of ratings if there is one.
    """
    assert all(part.dtype == np.uint8 and part.shape[1:] == (task.seq_len,) for part in (*inputs, *labels))
    first_row = 0
    for parts in zip(inputs, labels, strict=True):
        for problem in wrong_tokens(task, *parts, first_row=first_row):
            raise UserError(
                f"{root / file} would be wrong, {problem}; mend the source, or what builds from it"
            )
        first_row += len(parts[0])
    # Columns whose memory is never touched: what is written in their place are the parts, which saves joining them.
    columns = [from_tokens(np.empty((first_row, task.seq_len), np.uint8)) for _ in (inputs, labels)]
    parts_of = {
        column.values.buffers()[1].address: parts
        for column, parts in zip(columns, (inputs, labels), strict=True)
    }
    batch = pa.record_batch(
        [*columns, *numbers], schema=schema(task.seq_len, is_rated=len(numbers) > len(IDS))
    )
    with writing(root):
        written = HashingFile(root / file)
        _put(batch, dict(parts_of), written)
        read = ComparingFile(root / file)
        _put(batch, dict(parts_of), read)
    if not read.is_same:
        raise UserError(f"{root / file} does not read back as it was written; check the disk")
    return Shard(file=file, rows=batch.num_rows, bytes=written.size, sha256=written.hexdigest())


def _put(
    batch: pa.RecordBatch, parts_of: dict[int, Sequence[np.ndarray]], file: HashingFile | ComparingFile
) -> None:
    """Write a batch as an Arrow file, and close it; see `_Joining`.

    Raises:
        UserError: not all parts could be put in their place.
    """
    sink = pa.PythonFile(_Joining(file, parts_of), mode="w")
    with sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    if parts_of:
        raise UserError(
            f"pyarrow {pa.__version__} copies columns before it writes them, so they cannot be joined on the way; "
            "install the version in constraints.txt"
        )


class _Joining:
    """Writes to a file; in place of a buffer that begins at some address, its parts, which leave `parts_of`."""

    def __init__(self, file: HashingFile | ComparingFile, parts_of: dict[int, Sequence[np.ndarray]]):
        self._file, self._parts_of = file, parts_of
        self.closed = False

    def write(self, data: bytes | pa.Buffer) -> None:
        parts = self._parts_of.pop(data.address, None) if isinstance(data, pa.Buffer) else None
        for part in [data] if parts is None else parts:
            self._file.write(part)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True
        self._file.close()


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
        self._is_finished = False
        self._threads = ThreadPoolExecutor(_NUM_THREADS)
        self._running: deque[Future[Shard]] = deque()

    def __enter__(self) -> "DatasetWriter":
        with writing(self.out):
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
        try:
            self._clear()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def _clear(self) -> None:
        """Delete what a killed process left of a build, and mark the folder as one of a build."""
        strange = strangers(self.root)
        if not strange and (self.root / MANIFEST).exists() and not (self.root / UNFINISHED).exists():
            strange = [MANIFEST]  # of a finished dataset that somebody gave this name
        if strange:
            raise UserError(
                f"{self.root}, where {self.out.name} is to be built, holds {strange[0]}, which no build left there; "
                "move it away, or pick another out"
            )
        with writing(self.out):
            delete_matching(self.root, OUR_FILES)
            (self.root / UNFINISHED).touch()

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)  # waits for those at work: they would go on writing
        if not self._is_finished:
            with suppress(OSError):
                delete_matching(self.root, OUR_FILES)
                self.root.rmdir()
        os.close(self._lock)

    def split(self, name: str, task: Task, cuts: np.ndarray) -> SplitWriter:
        """Begin a split; see `SplitWriter`."""
        return SplitWriter(self.root, name, task, cuts, self._submit)

    def _submit(self, write: Callable[[], Shard]) -> Future[Shard]:
        """At most as many shards as there are threads are in memory, and the one being collected."""
        if len(self._running) == _NUM_THREADS:
            self._running.popleft().result()
        self._running.append(future := self._threads.submit(write))
        return future

    def add_file(self, name: str, content: bytes) -> File:
        """Write a file that belongs to no split. Raises UserError for a name that later builds would not know again."""
        if not OUR_FILES.fullmatch(name):
            raise UserError(
                f"a data set holds no file {name}; its builder may add identifiers.json and test_puzzles.json"
            )
        with writing(self.out):
            write_durably(self.root / name, content)
        return File(file=name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

    def finish(self, manifest: Manifest) -> None:
        """Write the manifest, check all that was not checked when a shard was written, and move the folder into place.

        Raises:
            UserError: what is on the disk is not what was to be written.
        """
        with writing(self.out):
            write_durably(self.root / MANIFEST, manifest.render())
        if problems := verify(self.root, of_tokens=False):
            raise UserError(f"what was written does not read back: {problems[0]} ({len(problems)} problems)")
        writable_folder(self.out, overwrite=self._overwrite)  # somebody may have made it meanwhile
        with writing(self.out):
            (self.root / UNFINISHED).unlink()
            if self.out.exists():
                replaced = Path(tempfile.mkdtemp(prefix=f"{self.out.name}.replaced-", dir=self.out.parent))
                self.out.rename(replaced)  # over an empty folder
                self.root.rename(self.out)
                self._is_finished = True
                delete_matching(replaced, OUR_FILES)
                replaced.rmdir()
            else:
                self.root.rename(self.out)
                self._is_finished = True


def writable_folder(out: str | Path, *, overwrite: bool) -> Path:
    """`out` as a path where a dataset may be put.

    Raises:
        UserError: it is a URI, a file, a dataset without overwrite, or a folder with something else in it.
    """
    if "://" in str(out):
        raise UserError(f"out={out}: a dataset is written in a local folder; give its path")
    path = Path(out).resolve()
    if path.is_dir() and any(path.iterdir()):
        if not (path / MANIFEST).is_file():
            raise UserError(f"out={out} is a folder with other things in it; pick another out")
        if not overwrite:
            raise UserError(f"out={out} already holds another dataset; give another out=, or overwrite=true")
        if strange := _not_of_a_dataset(path):
            raise UserError(
                f"out={out} holds {strange}, which is not of a dataset; move it away, or pick another out"
            )
    elif path.exists() and not path.is_dir():
        raise UserError(f"out={out} is a file; pick another out")
    return path


def strangers(root: Path) -> list[str]:
    """What lies in a folder, however deep, that no build writes; relative paths."""

    def is_ours(path: Path, name: str) -> bool:
        if path.is_symlink():
            return False
        is_split = path.is_dir() and "/" not in name
        return is_split or (path.is_file() and OUR_FILES.fullmatch(name) is not None)

    paths = ((path, path.relative_to(root).as_posix()) for path in sorted(root.rglob("*")))
    return [name for path, name in paths if not is_ours(path, name)]


def _not_of_a_dataset(root: Path) -> str | None:
    """What there is in a folder with a manifest that would be lost if another dataset took its place; None: nothing."""
    if strange := strangers(root):
        return strange[0]
    try:
        splits = [*read_manifest(root).splits]
    except UserError:  # damaged, or of something else; shards tell
        splits = []
        if not any(root.glob("*/*.arrow")):
            return MANIFEST
    empty = (path.name for path in root.iterdir() if path.is_dir() and not any(path.iterdir()))
    return next((name for name in empty if name not in splits), None)
