"""A sweep on a terminal: one live table; in a log, a line for every trial that has ended."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.live import Live as LiveDisplay
from rich.table import Table

from hrm_ray.config.validate import as_text
from hrm_ray.tuning.config import SweepConfig
from hrm_ray.tuning.estimate import Estimate, Spent, duration
from hrm_ray.tuning.execute import Live, Slot
from hrm_ray.tuning.lineage import point_of
from hrm_ray.tuning.outline import Outline
from hrm_ray.tuning.report import PAGE, front
from hrm_ray.tuning.study import ENDED, OUTCOME, REASON, ReadStudy, SweepStudy, num_trials_of
from hrm_ray.tuning.sweep import SweepResult
from hrm_ray.tuning.view import View

STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
}


STOPPED = {
    "signal": "stopped by a signal, with checkpoints;",
    "asked": "stopped, with checkpoints;",
    "budget": "the budget is spent; with a larger one",
}


class ConsoleView(View):
    """On standard error."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._display: LiveDisplay | None = None
        self._started = time.monotonic()
        self._num_ended = 0  # in this command

    def outline(self, config: SweepConfig, outline: Outline, slot: Slot, found: Estimate) -> None:
        for line in outline_lines(config, outline, slot, found):
            self._console.print(line, markup=False)

    def say(self, text: str) -> None:
        self._console.print(text, markup=False)

    @contextmanager
    def live(self) -> Iterator[None]:
        self._started = time.monotonic()
        if not self._console.is_terminal:
            yield
            return
        with LiveDisplay(console=self._console, refresh_per_second=2, transient=True) as self._display:
            yield
        self._display = None

    def show(self, study: SweepStudy, live: list[Live], spent: Spent) -> None:
        if self._display is not None:
            self._display.update(self._table(study, live, spent))

    def ended(self, study: SweepStudy, number: int) -> None:
        self._num_ended += 1
        best = front(study)
        text = trial_line(study, study.trials()[number])
        if best:
            text += f"; best {values_text(study, best[0])} (trial {best[0].number})"
        self._console.print(text, markup=False)

    def _table(self, study: SweepStudy, live: list[Live], spent: Spent) -> Table:
        ended = len(study.trials(*ENDED))
        best = front(study)
        title = f"{study.config.run_name}: {ended} of {study.num_trials} trials, {spent.describe(study.config.price)}"
        if best:
            title += f"; best {values_text(study, best[0])} (trial {best[0].number}: {params_text(study, best[0])})"
        left = self._left(study, ended)
        caption = f"about {duration(left)} left; Ctrl-C stops with checkpoints" if left else None
        table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
        rungs = study.rungs
        for name in ("trial", "step", "of", "rung", "", study.config.watched, "values"):
            table.add_column(name)
        trials = study.trials()
        for trial in sorted(live, key=lambda trial: trial.number):
            seen = study.seen(trials[trial.number])
            watched = f"{seen[max(seen)]:.4g}" if seen else ""
            rung = f"{sum(step <= trial.step for step in rungs)}/{len(rungs)}" if rungs else ""
            row = (str(trial.number), str(trial.step), str(trial.last_step), rung, trial.phase, watched)
            table.add_row(*row, params_text(study, trials[trial.number]))
        return table

    def _left(self, study: SweepStudy, ended: int) -> float | None:
        """Seconds, as the trials of this command have gone."""
        if not self._num_ended:
            return None
        return (time.monotonic() - self._started) / self._num_ended * (study.num_trials - ended)


def outline_lines(config: SweepConfig, outline: Outline, slot: Slot, found: Estimate) -> list[str]:
    """What a sweep will do, for a person."""
    width = max(len(key) for key in config.space)
    lines = [f"train   {' '.join(config.train)}"]
    for number, (key, values) in enumerate(config.space.items()):
        lines.append(f"{'space' if number == 0 else '':7} {key:{width}}  {values.describe()}")
    metric = ", ".join(f"{name} ({direction})" for name, direction in config.metric.items())
    lines.append(f"metric  {metric}")
    num_trials = num_trials_of(config)
    pruner = (config.prunes or {}).get("name", "none") if config.population is None else "population"
    lines.append(f"trials  {num_trials}, sampler {config.sampler['name']}, pruner {pruner}")
    for step, part in outline.rungs:
        about = "all" if part == 1 else f"about {max(1, round(num_trials * part))}"
        lines.append(f"rung    {about} of them train to step {step}")
    lines.append(f"each    {slot.describe()}")
    probe = found.probe
    lines.append(
        f"probe   {probe.step_s:.3g} s a step, {probe.eval_s:.3g} s an evaluation, {probe.start_s:.3g} s to start"
    )
    lines.append(f"takes   about {found.spent.describe(config.price)}, {found.num_steps:,} steps")
    if outline.refused:
        share = f"{len(outline.refused)} of {outline.num_sampled}"
        lines.append(f"note: {share} points that were tried are refused, such as: {outline.refused[0]}")
    return lines


