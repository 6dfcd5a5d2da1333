"""What came of a sweep, as files: trials.csv, best.yaml, summary.json and the page. All of it follows from the study."""

import csv
import io
import json
import shlex
from typing import Any

import yaml
from optuna.trial import FrozenTrial, TrialState

from hrm_ray.training.storage import Storage
from hrm_ray.tuning.estimate import Spent
from hrm_ray.tuning.points import Points
from hrm_ray.tuning.study import ENDED, ESTIMATE, OUTCOME, REASON, SweepStudy

TABLE = "trials.csv"
BEST = "best.yaml"
SUMMARY = "summary.json"


def ranked(study: SweepStudy) -> list[FrozenTrial]:
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


def front(study: SweepStudy) -> list[FrozenTrial]:
    """The best trial, or the Pareto front of several metrics."""
    found = ranked(study)
    if len(study.config.metric) == 1:
        return found[:1]
    numbers = {trial.number for trial in study.study.best_trials}
    return [trial for trial in found if trial.number in numbers]


def row(study: SweepStudy, points: Points, trial: FrozenTrial) -> dict[str, Any]:
    """A trial as it stands in trials.csv."""
    outcome = trial.user_attrs.get(OUTCOME, {})
    values = trial.values if trial.state == TrialState.COMPLETE else [None] * len(study.config.metric)
    params = {key: trial.params.get(key) for key in study.config.space}
    return {
        "number": trial.number,
        "state": trial.state.name,
        "reason": trial.user_attrs.get(REASON),
        **dict(zip(study.config.metric, values or [], strict=True)),
        **params,
        "steps": outcome.get("global_step"),
        "train_s": outcome.get("train_s"),
        "num_params": outcome.get("num_params"),
        "words": shlex.join(words(study, points, trial)),
    }


def words(study: SweepStudy, points: Points, trial: FrozenTrial) -> list[str]:
    """Those of ``hrm-ray train`` that repeat a trial, under a name of its own."""
    point = {key: trial.params[key] for key in study.config.space if key in trial.params}
    return [*points.words(point), f"run_name={study.config.run_name}-{trial.number:04d}"]


def write_table(folder: Storage, study: SweepStudy, points: Points) -> list[dict[str, Any]]:
    """Write trials.csv and best.yaml; returns the rows."""
    rows = [row(study, points, trial) for trial in study.trials() if trial.state != TrialState.WAITING]
    text = io.StringIO()
    if rows:
        table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    folder.write(TABLE, text.getvalue().encode())
    chosen = [describe(folder, study, points, trial) for trial in front(study)]
    if chosen:
        best = chosen[0] if len(study.config.metric) == 1 else chosen
        folder.write(BEST, yaml.safe_dump(best, sort_keys=False, width=1000).encode())
    return rows


def describe(folder: Storage, study: SweepStudy, points: Points, trial: FrozenTrial) -> dict[str, Any]:
    """A trial as it stands in best.yaml."""
    repeating = words(study, points, trial)
    return {
        "number": trial.number,
        "values": dict(zip(study.config.metric, trial.values, strict=True)),
        "params": dict(trial.params),
        "words": repeating,
        "command": f"hrm-ray train {shlex.join(repeating)}",
        "run": str(folder / f"trial-{trial.number:04d}"),
    }


def write(
    folder: Storage, study: SweepStudy, points: Points, spent: Spent, stop_reason: str | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Write all files; returns the summary and the rows."""
    rows = write_table(folder, study, points)
    states = {state.name: len(study.trials(state)) for state in (*ENDED, TrialState.RUNNING)}
    config = study.config
    summary = {
        "num_trials": study.num_trials,
        "states": states,
        "finished": sum(len(study.trials(state)) for state in ENDED) >= study.num_trials,
        "stop_reason": stop_reason,
        "metric": dict(config.metric),
        "best": [describe(folder, study, points, trial) for trial in front(study)],
        "num_steps": sum(r["steps"] or 0 for r in rows),
        "spent": {**vars(spent), "money": spent.money(config.price)},
        "estimate": study.study.user_attrs.get(ESTIMATE),
    }
    folder.write(SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())
    return summary, rows
