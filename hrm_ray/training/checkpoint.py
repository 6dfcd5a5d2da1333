"""The checkpoint format: a folder of safetensors files and the manifest that makes it valid.

    RUN/checkpoints/step-00000100/
        model.safetensors                     weights and buffers, under their published names
        ema.safetensors                       averaged weights, if the run keeps them
        optimizer.safetensors                 first and second moments
        target.safetensors                    the Q head's slow copy, if halting is learned by Q-learning
        carry-00000-of-00002.safetensors      one worker's hidden states, puzzles, replay memory, and
                                              sums not yet reported
        manifest.json                         what it is; sizes and SHA-256 of the files and of itself; written last

        ../saved                              that the run has had a whole checkpoint at all; its identity

Weights alone (an imported model) make a checkpoint too: one to evaluate, not to resume. Every file is verified
before it is used, and nothing is ever unpickled. What is damaged is passed over for the checkpoint before it; a run
whose checkpoints are all damaged is not started over.

A checkpoint belongs to the run if its folder is named after the step in its manifest, and the manifest has the run's
identity. Anything else in that place (a copy under another name, another run's, notes) is a user's: the run does not go
on from it, and does not delete it. A deletion takes single files that we wrote, never a folder with what is in it.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from hrm_ray.config.arch import DEFAULT_ARCH, Arch, arch_class
from hrm_ray.config.validate import Settings, validated
from hrm_ray.data.tasks.base import get_task
from hrm_ray.errors import UserError, first_line
from hrm_ray.manifest import MANIFEST, Damaged, seal, unseal
from hrm_ray.published import checkpoint_hint
from hrm_ray.remote import StorageError
from hrm_ray.storage.storage import ASIDE, Storage
from hrm_ray.training import tensor_file
from hrm_ray.training.tensor_file import Piece, Tensors

FORMAT_VERSION = 1
FOLDER = "checkpoints"
SAVED = "saved"
MODEL_FILE, EMA_FILE = "model.safetensors", "ema.safetensors"
BEST_METRIC = "eval/exact_accuracy"  # unless the run says otherwise
# The files of the format; what `Storage.write` left of one belongs to it.
OUR_FILES = re.compile(
    r"(manifest\.json|(?:model|ema|optimizer|target|carry-[0-9]{5,}-of-[0-9]{5,})\.safetensors)"
    + f"(?:{ASIDE})?"
)


class NoCheckpoint(UserError):
    """A folder whose manifest is of something else."""


class FileInfo(Settings):
    """Size and SHA-256 of one file."""

    bytes: int
    sha256: str


class DatasetInfo(Settings):
    """What a model has to know of the data it was trained on."""

    task: str
    task_options: dict[str, Any]
    vocab_size: int
    seq_len: int
    num_puzzle_identifiers: int
    fingerprint: str | None = None  # None: unknown, for an imported model
    identifiers: str | None = (
        None  # SHA-256 of identifiers.json, which names the puzzle identifiers, if there is one
    )

    def coordinates(self) -> np.ndarray | None:
        """Where the cells lie, see `Task.coordinates`. Raises UserError: the task is not there."""
        return get_task(self.task, **self.task_options).coordinates()

    def answer_cells(self) -> int | None:
        """The last so many cells have all labels, see `Task.answer_cells`. Raises UserError: the task is not there."""
        return get_task(self.task, **self.task_options).answer_cells


class Manifest(Settings):
    """What `manifest.json` says; `config` is the run's whole configuration."""

    kind: Literal["checkpoint"] = "checkpoint"
    format_version: int = FORMAT_VERSION
    global_step: int = Field(ge=0)
    world_size: int = 0  # workers whose carries are in it; 0: weights only
    arch: Arch
    dataset: DatasetInfo
    config: dict[str, Any]
    # Of the evaluation at this step, added after it; empty if there was none.
    metrics: dict[str, float] = Field(default_factory=dict)
    train_s: float = 0.0  # seconds trained so far
    unreported_steps: int = 0  # steps whose metrics are in the carries' sums
    skipped_steps: list[int] = Field(default_factory=list)  # left out after a loss that was not finite
    num_rollbacks: int = 0
    run_id: str | None = None  # of the run that wrote it, a random text; None: of any
    generation: int = 0  # of the process that wrote it, among those that held the run's lease; see `lock`
    files: dict[str, FileInfo]


class Tally:
    """Counts and hashes the bytes of a file that pass."""

    def __init__(self) -> None:
        self._num_bytes, self._sha256 = 0, hashlib.sha256()

    def add(self, piece: Piece) -> Piece:
        """Take the next bytes; returns them."""
        self._num_bytes += len(piece)
        self._sha256.update(piece)
        return piece

    @property
    def info(self) -> FileInfo:
        """What there was so far."""
        return FileInfo(bytes=self._num_bytes, sha256=self._sha256.hexdigest())