def trial_line(study: ReadStudy, trial: FrozenTrial) -> str:
    """What became of a trial, in one line."""
    outcome = trial.user_attrs.get(OUTCOME, {})
    reason = trial.user_attrs.get(REASON)
    if trial.state == TrialState.COMPLETE:
        parts = [f"trial {trial.number} complete: {values_text(study, trial)}"]
    elif trial.state == TrialState.PRUNED:
        parts = [f"trial {trial.number} {reason}"]
    else:
        parts = [f"trial {trial.number} {STATES[trial.state]}: {reason}"]
    if outcome.get("global_step") and not str(reason).endswith(f" {outcome['global_step']}"):
        parts.append(f"{outcome['global_step']} steps")
    parts.append(params_text(study, trial))
    return ", ".join(parts)


def values_text(study: ReadStudy, trial: FrozenTrial) -> str:
    """ "exact_accuracy 0.976"."""
    names = [name.rpartition("/")[2] for name in study.config.metric]
    return ", ".join(f"{name} {value:.4g}" for name, value in zip(names, trial.values, strict=True))


def params_text(study: ReadStudy, trial: FrozenTrial) -> str:
    """ "lr=0.003 arch=trm", numbers shortened."""
    point = point_of(trial, study.config.space)
    return " ".join(f"{key}={_short(value)}" for key, value in point.items())


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else as_text(value)


def ending(result: SweepResult) -> list[str]:
    """What a person reads when a sweep has ended."""
    summary = result.summary
    lines = [f"{result.folder}: {states_text(summary)}; took {_took(summary)}"]
    if summary["stop_reason"] is not None:
        lines.append(
            f"{STOPPED.get(summary['stop_reason'], summary['stop_reason'])} the same command continues"
        )
    for metric, found in (summary["seeds"] or {}).items():
        lines.append(f"{metric} {mean_text(found)}, standard deviation {found['std']:.2g}")
    several = len(summary["metric"]) > 1
    for best in summary["best"]:
        values = ", ".join(f"{name} {value:.4g}" for name, value in best["values"].items())
        lines.append(f"{'front' if several else 'best'}: trial {best['number']}, {values}")
        lines.append(f"  {best['command']}")
    for row in summary["repeat"] or []:
        lines.append(
            f"trial {row['number']}: {row['value']:.4g} in the sweep, {mean_text(row)} with other seeds; the sweep "
            f"overrated it by {row['curse']:.4g}"
        )
    lines.append(f"look at {result.folder / PAGE}")
    return lines


def _took(summary: dict[str, Any]) -> str:
    spent, estimate = summary["spent"], summary["estimate"]
    text = f"{duration(spent['wall_s'])} ({duration(spent['cpu_s'])} of CPUs)"
    return f"{text}, estimated {duration(estimate['wall_s'])}" if estimate else text


def states_text(summary: dict[str, Any]) -> str:
    """ "32 of 32 trials: 9 complete, 23 pruned"."""
    names = {state.name: text for state, text in STATES.items()}
    counts = [f"{count} {names[name]}" for name, count in summary["states"].items() if count]
    ended = sum(count for name, count in summary["states"].items() if name != TrialState.RUNNING.name)
    return f"{ended} of {summary['num_trials']} trials: {', '.join(counts) or 'none yet'}"


def _state(name: str, is_running: bool) -> str:
    state = TrialState[name]
    return "to be continued" if state == TrialState.RUNNING and not is_running else STATES[state]


def mean_text(row: dict[str, Any]) -> str:
    """ "0.97 ± 0.01 (95 % of the mean, 3 runs)"."""
    half = "" if row["half_width"] is None else f" ± {row['half_width']:.2g}"
    return f"{row['mean']:.4g}{half} (95 % interval of the mean, {len(row['values'])} runs)"


def promoted_lines(found: dict[str, Any]) -> list[str]:
    """What came of ``tune promote``."""
    lines = [f"{run}" for run in found["runs"]]
    if found["values"]:
        lines.append(f"{found['metric']} {mean_text(found)}")
    return lines


def print_status(study: ReadStudy, summary: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """How a sweep stands, on standard output."""
    console = Console(highlight=False, soft_wrap=True)
    is_running = "running" if summary["is_running"] else "not running"
    console.print(
        f"{study.config.run_name} ({is_running}): {states_text(summary)}; took {_took(summary)}", markup=False
    )
    table = Table()
    keys = list(study.config.space)
    columns = ["number", "state", *study.config.metric, *keys, "steps", "reason"]
    for name in columns:
        table.add_column(name)
    best = {row["number"] for row in summary["best"]}
    for row in rows:
        row = {**row, "state": _state(row["state"], summary["is_running"])}
        shown = [_short(row[name]) if row[name] is not None else "" for name in columns]
        table.add_row(*shown, style="bold" if row["number"] in best else None)
    console.print(table)
    for chosen in summary["best"]:
        console.print(f"best: {chosen['command']}", markup=False)
