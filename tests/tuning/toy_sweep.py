"""A sweep whose trials take seconds, for tests."""

from pathlib import Path
from typing import Any

from hrm_ray.tuning.config import SweepConfig, sweep_config
from tests.toy import ARCH, toy_dataset

LENGTH = {
    "global_batch_size": 8,
    "epochs": 30,
    "max_steps": 40,
    "eval_interval_steps": 5,
    "lr_warmup_steps": 4,
}
MACHINE = {"device": "cpu", "forward_dtype": "float32", "tensorboard": "false", "log_interval": 5}


def words(data: Path, **more: Any) -> list[str]:
    """Those of `hrm-ray train` that hold for all trials."""
    arch = {f"arch.{key}": value for key, value in ARCH.items()}
    return [f"{key}={value}" for key, value in {"data": data, **arch, **LENGTH, **MACHINE, **more}.items()]


def toy_sweep(folder: Path, train: dict[str, Any] | None = None, **values: Any) -> SweepConfig:
    """A sweep over lr of a toy model, in `folder`/sweeps/toy, on toy data that are made if need be."""
    data = folder / "data"
    if not data.exists():
        toy_dataset(data)
    sweep = {
        "train": words(data, **(train or {})),
        "space": {"lr": {"log": [1e-4, 1e-1]}},
        "metric": "eval/accuracy",
        "pruner": {"name": "successive_halving", "reduction_factor": 2},
        "num_trials": 6,
        "storage": str(folder / "sweeps"),
        "run_name": "toy",
    }
    return sweep_config({**sweep, **values})