class Tallied:
    """A stream whose bytes are counted and hashed while they are read."""

    def __init__(self, stream: tensor_file.Stream):
        self._stream, self._tally = stream, Tally()

    def readinto(self, memory: memoryview) -> int:
        size = self._stream.readinto(memory)
        self._tally.add(memory[:size])
        return size

    def finish(self) -> FileInfo:
        """What the whole file is, after reading it to its end."""
        memory = memoryview(bytearray(tensor_file.PIECE_BYTES))
        while self.readinto(memory):
            pass
        return self._tally.info


def step_name(global_step: int) -> str:
    """The folder of the checkpoint at `global_step`."""
    return f"step-{global_step:08d}"


def step_of(name: str) -> int | None:
    """The step of which `name` is the `step_name`; None if it is none."""
    match = re.fullmatch("step-([0-9]{8,})", name)
    step = int(match[1]) if match else None
    return step if step is not None and step_name(step) == name else None


def carry_name(rank: int, world_size: int) -> str:
    return f"carry-{rank:05d}-of-{world_size:05d}.safetensors"


def write_tensors(folder: Storage, name: str, tensors: Mapping[str, Tensor]) -> tuple[str, FileInfo]:
    """Write one file of a checkpoint; returns its entry for the manifest."""
    tally = Tally()
    folder.write(name, map(tally.add, tensor_file.pieces(tensors)))
    return name, tally.info


def write_manifest(folder: Storage, manifest: Manifest) -> None:
    """Make the checkpoint valid: all its files must be there."""
    folder.write(MANIFEST, seal(manifest.model_dump(mode="json")))


class Checkpoint:
    """A checkpoint folder, opened for reading.

    Raises (all methods): UserError naming the file and what is wrong with it.
    """

    def __init__(self, folder: Storage):
        self.folder = folder
        with self._reading(MANIFEST):
            content = folder.read(MANIFEST)
        if content is None:
            raise Damaged(f"{folder} has no {MANIFEST}; give a checkpoint or a run folder")
        where = f"{folder}/{MANIFEST}"
        values = unseal(content, where, newest_format=FORMAT_VERSION, mend="use another checkpoint")
        if values.get("kind") != "checkpoint":
            raise NoCheckpoint(f"{folder} is not a checkpoint; give a checkpoint or a run folder")
        arch_class(
            dict(values.get("arch") or {}).get("name", DEFAULT_ARCH)
        )  # one that is not here is no damage
        try:
            self.manifest = validated(Manifest, values, where)
        except UserError as error:
            raise Damaged(f"{error}; use another checkpoint") from None

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        """Inside, an error of the storage becomes one that names the file."""
        try:
            yield
        except FileNotFoundError:
            raise Damaged(f"{self.folder}/{name} is missing; use another checkpoint") from None
        except StorageError:  # it may answer later
            raise
        except OSError as error:
            why = error.strerror or first_line(error)
            raise Damaged(f"{self.folder}/{name} cannot be read ({why}); use another checkpoint") from None

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def step(self) -> int:
        return self.manifest.global_step

    def tensors(self, name: str) -> Tensors:
        """One file's tensors, on the CPU, after checking its size and SHA-256."""
        tensors, problem = {}, None
        with self._opened(name) as stream:
            try:
                tensors = tensor_file.read(stream, self.manifest.files[name].bytes)
            except ValueError as error:  # of the bytes, which are checked first
                problem = error
        if problem is not None:
            raise Damaged(f"{self.folder}/{name}: {first_line(problem)}; use another checkpoint")
        return tensors

    @contextmanager
    def _opened(self, name: str) -> Iterator[Tallied]:
        """One of the files, to be read; at the end, the size and SHA-256 of all of it are checked."""
        info = self.manifest.files.get(name)
        if info is None:
            raise UserError(f"{self.folder} has no {name}; it has: {', '.join(self.manifest.files)}")
        with self._reading(name), self.folder.opened(name) as file:
            stream = Tallied(file)
            yield stream
            is_whole = stream.finish() == info
        if not is_whole:
            raise Damaged(
                f"{self.folder}/{name} is damaged (size or SHA-256 differs); use another checkpoint"
            )

    def verify(self) -> None:
        """Check every byte."""
        for name in self.manifest.files:
            with self._opened(name):
                pass

    def weights(self) -> Tensors:
        """What to evaluate: the averaged weights if the run kept them, else the weights."""
        weights = self.tensors(MODEL_FILE)
        if EMA_FILE in self.manifest.files:
            weights.update(self.tensors(EMA_FILE))
        return weights


