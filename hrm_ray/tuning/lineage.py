"""What a member of a population has been: its points, one after another, and the checkpoints that it took over.

A member that does badly goes on from a copy of another's checkpoint, with a point near the other's:

    RUN/taken/0002/       1. the driver copies the checkpoint; with its manifest, written last, it is whole
    study                 2. the driver notes the new point: from now on it holds
    RUN/checkpoints/      3. the member's actor puts the copy in its place, for what the run had from that step on
    RUN/taken             4. and deletes this, but for what is not ours

A process killed between any two of them leaves a member that goes on as it was (until 2) or as the copy. Knows no Ray.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

from optuna.trial import FrozenTrial

from hrm_ray.manifest import MANIFEST, Damaged
from hrm_ray.storage.storage import Storage, numbered
from hrm_ray.training.checkpoint import (
    FOLDER,
    SAVED,
    Checkpoint,
    FileInfo,
    discard,
    finished,
    make_place,
    step_name,
    write_manifest,
)
from hrm_ray.training.logging import METRICS_FILE, note_event, reports
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
    later = [checkpoint for checkpoint in finished(source) if checkpoint.step >= step]
    for checkpoint in sorted(later, key=lambda c: (c.step == step, c.step), reverse=True):
        try:
            return _copied(checkpoint, run / TAKEN, _name(number))
        except (Damaged, OSError):  # or deleted, since there are newer ones; or the storage says no
            continue
    return None


def drop_unknown(run: Storage, number: int) -> None:
    """Delete copies that were begun after copy `number`, and are in no study."""
    for copy in numbered((run / TAKEN).folders(), ""):
        if copy > number:
            discard(run / TAKEN, _name(copy))


def take_over(run: Storage, number: int, wait_s: float) -> None:
    """Let `run` go on from its copy `number`, unless it has done so. What it had at that step and later is gone.

    Args:
        wait_s: for another process that trains it still.

    Raises:
        UserError: one does so too long.
    """
    taken = run / TAKEN
    copy = taken / _name(number)
    if not any(earlier <= number for earlier in numbered(taken.folders(), "")):
        taken.delete_if_empty()
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
        for earlier in numbered(taken.folders(), ""):
            if earlier <= number:
                discard(taken, _name(earlier))
        taken.delete_if_empty()
    finally:
        lock.close()


def _put(copy: Checkpoint, run: Storage) -> None:
    step = copy.step
    generation = max((checkpoint.manifest.generation for checkpoint in finished(run)), default=0)
    for checkpoint in finished(run):
        if checkpoint.step >= step:
            discard(run / FOLDER, checkpoint.name)
    if (moved := make_place(run / FOLDER, step_name(step))) is not None:
        note_event(run, "set_aside", global_step=step, message=moved)
    _copied(copy, run / FOLDER, step_name(step), generation)
    if SAVED not in (run / FOLDER).entries():
        run.write(f"{FOLDER}/{SAVED}", b"")
    lines = [line + "\n" for line, report in reports(run) if report["global_step"] <= step]
    run.write(METRICS_FILE, "".join(lines).encode())
    note_event(
        run, "taken_over", global_step=step, message=f"goes on from a copy of another run's step {step}"
    )


def _copied(source: Checkpoint, parent: Storage, name: str, generation: int = 0) -> Checkpoint:
    """A copy of a checkpoint, in a folder of its own, every byte of which is as its manifest says. Raises Damaged.

    Args:
        generation: that the copy is to have, see `lock`.
    """
    make_place(parent, name)
    folder = parent / name
    for file, info in source.manifest.files.items():
        content = source.folder.read(file) or b""
        if FileInfo(bytes=len(content), sha256=hashlib.sha256(content).hexdigest()) != info:
            raise Damaged(f"{source.folder}/{file} is missing or damaged; use another checkpoint")
        folder.write(file, content)
    about = {"run_id": None, "generation": generation}  # another run goes on from it
    write_manifest(folder, source.manifest.model_copy(update=about))
    return Checkpoint(folder)


def _name(number: int) -> str:
    return f"{number:04d}"
