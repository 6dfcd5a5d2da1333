"""Histories of runs, ours and of others: run folders, `training_history.json`, and `metrics.csv` of openai/grok.

Others write accuracies in percent, some take these for fractions, and a run that never left chance level looks as if it
were half-way. So every accuracy is checked: what may be read in two ways is not read at all.
"""

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

from hrm_ray.config.schema import TrainConfig
from hrm_ray.config.validate import MANY
from hrm_ray.data.shards import Dataset, open_dataset
from hrm_ray.errors import UserError, first_line
from hrm_ray.grokking.history import CURVES, FILE, SUMMARY, History, Source, as_column, is_number

METRICS_CSV = "metrics.csv"
_REPORTS, _CONFIG = "metrics.jsonl", "config.yaml"  # of our runs, see `hrm_ray.training.logging`
_LOGS = ("logs", "csv_logs")  # folders in which others keep them
# Equations of an operator of openai/grok, and chance.
_PUBLISHED = {9409: 1 / 97, 9312: 1 / 97, 14400: 1 / 120}
# Columns of metrics.csv that say a curve, the first one that is there; and the counts that some have.
_CSV = {
    "train_loss": ("full_train_loss", "train_loss"),
    "train_acc": ("full_train_acc", "train_accuracy"),
    "test_loss": ("val_loss",),
    "test_acc": ("val_accuracy",),
}


class Run(NamedTuple):
    """A run to be shown: its name, its history, and what is known beside it."""

    name: str
    history: History
    source: Source


def read_run(path: str, *, percent: bool | None = None, chance: float | None = None) -> Run:
    """Read the history of a run.

    Args:
        path: our run folder, one of others with one of the files in it, or such a file.
        percent: whether accuracies of others are in percent, ours never are; None: as they say themselves.
        chance: accuracy of a guess, where it is not known.

    Raises:
        UserError: nothing of the kind, damaged, without evaluations, or accuracies that may be read in two ways.
    """
    if "://" in path:
        raise UserError(
            f"{path}: plot reads local folders; copy {_REPORTS} and {FILE} into one, and give that"
        )
    file = _file_of(Path(path))
    history, source = _read(file, percent)
    if not len(history):
        if source.num_test == 0:
            raise UserError(f"{file}: this run has no validation equations, so there is nothing to draw")
        raise UserError(f"{file} holds no evaluation yet; wait for the first, or give another run")
    if source.chance is None:
        source = replace(source, chance=chance)
    folder = file.parent
    return Run((folder.parent if folder.name in _LOGS else folder).resolve().name, history, source)


def source_of(dataset: Dataset, config: TrainConfig) -> Source:
    """What is known of one of our runs."""
    splits = {name: dataset.splits[name].num_examples for name in ("train", "test") if name in dataset.splits}
    return Source(
        chance=dataset.task.chance,
        num_train=splits.get("train", 0),
        num_test=splits.get("test", 0),
        weight_decay=config.weight_decay,
        noise=dataset.task.options.get("noise", 0),
    )