def run_id_of(folder: Storage) -> str | None:
    """The identity of the run whose checkpoints `folder` holds; None if it has none yet."""
    try:
        return (folder.read(SAVED) or b"").decode() or None
    except StorageError:  # it may answer later
        raise
    except (OSError, UnicodeDecodeError):  # somebody has put something else there
        return None


def _checkpoint(parent: Storage, name: str, run_id: str | None) -> Checkpoint | None:
    """The checkpoint of the step that a folder is named after; None if that is a copy or something else.

    Args:
        run_id: of the run; None: unknown.

    Raises:
        Damaged: there is none, or one that cannot be read.
    """
    if step_of(name) is None:
        return None
    try:
        checkpoint = Checkpoint(parent / name)
    except NoCheckpoint:
        return None
    is_foreign = None not in (run_id, checkpoint.manifest.run_id) and checkpoint.manifest.run_id != run_id
    return checkpoint if step_name(checkpoint.step) == name and not is_foreign else None


def _copies(run: Storage, run_id: str | None) -> Iterator[Checkpoint]:
    """The checkpoints beside those of `run`: under other names than that of their step, or of other runs."""
    for name in (run / FOLDER).folders():
        with suppress(UserError):
            copy = Checkpoint(run / FOLDER / name)
            if _checkpoint(run / FOLDER, name, run_id) is None:
                yield copy


def finished(run: Storage) -> list[Checkpoint]:
    """The checkpoints of `run` with a readable manifest, in their order; their files are not verified.

    The order is that of their steps, unless another process took the run over: what the one before wrote is older.
    """
    readable, run_id = [], run_id_of(run / FOLDER)
    for name in (run / FOLDER).folders():
        try:
            if (checkpoint := _checkpoint(run / FOLDER, name, run_id)) is not None:
                readable.append(checkpoint)
        except Damaged:
            continue
    return sorted(readable, key=lambda checkpoint: (checkpoint.manifest.generation, checkpoint.step))


def newest_whole(run: Storage, on_event: Callable[[str, str], object]) -> Checkpoint | None:
    """The newest checkpoint of `run` whose every byte is as written; None if the run never had one.

    Args:
        on_event: called with the name of an event and a message for each copy and each newer damaged one.

    Raises:
        UserError: there were some, and all are damaged.
    """
    folder, run_id = run / FOLDER, run_id_of(run / FOLDER)
    problems = []
    mend = "restore one from a copy"
    for copy in _copies(run, run_id):
        if copy.name == step_name(copy.step):
            on_event("copy_left_alone", f"{copy.folder} is of another run; it is left alone")
        else:
            on_event("copy_left_alone", f"{copy.folder} is a copy of step {copy.step}; it is left alone")
            mend = f"rename {copy.name} to {step_name(copy.step)} to go on from that copy"
    was_saved = folder.entries().get(SAVED) == "file"
    generations = {checkpoint.name: checkpoint.manifest.generation for checkpoint in finished(run)}
    newest = max(generations.values(), default=0)  # of one that cannot be read nobody knows

    def order(name: str) -> tuple[int, int]:
        return generations.get(name, newest), step_of(name) or 0

    for name in sorted(folder.folders(), key=order, reverse=True):
        try:
            checkpoint = _checkpoint(run / FOLDER, name, run_id)
            if checkpoint is not None:
                checkpoint.verify()
                return checkpoint
        except Damaged as problem:
            problems.append(problem.what)
            if _has_manifest(folder / name):  # written last; without it, the writing was cut short
                was_saved = True
                on_event("damaged_checkpoint", f"{problem.what}; it is passed over")
    if not was_saved:
        return None
    raise UserError(
        f"{run}: every checkpoint is damaged or gone ({problems[0] if problems else 'all are gone'}); {mend}, "
        "or start a new run with another run_name="
    )


def _has_manifest(folder: Storage) -> bool:
    try:
        return MANIFEST in folder.entries()
    except PermissionError:
        return True


def best(checkpoints: Sequence[Checkpoint]) -> Checkpoint | None:
    """The one whose evaluation was best, the later of equals; the newest if none was evaluated."""
    ranked = _by_metric(checkpoints)
    if not ranked:
        return checkpoints[-1] if checkpoints else None
    return ranked[-1]


