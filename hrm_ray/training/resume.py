"""Where a run continues: from its newest checkpoint, or as a new run from the weights of one that does not fit."""

from typing import Any

from hrm_ray.config.halting import halting_of
from hrm_ray.config.optimizer import OPTIMIZERS
from hrm_ray.config.schema import TrainConfig
from hrm_ray.config.validate import Settings
from hrm_ray.data.shards import Dataset
from hrm_ray.errors import UserError
from hrm_ray.storage.storage import Storage, numbered
from hrm_ray.training.checkpoint import Checkpoint, finished, newest_whole

BEFORE = "before"  # runs that were set aside are RUN_NAME-before-1, ...


def resume_point(config: TrainConfig, run: Storage, dataset: Dataset) -> Checkpoint | None:
    """The newest checkpoint of `run`, its files not yet verified, or None for a new run.

    Raises:
        UserError: it belongs to another model, data set, seed or batch size.
    """
    checkpoints = finished(run)
    if not checkpoints:
        return None
    check_fits(checkpoints[-1], config, run, dataset)
    return checkpoints[-1]


def check_fits(checkpoint: Checkpoint, config: TrainConfig, run: Storage, dataset: Dataset) -> None:
    """Raise UserError, naming both values, if `config` cannot continue `checkpoint`."""
    problem = mismatch(checkpoint, config, dataset)
    if problem:
        raise UserError(
            f"{run} was trained with {problem}; give the same values to continue it, another run_name= for a new "
            "run, or resume=weights to start a new run from its weights"
        )


def mismatch(checkpoint: Checkpoint, config: TrainConfig, dataset: Dataset) -> str | None:
    """What keeps `config` from continuing `checkpoint`: "KEY VALUE, not VALUE"; None if nothing does."""
    manifest = checkpoint.manifest
    there: dict[str, Any] = {"data set": manifest.dataset.fingerprint, "arch": manifest.arch.name}
    here: dict[str, Any] = {"data set": dataset.fingerprint, "arch": config.arch.name}
    if here["arch"] == there["arch"]:
        there |= _by_key(manifest.arch, "arch.")
        here |= _by_key(config.arch, "arch.")
    keys = ("seed", "global_batch_size", "supervision_steps", "ema")
    there |= {key: manifest.config.get(key, TrainConfig.model_fields[key].default) for key in keys}
    here |= {key: getattr(config, key) for key in keys}
    there["paths.train"] = manifest.config.get("paths", {}).get("train", 1)
    here["paths.train"] = config.paths.train
    before = manifest.config.get("optimizer", {"name": OPTIMIZERS.default})
    there["optimizer"], here["optimizer"] = before["name"], config.optimizer.name
    if before["name"] == config.optimizer.name:
        for key in config.optimizer.kept:
            there[f"optimizer.{key}"] = before.get(key, type(config.optimizer).model_fields[key].default)
            here[f"optimizer.{key}"] = getattr(config.optimizer, key)
    own = halting_of(manifest.config, "the checkpoint")
    there["halting.name"], here["halting.name"] = own.name, config.halting.name
    if own.name == config.halting.name:
        there |= {f"halting.{key}": getattr(own, key) for key in own.kept}
        here |= {f"halting.{key}": getattr(config.halting, key) for key in own.kept}
    for key in here:
        if there[key] != here[key]:
            return f"{key}={str(there[key])[:40]}, not {str(here[key])[:40]}"
    return None


def _by_key(settings: Settings, prefix: str) -> dict[str, Any]:
    """The values of `settings` and of the settings inside it, by dotted key."""
    found: dict[str, Any] = {}
    for key, value in settings:
        if isinstance(value, Settings):
            found |= _by_key(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def set_aside(run: Storage) -> Storage:
    """Rename the folder of a run that is to start again from its own weights; returns it under its new name.

    Raises:
        UserError: another process trains it, or its storage cannot rename.
    """
    lock = run.lock(wait_s=0)
    try:
        return run.set_aside(BEFORE)
    finally:
        lock.close()


def weights_source(run: Storage) -> Checkpoint:
    """The checkpoint whose weights `resume=weights` starts from: the newest of the run last set aside.

    Raises:
        UserError: there is none.
    """
    for number in reversed(numbered(run.parent.folders(), f"{run.name}-{BEFORE}-")):
        checkpoint = newest_whole(run.parent / f"{run.name}-{BEFORE}-{number}", lambda event, what: None)
        if checkpoint:
            return checkpoint
    raise UserError(
        f"resume=weights: {run} has no checkpoint to take weights from; leave resume=weights out to start a new run"
    )