def _file_of(path: Path) -> Path:
    """The file that holds the history."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such run; give a run folder, a {FILE} or a {METRICS_CSV}")
    places = (path, *(path / name for name in _LOGS))
    for file in (place / name for name in (_REPORTS, FILE, METRICS_CSV) for place in places):
        if file.is_file():
            return file
    raise UserError(
        f"{path} has no {_REPORTS}, {FILE} or {METRICS_CSV}; give a run folder or one of these files"
    )


def _read(file: Path, percent: bool | None) -> tuple[History, Source]:
    try:
        content = file.read_text(errors="replace")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    try:
        if file.suffix == ".jsonl":
            return History.of_reports(_reports(content)), _source_beside(file)
        if file.suffix == ".csv":
            history = _from_csv(content)
            history = _as_fractions(history, file, percent, is_percent=True)
            return history, _counted(history)
        history, source, is_ours = _from_json(content)
        return _as_fractions(history, file, None if is_ours else percent, is_percent=False), source
    except (ValueError, OverflowError, RecursionError, csv.Error) as error:
        raise UserError(f"{file} is no history of a run: {first_line(error)}") from None


def _reports(content: str) -> Iterator[Mapping[str, float]]:
    for line in content.split("\n"):
        with suppress(ValueError):  # the last may be cut short
            report = json.loads(line)
            if isinstance(report, dict) and "global_step" in report and all(map(is_number, report.values())):
                yield report


def _source_beside(file: Path) -> Source:
    """Of one of our runs, as it has said at its end; before, of its data set, which is not opened without need."""
    with suppress(OSError, ValueError, OverflowError, RecursionError):
        _, source, is_ours = _from_json((file.parent / FILE).read_text())
        if is_ours:
            return source
    with suppress(OSError, ValueError, yaml.YAMLError, UserError):
        config = TrainConfig.model_validate(yaml.safe_load((file.parent / _CONFIG).read_text()))
        return replace(source_of(open_dataset(config.data_path), config), finished=False)
    return Source()


def _from_json(content: str) -> tuple[History, Source, bool]:
    """Returns the history, what is known beside it, and whether hrm_ray has written it."""
    values = json.loads(content)
    if not isinstance(values, dict):
        raise ValueError("no JSON object")
    if missing := [
        name for name in ("epoch", "train_acc", "test_acc") if not isinstance(values.get(name), list)
    ]:
        raise ValueError(f"it has no list {missing[0]}")
    lists = {name: as_column(column) for name, column in values.items() if isinstance(column, list)}
    if len({len(column) for column in lists.values()}) > 1:
        raise ValueError("its lists are not of one length")
    epochs = lists.pop("epoch")
    clock = "step" if "step" in lists else "epoch"
    steps = lists.pop("step", epochs)
    summary = values.get(SUMMARY)
    if not isinstance(summary, dict):
        summary = {}
    return _history(steps, epochs, lists, clock), Source.of_summary(summary), "verdict" in summary


def _from_csv(content: str) -> History:
    """A row for each validation; what training said last stands beside it."""
    rows = list(csv.DictReader(io.StringIO(content)))
    if not rows or "val_accuracy" not in rows[0] or not {"step", "epoch"} & rows[0].keys():
        raise ValueError("it has not the columns step or epoch, and val_accuracy")
    clock = "step" if "step" in rows[0] else "epoch"
    known: dict[str, float] = {}
    lists: dict[str, list[float]] = {name: [] for name in (clock, "epoch", *_CSV)}
    for row in rows:
        now = {
            name: float(text) for name, text in row.items() if name and isinstance(text, str) and text.strip()
        }
        now = {name: value for name, value in now.items() if not math.isnan(value)}
        known.update(now)
        if "val_accuracy" not in now:
            continue
        for name in {clock, "epoch"}:
            lists[name].append(known.get(name, math.nan))
        for name, columns in _CSV.items():
            lists[name].append(next((known[column] for column in columns if column in known), math.nan))
    arrays = {name: np.array(values, float) for name, values in lists.items()}
    return _history(arrays[clock], arrays["epoch"], {name: arrays[name] for name in _CSV}, clock)


def _history(steps: np.ndarray, epochs: np.ndarray, lists: Mapping[str, np.ndarray], clock: str) -> History:
    unknown = np.full(len(steps), math.nan)
    if not (np.abs(steps) <= MANY).all() or (np.diff(steps) < 0).any():
        raise ValueError(f"its {clock}s do not rise, or are no numbers of {clock}s")
    known = {name: np.where(np.isfinite(values), values, math.nan) for name, values in lists.items()}
    return History(steps, epochs, {**dict.fromkeys(CURVES, unknown), **known}, clock)


def _as_fractions(history: History, file: Path, percent: bool | None, *, is_percent: bool) -> History:
    """The history with accuracies that are fractions.

    Args:
        percent: what the user says.
        is_percent: what this kind of file is to hold.
    """
    accuracies = np.concatenate([history["train_acc"], history["test_acc"]])
    known = accuracies[~np.isnan(accuracies)]
    most = float(known.max()) if len(known) else 0.0
    if len(known) and known.min() < 0:
        raise UserError(f"{file} holds an accuracy of {known.min():g}, below 0; nothing can be read from it")
    if most > (1 if percent is False else 100):
        kind = "fraction" if percent is False else "percent"
        raise UserError(f"{file} holds an accuracy of {most:g}, which is no {kind}; leave percent= out")
    if percent is None and is_percent and most <= 1:
        raise UserError(
            f"{file}: no accuracy is above 1, and openai/grok writes them in percent; add percent=false if they are "
            "fractions"
        )
    if percent and len(known) and most <= 1:
        raise UserError(
            f"{file}: no accuracy is above 1, so they are hardly in percent; leave percent=true out, or draw this run "
            "without those that are"
        )
    if percent is None and not is_percent and most > 1:
        raise UserError(
            f"{file} holds an accuracy of {most:g}, and {FILE} is to hold fractions; add percent=true if it is in "
            "percent"
        )
    if not (is_percent if percent is None else percent):
        return history
    columns = {name: history[name] / 100 for name in ("train_acc", "test_acc")}
    return replace(history, columns={**history.columns, **columns})


def _counted(history: History) -> Source:
    """How many equations a run of openai/grok had: its accuracies are whole numbers of them.

    Its file does not say so, and they decide whether it could have grokked. Nothing is known where the accuracies fit
    several counts.
    """
    found = {
        (num_train, total - num_train)
        for total in _PUBLISHED
        for num_train in range(1, total)
        if _fits(history["test_acc"], total - num_train) and _fits(history["train_acc"], num_train)
    }
    if len(found) != 1:
        return Source()
    ((num_train, num_test),) = found
    return Source(_PUBLISHED[num_train + num_test], num_train, num_test)


def _fits(shares: np.ndarray, count: int) -> bool:
    """Whether all are whole numbers of `count`; they were computed in float32, and written in percent."""
    numbers = shares[~np.isnan(shares)] * count
    return bool((np.abs(numbers - np.round(numbers)) < 0.02).all())
