"""The checkpoint format: a folder of safetensors files and the manifest that makes it valid.

    RUN/checkpoints/step-00000100/
        model.safetensors                     weights and buffers, under their published names
        ema.safetensors                       averaged weights, if the run keeps them
        optimizer.safetensors                 first and second moments
        target.safetensors                    the Q head's slow copy, if halting is learned by Q-learning
        carry-00000-of-00002.safetensors      one worker's hidden states, puzzles, replay memory, and
                                              sums not yet reported
        manifest.json                         what it is; sizes and SHA-256 of the files and of itself; written last

        ../saved                              that the run has had a whole checkpoint at all

Weights alone (an imported model) make a checkpoint too: one to evaluate, not to resume. Every file is verified
before it is used, and nothing is ever unpickled. What is damaged is passed over for the checkpoint before it; a run
whose checkpoints are all damaged is not started over.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor

from hrm_ray.config.arch import DEFAULT_ARCH, Arch, arch_class
from hrm_ray.config.validate import Settings, validated
from hrm_ray.errors import UserError, first_line
from hrm_ray.manifest import MANIFEST, Damaged, seal, unseal
from hrm_ray.published import checkpoint_hint
from hrm_ray.training.storage import Storage

FORMAT_VERSION = 1
FOLDER = "checkpoints"
SAVED = "saved"
MODEL_FILE, EMA_FILE = "model.safetensors", "ema.safetensors"
BEST_METRIC = "eval/exact_accuracy"  # unless the run says otherwise
Tensors = dict[str, Tensor]


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
    files: dict[str, FileInfo]


def step_name(global_step: int) -> str:
    """The folder of the checkpoint at `global_step`."""
    return f"step-{global_step:08d}"


def carry_name(rank: int, world_size: int) -> str:
    return f"carry-{rank:05d}-of-{world_size:05d}.safetensors"


def write_tensors(folder: Storage, name: str, tensors: Mapping[str, Tensor]) -> tuple[str, FileInfo]:
    """Write one file of a checkpoint; returns its entry for the manifest."""
    content = safetensors.torch.save({k: t.detach().cpu().contiguous() for k, t in tensors.items()})
    folder.write(name, content)
    return name, FileInfo(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def write_manifest(folder: Storage, manifest: Manifest) -> None:
    """Make the checkpoint valid: all its files must be there."""
    folder.write(MANIFEST, seal(manifest.model_dump(mode="json")))


class Checkpoint:
    """A checkpoint folder, opened for reading.

    Raises (all methods): UserError naming the file and what is wrong with it.
    """

    def __init__(self, folder: Storage):
        self.folder = folder
        content = folder.read(MANIFEST)
        if content is None:
            raise Damaged(f"{folder} has no {MANIFEST}; give a checkpoint or a run folder")
        where = f"{folder}/{MANIFEST}"
        values = unseal(content, where, newest_format=FORMAT_VERSION, mend="use another checkpoint")
        if values.get("kind") != "checkpoint":
            raise UserError(f"{folder} is not a checkpoint; give a checkpoint or a run folder")
        arch_class(
            dict(values.get("arch") or {}).get("name", DEFAULT_ARCH)
        )  # one that is not here is no damage
        try:
            self.manifest = validated(Manifest, values, where)
        except UserError as error:
            raise Damaged(f"{error}; use another checkpoint") from None

    @property
    def name(self) -> str:
        return self.folder.name

    def tensors(self, name: str) -> Tensors:
        """One file's tensors, on the CPU, after checking its size and SHA-256."""
        info = self.manifest.files.get(name)
        if info is None:
            raise UserError(f"{self.folder} has no {name}; it has: {', '.join(self.manifest.files)}")
        content = self.folder.read(name)
        if content is None:
            raise Damaged(f"{self.folder}/{name} is missing; use another checkpoint")
        if len(content) != info.bytes or hashlib.sha256(content).hexdigest() != info.sha256:
            raise Damaged(
                f"{self.folder}/{name} is damaged (size or SHA-256 differs); use another checkpoint"
            )
        try:
            return safetensors.torch.load(content)
        except SafetensorError as error:
            raise Damaged(f"{self.folder}/{name}: {first_line(error)}; use another checkpoint") from None

    def verify(self) -> None:
        """Check every byte."""
        for name in self.manifest.files:
            self.tensors(name)

    def weights(self) -> Tensors:
        """What to evaluate: the averaged weights if the run kept them, else the weights."""
        weights = self.tensors(MODEL_FILE)
        if EMA_FILE in self.manifest.files:
            weights.update(self.tensors(EMA_FILE))
        return weights


def finished(run: Storage) -> list[Checkpoint]:
    """The checkpoints of `run` with a readable manifest, oldest first; their files are not verified."""
    readable = []
    for name in (run / FOLDER).folders():
        try:
            readable.append(Checkpoint(run / FOLDER / name))
        except Damaged:
            continue
    return readable


def newest_whole(run: Storage, on_damage: Callable[[str], object]) -> Checkpoint | None:
    """The newest checkpoint of `run` whose every byte is as written; None if the run never had one.

    Args:
        on_damage: told of each newer one that is not whole.

    Raises:
        UserError: there were some, and none is whole.
    """
    folder = run / FOLDER
    problems = []
    was_saved = folder.read(SAVED) is not None
    for name in reversed(folder.folders()):
        try:
            checkpoint = Checkpoint(folder / name)
            checkpoint.verify()
        except Damaged as problem:
            problems.append(problem.what)
            if (
                folder.read(f"{name}/{MANIFEST}") is not None
            ):  # written last; without it, the writing was cut short
                was_saved = True
                on_damage(f"{problem.what}; it is passed over")
            continue
        return checkpoint
    if not was_saved:
        return None
    raise UserError(
        f"{run}: no checkpoint is whole ({problems[0] if problems else 'all are gone'}); bring one back from a "
        "copy, or choose another run_name= to start anew"
    )


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
        global_step: of the newest whole checkpoint; later ones were damaged and are deleted too.
    """
    checkpoints = [c for c in finished(run) if c.manifest.global_step <= global_step]
    keep = {c.name for c in [*checkpoints[-keep_last:], *_by_metric(checkpoints)[-keep_best:]]}
    for name in (run / FOLDER).folders():
        if name not in keep:
            discard(run / FOLDER / name)


def discard(folder: Storage) -> None:
    """Delete a checkpoint, its manifest first: what is half deleted must not look whole."""
    folder.delete_file(MANIFEST)
    folder.delete()


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
