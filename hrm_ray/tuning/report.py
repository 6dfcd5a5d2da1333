"""What came of a sweep, as files: trials.csv, best.yaml, summary.json and the page. All follows from the study."""

import csv
import io
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from optuna.trial import FrozenTrial, TrialState

from hrm_ray.storage.storage import Storage
from hrm_ray.tuning.estimate import Spent
from hrm_ray.tuning.lineage import history, point_of
from hrm_ray.tuning.page import page
from hrm_ray.tuning.plots import plots
from hrm_ray.tuning.points import Points
from hrm_ray.tuning.statistics import spread
from hrm_ray.tuning.study import ENDED, ENDING, ESTIMATE, OUTCOME, REASON, WORDS, ReadStudy, trial_name

TABLE = "trials.csv"
BEST = "best.yaml"
SUMMARY = "summary.json"
PAGE = "index.html"
PLOTS = "plots"


def ranked(study: ReadStudy) -> list[FrozenTrial]:
    """Complete trials, the best first; of several metrics those of the Pareto front before the others."""
    complete = study.trials(TrialState.COMPLETE)
    directions = list(study.config.metric.values())
    signs = [1 if direction == "minimize" else -1 for direction in directions]

    def losses(trial: FrozenTrial) -> list[float]:
        return [sign * value for sign, value in zip(signs, trial.values, strict=True)]

    def is_dominated(trial: FrozenTrial) -> bool:
        mine = losses(trial)
        others = (losses(other) for other in complete)
        return any(
            all(o <= m for o, m in zip(other, mine, strict=True)) and other != mine for other in others
        )

    return sorted(complete, key=lambda t: (len(signs) > 1 and is_dominated(t), losses(t), t.number))


def front(study: ReadStudy) -> list[FrozenTrial]:
    """The best trial, or the Pareto front of several metrics."""
    found = ranked(study)
    if len(study.config.metric) == 1:
        return found[:1]
    numbers = {trial.number for trial in study.study.best_trials}
    return [trial for trial in found if trial.number in numbers]


def row(study: ReadStudy, trial: FrozenTrial) -> dict[str, Any]:
    """A trial as it stands in trials.csv."""
    outcome = trial.user_attrs.get(OUTCOME, {})
    values = trial.values if trial.state == TrialState.COMPLETE else [None] * len(study.config.metric)
    params = dict.fromkeys(study.config.space) | point_of(trial, study.config.space)
    return {
        "number": trial.number,
        "state": trial.state.name,
        "reason": trial.user_attrs.get(REASON),
        **dict(zip(study.config.metric, values or [], strict=True)),
        **params,
        "steps": outcome.get("global_step"),
        "train_s": outcome.get("train_s"),
        "num_params": outcome.get("num_params"),
        **({"history": json.dumps(history(trial))} if study.config.population else {}),
        "words": shlex.join(words(study, trial)),
    }


def words(study: ReadStudy, trial: FrozenTrial) -> list[str]:
    """Those of ``hrm-ray train`` that repeat a trial, under a name of its own."""
    own = trial.user_attrs.get(WORDS) or Points(study.config).words(point_of(trial, study.config.space))
    return [*own, f"run_name={study.config.run_name}-{trial.number:04d}"]


def table(study: ReadStudy) -> list[dict[str, Any]]:
    """All rows of trials.csv."""
    return [row(study, trial) for trial in study.trials() if trial.state != TrialState.WAITING]


def write_table(folder: Storage, study: ReadStudy) -> list[dict[str, Any]]:
    """Write trials.csv and best.yaml; returns the rows."""
    rows = table(study)
    folder.write(TABLE, _csv(rows))
    chosen = [describe(folder, study, trial) for trial in front(study)]
    if chosen:
        best = chosen[0] if len(study.config.metric) == 1 else chosen
        folder.write(BEST, yaml.safe_dump(best, sort_keys=False, width=1000).encode())
    return rows


def _csv(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue().encode()


def is_table(study: ReadStudy, content: bytes) -> bool:
    """Whether `content` is a trials.csv of this study in our layout: no column more, no other separator."""
    try:
        rows = list(csv.DictReader(io.StringIO(content.decode(), newline="")))
    except (UnicodeDecodeError, csv.Error):
        return False
    columns = next((list(row) for row in table(study)), None)
    same_columns = not rows or columns is None or list(rows[0]) == columns
    return same_columns and not any(None in row for row in rows) and _csv(rows) == content


def describe(folder: Storage, study: ReadStudy, trial: FrozenTrial) -> dict[str, Any]:
    """A trial as it stands in best.yaml."""
    repeating = words(study, trial)
    return {
        "number": trial.number,
        "values": dict(zip(study.config.metric, trial.values, strict=True)),
        "params": point_of(trial, study.config.space),
        **({"history": history(trial)} if history(trial) else {}),
        "words": repeating,
        "command": f"hrm-ray train {shlex.join(repeating)}",
        "run": str(folder / trial_name(trial.number)),
    }


def summarise(
    folder: Storage,
    study: ReadStudy,
    rows: list[dict[str, Any]],
    spent: Spent,
) -> dict[str, Any]:
    """What summary.json holds."""
    ending = study.study.user_attrs.get(ENDING) or {}
    states = {state.name: len(study.trials(state)) for state in (*ENDED, TrialState.RUNNING)}
    config = study.config
    return {
        "num_trials": study.num_trials,
        "states": states,
        "finished": sum(states[state.name] for state in ENDED) >= study.num_trials,
        "stop_reason": ending.get("stop_reason"),
        "metric": dict(config.metric),
        "best": [describe(folder, study, trial) for trial in front(study)],
        "seeds": over_seeds(study, rows),
        "num_steps": sum(r["steps"] or 0 for r in rows),
        "repeat": ending.get("repeat"),
        "spent": {**vars(spent), "money": spent.money(config.price)},
        "estimate": study.study.user_attrs.get(ESTIMATE),
    }


def over_seeds(study: ReadStudy, rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]] | None:
    """Of a sweep over seeds the `spread` of every metric; None of others, and before two trials are complete."""
    if not study.is_over_seeds:
        return None
    found = {}
    for metric in study.config.metric:
        values = [row[metric] for row in rows if row.get(metric) is not None and math.isfinite(row[metric])]
        if len(values) > 1:
            found[metric] = spread(values)
    return found or None


def write(folder: Storage, study: ReadStudy, summary: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write summary.json, the plots and the page."""
    folder.write(SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())
    pngs = plots(study)
    for name, png in pngs.items():
        folder.write(f"{PLOTS}/{name}.png", png)
    folder.write(PAGE, page(study, summary, rows, pngs).encode())
