"""A sweep seen from outside: how it stands, and what its driver is asked to do."""

import time
from collections.abc import Sequence
from typing import Any

from optuna.trial import TrialState

from hrm_ray.errors import UserError
from hrm_ray.storage.storage import Storage
from hrm_ray.training.logging import reports
from hrm_ray.tuning import report
from hrm_ray.tuning.config import SETTABLE, override, plain, with_settings
from hrm_ray.tuning.estimate import Spent
from hrm_ray.tuning.study import ENDED, SETTINGS, SPENT, ReadStudy, is_driven, load, trial_name, want
from hrm_ray.tuning.sweep import config_of

STOP_TIMEOUT_S = 600.0
LOOK_S = 0.3


def opened(folder: Storage) -> ReadStudy:
    """The study of a sweep, to be read; its settings are those that hold now. Raises UserError if there is none."""
    config = config_of(folder)
    study = load(folder, config)
    return ReadStudy(study, with_settings(config, study.user_attrs.get(SETTINGS) or {}))


def status(folder: Storage) -> tuple[ReadStudy, dict[str, Any], list[dict[str, Any]]]:
    """The study, what summary.json would say now and whether it `is_running`, and the rows of the trials."""
    study = opened(folder)
    rows = report.table(study)
    for row in rows:
        if row["state"] == TrialState.RUNNING.name:
            row["steps"] = _step_of(folder / trial_name(row["number"]))
    spent = Spent(**study.study.user_attrs.get(SPENT, {}))
    summary = report.summarise(folder, study, rows, spent)
    return study, {**summary, "is_running": is_driven(folder)}, rows


def _step_of(run: Storage) -> int:
    """The last step that a run has reported."""
    return max((report["global_step"] for _, report in reports(run)), default=0)


def stop(folder: Storage, numbers: Sequence[int] = ()) -> str:
    """Ask the driver to stop the sweep, or some of its trials, and wait until that is done; returns what came of it.

    Raises:
        UserError: no such trial, or the driver does not answer.
    """
    study = opened(folder)
    running = {trial.number for trial in study.trials(TrialState.RUNNING)}
    for number in numbers:
        if number not in running:
            raise UserError(f"trial {number} of {folder} is not running; running: {_listed(running)}")
    if not is_driven(folder):
        return f"nothing is at work on {folder}"
    want(folder, study.config, stop=list(numbers) or True)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while is_driven(folder):
        if numbers and not set(numbers) - {trial.number for trial in study.trials(*ENDED)}:
            return f"stopped trial {_listed(numbers)} of {folder}; its last checkpoint is kept"
        if time.monotonic() > deadline:
            raise UserError(f"{folder} has not stopped within {STOP_TIMEOUT_S:g} s; look at its driver")
        time.sleep(LOOK_S)
    return f"stopped {folder}; the same hrm-ray tune command continues it"


def change(folder: Storage, words: Sequence[str]) -> dict[str, Any]:
    """Set some of `SETTABLE` of a sweep, also of one at work; returns what holds now.

    Raises:
        UserError: another key, or a value that does not fit.
    """
    study = opened(folder)
    values = override(plain(study.config), words, SETTABLE)
    settings = {key: values[key] for key in SETTABLE if values[key] != plain(study.config)[key]}
    checked = plain(with_settings(study.config, settings))
    want(folder, study.config, settings=settings)
    return {key: checked[key] for key in SETTABLE}


def _listed(numbers: Sequence[int] | set[int]) -> str:
    return ", ".join(map(str, sorted(numbers))) or "none"