def _by_metric(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Those that were evaluated, best last."""
    if not checkpoints:
        return []
    metric = checkpoints[-1].manifest.config.get("best_metric", BEST_METRIC)
    evaluated = [c for c in checkpoints if metric in c.manifest.metrics]
    return sorted(evaluated, key=lambda c: (c.manifest.metrics[metric], c.manifest.global_step))


def prune(run: Storage, global_step: int, *, keep_last: int, keep_best: int) -> None:
    """Delete all but the newest `keep_last` and the best `keep_best` checkpoints, and what was never finished.

    Args:
        global_step: of the newest whole checkpoint; damaged later ones are deleted too.
    """
    checkpoints = finished(run)
    so_far = [c for c in checkpoints if c.step <= global_step]
    keep = {c.name for c in [*so_far[-keep_last:], *_by_metric(so_far)[-keep_best:]]}
    # A later one that is whole was put there by somebody, from a copy.
    newest = max((c.manifest.generation for c in so_far), default=0)
    later = [c for c in checkpoints if c.step > global_step and c.manifest.generation >= newest]
    keep |= {c.name for c in later if _is_whole(c)}
    for name in (run / FOLDER).folders():
        if name not in keep and _is_ours(run / FOLDER, name):
            discard(run / FOLDER, name)


def _is_whole(checkpoint: Checkpoint) -> bool:
    try:
        checkpoint.verify()
    except Damaged:
        return False
    return True


def _is_ours(parent: Storage, name: str) -> bool:
    """Whether a folder is named after a step, and no checkpoint of another step or run, and nothing else with a
    manifest."""
    try:
        return _checkpoint(parent, name, run_id_of(parent)) is not None
    except Damaged:  # what may be deleted of it, `discard` decides
        return True


def make_place(parent: Storage, name: str) -> str | None:
    """See to it that nothing is where a checkpoint is to be written.

    One that was cut short or is damaged is deleted; what may be a user's is renamed.

    Args:
        name: of the checkpoint's folder, in `parent`; if it is named after a step, one of another step is not ours.

    Returns:
        a line about what was renamed, if anything was.

    Raises:
        UserError: it cannot be renamed on this storage.
    """
    if step_of(name) is None or _is_ours(parent, name):
        discard(parent, name)
    kind = parent.entries().get(name)
    if kind is None or (kind == "folder" and _has_room(parent / name)):
        return None
    aside = (parent / name).set_aside("aside")
    return f"{parent / name} is not a checkpoint of this run; it is kept as {aside.name}"


def _has_room(folder: Storage) -> bool:
    """Whether nothing in it has the name of a file of the format."""
    try:
        return not any(map(OUR_FILES.fullmatch, folder.entries()))
    except PermissionError:
        return False


def discard(parent: Storage, name: str) -> None:
    """Delete a checkpoint, or what there is of one whose writing was cut short. What is not ours stays.

    Ours are the files that its manifest names. Without one, a folder is surely ours if it holds nothing else than files
    of the format, and a carry, which is written first and deleted last; with one that cannot be read, never.

    Args:
        parent: the folder that `name` is in.
    """
    if parent.entries().get(name) != "folder":  # a link: what it points to is not ours
        return
    with suppress(PermissionError):  # what we may not delete stays too
        _discard(parent / name)


def _discard(folder: Storage) -> None:
    entries = folder.entries()
    ours = {n: match[1] for n in entries if entries[n] == "file" and (match := OUR_FILES.fullmatch(n))}
    try:
        written = {MANIFEST, *Checkpoint(folder).manifest.files}
    except (Damaged, NoCheckpoint):
        is_begun = any(of.startswith("carry-") or n != of for n, of in ours.items())
        is_cut_short = MANIFEST not in entries and len(ours) == len(entries) and is_begun
        written = set(ours.values()) if is_cut_short else set()
    # The manifest first: what is half deleted must not look whole.
    for file in sorted(ours, key=lambda n: (n != MANIFEST, ours[n].startswith("carry-"))):
        if ours[file] in written:
            folder.delete_file(file)
    if written or not entries:
        folder.delete_if_empty()


def discard_all(run: Storage) -> None:
    """Delete all checkpoints of `run`, and the note that there were any. What is not ours stays."""
    folder = run / FOLDER
    for name in folder.folders():
        if _is_ours(run / FOLDER, name):
            discard(folder, name)
    if folder.entries().get(SAVED) == "file":
        folder.delete_file(SAVED)
    folder.delete_if_empty()


def find(path: str) -> Checkpoint:
    """The checkpoint that a user means by `path`: a checkpoint folder, or a run folder (then its best)."""
    folder = Storage(path)
    hint = checkpoint_hint(Path(path))
    if not folder.exists():
        raise UserError(hint or f"{path}: no such folder; give a checkpoint or a run folder")
    if folder.read(MANIFEST) is not None:
        return Checkpoint(folder)
    chosen = best(finished(folder))
    if chosen is None:
        raise UserError(hint or f"{path} holds no finished checkpoint; give a checkpoint or a run folder")
    return chosen
