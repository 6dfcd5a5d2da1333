"""Checkpoints written while training goes on.

`start` copies the state, which training waits for, and leaves the writing to a thread. The checkpoint becomes valid
in `finish`, which the loop calls after the step at which every worker has written its part; until then the one
before is the newest. One checkpoint is written at a time.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from hrm_ray.errors import RunFailed, first_line
from hrm_ray.training.checkpoint import (
    FOLDER,
    SAVED,
    FileInfo,
    Manifest,
    Tensors,
    discard,
    prune,
    step_name,
    write_manifest,
    write_tensors,
)
from hrm_ray.training.storage import Storage
from hrm_ray.training.world import World

SPARE_BYTES = 64 * 2**20  # to leave on the disk, for records and whatever else writes there


@dataclass(frozen=True)
class Snapshot:
    """A copy of the state: `files` maps this worker's file names to tensors on the CPU, `manifest` lacks them."""

    manifest: Manifest
    files: dict[str, Tensors]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensors in self.files.values() for tensor in tensors.values())


class Saver:
    """One worker's part in writing the checkpoints of a run.

    Args:
        run: the run's folder.
        world: this worker's place.
        keep_last, keep_best: see `prune`.
    """

    def __init__(self, run: Storage, world: World, *, keep_last: int, keep_best: int):
        self._run, self._world = run, world
        self._keep_last, self._keep_best = keep_last, keep_best
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._manifest: Manifest | None = None
        self._writing: Future[list[tuple[str, FileInfo]]] | None = None

    @property
    def is_pending(self) -> bool:
        """Whether a checkpoint is started and not finished; the same on every worker."""
        return self._writing is not None

    @property
    def is_writing(self) -> bool:
        """Whether this worker still writes its part."""
        return self._writing is not None and not self._writing.done()

    def start(self, snapshot: Snapshot) -> None:
        """Begin to write a checkpoint. Collective; none may be pending.

        Raises:
            RunFailed: the disk of a worker has no room for it.
        """
        assert not self.is_pending
        name = step_name(snapshot.manifest.global_step)
        if self._world.is_first and name in (self._run / FOLDER).folders():
            discard(self._run / FOLDER / name)  # left by an attempt that was cut short, or damaged
        # Also the barrier that lets nobody write before the old folder is gone.
        shortages = [text for text in self._world.gather_objects(self._shortage(snapshot)) if text]
        if shortages:
            raise RunFailed(f"{shortages[0]}; {_GO_ON}")
        self._manifest = snapshot.manifest
        self._writing = self._pool.submit(_write, self._run / FOLDER / name, snapshot.files)

    def finish(self, before_valid: Callable[[], object] = lambda: None) -> None:
        """Wait for the pending checkpoint, if any, and make it valid. Collective.

        Args:
            before_valid: called on the first worker when all parts are written.

        Raises:
            RunFailed: a worker could not write its part; the checkpoint before is still there.
        """
        if self._writing is None:
            return
        outcomes = self._world.gather_objects(_outcome(self._writing))
        manifest, self._writing, self._manifest = self._manifest, None, None
        assert manifest is not None
        folder = self._run / FOLDER / step_name(manifest.global_step)
        failures = [outcome for outcome in outcomes if isinstance(outcome, str)]
        if failures:
            if self._world.is_first:
                with suppress(OSError):  # what made the writing fail may last
                    discard(folder)
            raise RunFailed(f"{folder} cannot be written ({failures[0]}); {_GO_ON}")
        if self._world.is_first:
            before_valid()
            files = dict(entry for entries in outcomes for entry in entries)
            write_manifest(folder, manifest.model_copy(update={"files": files}))
            if self._run.read(f"{FOLDER}/{SAVED}") is None:
                self._run.write(f"{FOLDER}/{SAVED}", b"")
            self.prune(manifest.global_step)
        self._world.from_first(None)  # nobody goes on before the checkpoint is valid

    def prune(self, global_step: int) -> None:
        """Delete what is not to be kept; for the first worker, when none is pending.

        Args:
            global_step: of the newest whole checkpoint.
        """
        prune(self._run, global_step, keep_last=self._keep_last, keep_best=self._keep_best)

    def close(self) -> None:
        """Wait for what is being written, without making it valid."""
        self._pool.shutdown()

    def _shortage(self, snapshot: Snapshot) -> str | None:
        free, needed = self._run.free_bytes, snapshot.num_bytes + SPARE_BYTES
        if free is None or free >= needed:
            return None
        return f"{self._run} has {free / 1e9:.2f} GB free, a checkpoint needs {needed / 1e9:.2f} GB"


_GO_ON = "make room, and the same command goes on from the last checkpoint"


def _write(folder: Storage, files: dict[str, Tensors]) -> list[tuple[str, FileInfo]]:
    return [write_tensors(folder, name, tensors) for name, tensors in files.items()]


def _outcome(writing: Future[list[tuple[str, FileInfo]]]) -> list[tuple[str, FileInfo]] | str:
    try:
        return writing.result()
    except OSError as error:
        return first_line(error)
