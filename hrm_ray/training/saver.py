"""Checkpoints written while training goes on.

Training waits while the state is copied (`TrainState.snapshot`); `start` leaves the writing to a thread. The checkpoint
becomes valid in `finish`, which the loop calls after the step at which every worker has written its part; until then
the one before is the newest. One checkpoint is written at a time.
"""

import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass

from hrm_ray.errors import RunFailed, UserError, first_line
from hrm_ray.remote import StorageError
from hrm_ray.storage.storage import Storage, is_full
from hrm_ray.training.checkpoint import (
    FOLDER,
    SAVED,
    FileInfo,
    Manifest,
    Tensors,
    discard,
    finished,
    make_place,
    prune,
    run_id_of,
    step_name,
    write_manifest,
    write_tensors,
)
from hrm_ray.world import World

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
        on_wait: called now and then while `finish` waits for the writing.
        on_event: called with the name of an event and a message for what was in the way of a checkpoint.

    Attributes:
        generation: to be written into the manifests.
    """

    def __init__(
        self,
        run: Storage,
        world: World,
        *,
        keep_last: int,
        keep_best: int,
        on_wait: Callable[[], object] = lambda: None,
        on_event: Callable[[str, str], object] = lambda event, what: None,
    ):
        self._run, self._world, self._on_wait, self._on_event = run, world, on_wait, on_event
        self._keep_last, self._keep_best = keep_last, keep_best
        self.generation = 0
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
        if self._world.is_first and (moved := make_place(self._run / FOLDER, name)):
            self._on_event("set_aside", moved)
        # Also the barrier that lets nobody write before the old folder is gone.
        shortages = [text for text in self._world.gather_objects(self._shortage(snapshot)) if text]
        if shortages:
            raise RunFailed(f"{shortages[0]}; make room, and {_GO_ON}")
        self._manifest = snapshot.manifest
        self._writing = self._pool.submit(_write, self._run / FOLDER / name, snapshot.files)

    def finish(self, before_valid: Callable[[], object] = lambda: None) -> None:
        """Wait for the pending checkpoint, if any, and make it valid. Collective.

        Args:
            before_valid: called on the first worker when all parts are written.

        Raises:
            RunFailed: a worker could not write its part, or writes where the others do not see it.
            StorageError: a remote storage did not answer. In both cases the checkpoint before is still there.
        """
        if self._writing is None:
            return
        while not wait([self._writing], timeout=1).done:
            self._on_wait()
        outcomes = self._world.gather_objects(_outcome(self._writing))
        manifest, self._writing, self._manifest = self._manifest, None, None
        assert manifest is not None
        folder = self._run / FOLDER / step_name(manifest.global_step)
        problems = [outcome for outcome in outcomes if isinstance(outcome, UserError)]
        files = dict(entry for entries in outcomes if isinstance(entries, list) for entry in entries)
        problems += self._world.from_first(
            _unseen(folder, files) if self._world.is_first and not problems else []
        )
        if problems:
            if self._world.is_first:
                with suppress(OSError):  # what made the writing fail may last
                    discard(self._run / FOLDER, folder.name)
            raise problems[0]
        if self._world.is_first:
            before_valid()
            noted = run_id_of(self._run / FOLDER)
            earlier = [] if noted else [c.manifest.run_id for c in finished(self._run) if c.manifest.run_id]
            run_id = noted or (earlier or [uuid.uuid4().hex])[-1]
            about = {"files": files, "run_id": run_id, "generation": self.generation}
            write_manifest(folder, manifest.model_copy(update=about))
            if not noted and (self._run / FOLDER).entries().get(SAVED, "file") == "file":
                self._run.write(f"{FOLDER}/{SAVED}", run_id.encode())
            self.prune(manifest.global_step)
        self._world.from_first(None)  # no worker continues before the checkpoint is valid

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
        self._run.create()
        free, needed = self._run.free_bytes, snapshot.num_bytes + SPARE_BYTES
        if free is None or free >= needed:
            return None
        return f"{self._run} has {free / 1e9:.2f} GB free, a checkpoint needs {needed / 1e9:.2f} GB"


_GO_ON = "the same command continues from the last checkpoint"


def _write(folder: Storage, files: dict[str, Tensors]) -> list[tuple[str, FileInfo]]:
    return [write_tensors(folder, name, tensors) for name, tensors in files.items()]


def _outcome(writing: Future[list[tuple[str, FileInfo]]]) -> list[tuple[str, FileInfo]] | UserError:
    try:
        return writing.result()
    except StorageError as error:
        return error
    except OSError as error:
        mend = "free some space" if is_full(error) else "fix it"
        return RunFailed(f"a checkpoint cannot be written ({first_line(error)}); {mend}, and {_GO_ON}")


def _unseen(folder: Storage, files: dict[str, FileInfo]) -> list[UserError]:
    """What is wrong if not all of the workers' `files` are in `folder`, as this worker sees it."""
    sizes = folder.sizes()
    lost = [name for name, info in files.items() if sizes.get(name) != info.bytes]
    if not lost:
        return []
    return [
        RunFailed(
            f"{folder}/{lost[0]}, written by another worker, is not there: the nodes do not share that folder; "
            "use storage=FOLDER on a filesystem that they share, or a URI (s3://, gs://)"
        )
    ]
