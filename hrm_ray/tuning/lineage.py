"""What a member of a population has been: its points, one after another, and the checkpoints that it took over.

A member that does badly goes on from a copy of another's checkpoint, with a point near the other's:

    RUN/taken/0002/       1. the driver copies the checkpoint; with its manifest, written last, it is whole
    study                 2. the driver notes the new point: from now on it holds
    RUN/checkpoints/      3. the member's actor puts the copy in its place, for what the run had from that step on
    RUN/taken             4. and deletes this

A process killed between any two of them leaves a member that goes on as it was (until 2) or as the copy. Knows no Ray.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from optuna.trial import FrozenTrial

from hrm_ray.manifest import MANIFEST, Damaged
from hrm_ray.training.checkpoint import (
    FOLDER,
    SAVED,
    Checkpoint,
    FileInfo,
    discard,
    step_name,
    write_manifest,
)
from hrm_ray.training.logging import METRICS_FILE, note_event
from hrm_ray.training.storage import Storage
from hrm_ray.tuning.space import Point

HISTORY = "history"  # attribute of a trial: [{step, from_trial, from_step, point}]
TAKEN = "taken"


def history(trial: FrozenTrial) -> list[dict[str, Any]]:
    """Each time that a member went on from another's checkpoint: at which `step` of its own, `from_trial` and
    `from_step` which one, and with which `point`."""
    return list(trial.user_attrs.get(HISTORY) or [])


def point_of(trial: FrozenTrial, space: Mapping[str, Any]) -> Point:
    """The point of a trial: of a member of a population the last one."""
    moves = history(trial)
    point = moves[-1]["point"] if moves else trial.params
    return {key: point[key] for key in space if key in point}


def stage(source: Storage, step: int, run: Storage, number: int) -> Checkpoint | None:
    """Copy a checkpoint of `source` into the folder `run`, where the loop does not look for it yet.

    Args:
        step: the one that is wanted; where it is gone, the newest of later ones is taken.
        number: counts the copies of `run`, from 1.

    Returns:
        the copy; None if there is nothing to copy.
    """
    at_step = step_name(step)
    later = [name for name in (source / FOLDER).folders() if name > at_step]
    for name in (at_step, *reversed(later)):
        try:
            return _copied(Checkpoint(source / FOLDER / name), run / TAKEN / _name(number))
        except (Damaged, OSError):  # or deleted, since there are newer ones; or the storage says no
            continue
    return None


def drop_unknown(run: Storage, number: int) -> None:
    """Delete copies that were begun after copy `number`, and are in no study."""
    for name in (run / TAKEN).folders():
        if name > _name(number):
            discard(run / TAKEN / name)


def take_over(run: Storage, number: int, wait_s: float) -> None:
    """Let `run` go on from its copy `number`, unless it has done so. What it had at that step and later is gone.

    Args:
        wait_s: for another process that trains it still.

    Raises:
        UserError: one does so too long.
    """
    copy = run / TAKEN / _name(number)
    if not copy.exists():
        return
    lock = run.lock(wait_s)
    try:
        if copy.read(MANIFEST) is not None:  # else it was being deleted
            try:
                checkpoint = Checkpoint(copy)
                checkpoint.verify()
            except Damaged as problem:
                note_event(
                    run, "damaged_copy", message=f"{problem.what}; the run goes on from its own checkpoint"
                )
            else:
                _put(checkpoint, run)
        copy.delete_file(MANIFEST)  # first: what is half deleted must not look whole
        (run / TAKEN).delete()
    finally:
        if lock:
            lock.close()


def _put(copy: Checkpoint, run: Storage) -> None:
    step = copy.manifest.global_step
    for name in (run / FOLDER).folders():
        if name >= step_name(step):
            discard(run / FOLDER / name)
    _copied(copy, run / FOLDER / step_name(step))
    run.write(f"{FOLDER}/{SAVED}", b"")
    lines = (run.read(METRICS_FILE) or b"").splitlines(keepends=True)
    run.write(METRICS_FILE, b"".join(line for line in lines if _step_of(line) <= step))
    note_event(
        run, "taken_over", global_step=step, message=f"goes on from a copy of another run's step {step}"
    )


def _copied(source: Checkpoint, folder: Storage) -> Checkpoint:
    """A copy of a checkpoint, every byte of which is as its manifest says. Raises Damaged."""
    discard(folder)
    for name, info in source.manifest.files.items():
        content = source.folder.read(name) or b""
        if FileInfo(bytes=len(content), sha256=hashlib.sha256(content).hexdigest()) != info:
            raise Damaged(f"{source.folder}/{name} is missing or damaged; use another checkpoint")
        folder.write(name, content)
    write_manifest(folder, source.manifest)
    return Checkpoint(folder)


def _step_of(line: bytes) -> float:
    """The step of a report; one that was cut short by a crash belongs to none."""
    try:
        return int(json.loads(line)["global_step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _name(number: int) -> str:
    return f"{number:04d}"
