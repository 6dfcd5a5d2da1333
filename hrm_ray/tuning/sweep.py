"""Runs a sweep: starts or continues it, reports progress, and writes the results.

STORAGE/RUN_NAME/
    sweep.yaml       the sweep, as it was given
    study.log        the Optuna study, the only state (unless study=URL)
    trial-0007/      an ordinary run
    trials.csv       a row a trial
    best.yaml        the best trial, with the words that repeat it
    summary.json     what came of the sweep, and what it took
    index.html       the same to look at, with plots
"""

import hashlib
import shlex
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import yaml
from optuna.trial import TrialState
from ray.tune.schedulers import TrialScheduler

from hrm_ray.config.schema import TrainConfig
from hrm_ray.config.validate import read_yaml, validated
from hrm_ray.data.files import writing
from hrm_ray.errors import RunFailed, UserError
from hrm_ray.every import Every
from hrm_ray.nodes import Growth, waiting_for
from hrm_ray.ray_metrics import SweepMetrics
from hrm_ray.ray_session import check_cluster
from hrm_ray.remote import StorageError
from hrm_ray.storage.lock import LeaseLost
from hrm_ray.storage.storage import Storage, numbered
from hrm_ray.training.checkpoint import discard_all
from hrm_ray.training.logging import is_dumped, keep_changed
from hrm_ray.training.signals import StopRequest
from hrm_ray.tuning import report
from hrm_ray.tuning.config import Repeat, SweepConfig, plain, with_settings
from hrm_ray.tuning.estimate import Probe, Spent
from hrm_ray.tuning.execute import ALIKE, Book, Executor, Live, Slot, check_fits, session
from hrm_ray.tuning.explore import changeable
from hrm_ray.tuning.lineage import drop_unknown, history, point_of
from hrm_ray.tuning.outline import Outline, check_budget, slot_of
from hrm_ray.tuning.points import OF_THE_SWEEP, Points, value_of
from hrm_ray.tuning.runs import Planned, RunsBook, at_full_length, other_seeds, with_seed, without
from hrm_ray.tuning.space import Point, words_of
from hrm_ray.tuning.statistics import spread
from hrm_ray.tuning.study import (
    ENDED,
    ENDING,
    ESTIMATE,
    LOG,
    OUTCOME,
    SPENT,
    WORDS,
    SweepStudy,
    earlier,
    forget_stop,
    mend,
    num_trials_of,
    trial_name,
)
from hrm_ray.tuning.view import View

CONFIG_FILE = "sweep.yaml"
WRITTEN = (CONFIG_FILE, report.TABLE, report.BEST, report.SUMMARY, report.PAGE)
FILES = (*WRITTEN, LOG, "lock")
TAKEN_OVER = "taken over"  # why a sweep ends that another driver continues
LOCK_S = 20.0  # workers of a killed driver live on for some seconds
NOTE_S = 10.0  # how often what was spent is written down
BY_HAND = "stopped by hand"


@dataclass(frozen=True)
class SweepResult:
    """What came of a sweep.

    Attributes:
        folder: where it lies.
        summary: what summary.json holds: `num_trials`, `states`, `best`, `stop_reason`, `spent`, ...
        trials: a mapping a trial, as the rows of trials.csv.
        stopped_by: the signal that stopped it, if one did.
    """

    folder: Storage
    summary: dict[str, Any]
    trials: list[dict[str, Any]]
    stopped_by: int | None

    @property
    def best(self) -> dict[str, Any] | None:
        """The best trial; of several metrics the first of those that none is better than in all; None without any."""
        return (self.summary["best"] or [None])[0]


def sweep_folder(config: SweepConfig) -> Storage:
    """STORAGE/RUN_NAME."""
    return Storage(config.storage) / (config.run_name or "sweep")


def new_name(config: SweepConfig) -> SweepConfig:
    """The same sweep under the first name that is free: NAME-2, NAME-3, ..."""
    number, chosen = 2, config
    while sweep_folder(chosen).exists():
        chosen = config.model_copy(update={"run_name": f"{config.run_name}-{number}"})
        number += 1
    return chosen


class SweepBook(Book):
    """The trials of the study.

    Args:
        study: of the sweep.
        points: what its points mean.
        folder: of the sweep.
        view: called with every trial that has ended.
        changeable: keys that change in the members of a population.
    """

    def __init__(
        self,
        study: SweepStudy,
        points: Points,
        folder: Storage,
        view: View,
        changeable: Sequence[str] = (),
    ):
        self.study, self.points, self.folder, self.view = study, points, folder, view
        self.changeable = changeable
        self.config = points.config
        self.takes_turns = self.config.population is not None
        self.max_concurrent = self.study.config.max_concurrent
        self._cleared: set[int] = set()
        self._last_steps: dict[int, int] = {}

    def next(self) -> Live | None:
        while True:
            following = self.study.next_trial()
            if following is None:
                return None
            number, _ = following
            trial = self.study.trials()[number]
            point = point_of(trial, self.config.space)
            try:
                if WORDS not in trial.user_attrs:
                    self._make_place(number)
                self.note_words(number, point)
                run = self.run_of(number, point)
            except UserError as error:  # Refused, or the place is taken
                self.study.fail(number, str(error))
                self._ended(number)
                continue
            last_step = self._last_steps[number] = self.points.plan(run).last_step
            copy = len(history(trial))
            drop_unknown(self.folder / trial_name(number), copy)
            return Live(number, run, last_step, " ".join(words_of(point)), copy=copy)

    def _make_place(self, number: int) -> None:
        """A new trial begins in a folder that is not there yet: what somebody has put there is kept under another name.

        Raises:
            UserError: it cannot be renamed on this storage.
        """
        name = trial_name(number)
        if name in self.folder.entries():
            aside = (self.folder / name).set_aside("before")
            self.view.say(f"{self.folder / name} is of no trial of this sweep; it is kept as {aside.name}")

    def note_words(self, number: int, point: Point) -> None:
        """By which a trial runs from now on; with other resources later trials have others."""
        self.study.note(number, WORDS, self.points.words(point))

    def run_of(self, number: int, point: Point) -> TrainConfig:
        """The run of a trial. Raises Refused if its point cannot be."""
        return self.points.run(point, str(self.folder), trial_name(number))

    def scheduler(self, executor: Executor) -> TrialScheduler:
        if self.config.population is None:
            return super().scheduler(executor)
        from hrm_ray.tuning.population import Evolves

        return Evolves(executor, self)

    @property
    def num_to_come(self) -> int:
        return self.study.num_to_come

    def is_over(self) -> bool:
        return self.study.is_over

    @property
    def metrics(self) -> list[str]:
        return sorted({*self.config.metric, self.config.watched})

    def report(self, number: int, step: int, metrics: dict[str, float]) -> str | None:
        watched = self.config.watched
        if watched not in metrics:
            return None
        if not self.study.report(number, step, metrics[watched]):
            return None  # it was decided about before
        prunes = self.study.should_prune(number) and step < self._last_steps[number]
        return f"pruned at step {step}" if prunes else None

    def end(self, live: Live, outcome: dict[str, Any]) -> None:
        number, study = live.number, self.study
        summary = outcome.get("summary") or {}
        took = {key: summary.get(key) for key in ("global_step", "train_s", "num_params", "stop_reason")}
        study.note(number, OUTCOME, took if summary else {"global_step": live.step})
        if outcome["kind"] == "pruned":
            study.prune(number, outcome["reason"])
        elif outcome["kind"] in ("refused", "failed"):
            study.fail(number, outcome["reason"])
        else:
            values = {name: value_of(summary, name) for name in self.config.metric}
            missing = [name for name, value in values.items() if value is None]
            if missing:
                study.fail(number, f"its run has not reported {missing[0]}")
            else:
                study.complete(number, [float(value) for value in values.values() if value is not None])
        self._ended(number)

    def _ended(self, number: int) -> None:
        report.write_table(self.folder, self.study)
        self.view.ended(self.study, number)

    def clear(self, wait_s: float = 0.0) -> None:
        """Delete the checkpoints that are not to be kept, of runs that have ended."""
        for number in unwanted(self.study) - self._cleared:
            run = self.folder / trial_name(number)
            if not run.exists():
                self._cleared.add(number)
                continue
            try:
                lock = run.lock(wait_s)
            except UserError:  # it is still writing its last one
                continue
            discard_all(run)  # with the lock held: a run that is pruned may not have had any yet
            self._cleared.add(number)
            lock.close()


def unwanted(study: SweepStudy) -> set[int]:
    """Trials whose checkpoints are not to be kept."""
    keep = study.config.keep
    if keep == "all":
        return set()
    complete = report.ranked(study)
    kept = {trial.number for trial in (complete if keep == "finished" else complete[:keep])}
    kept |= {t.number for t in study.trials(TrialState.PRUNED) if t.user_attrs.get("reason") == BY_HAND}
    return {trial.number for trial in study.trials(*ENDED)} - kept


class Driver:
    """The one process that drives a sweep: its clock, its budget, and requests from other processes.

    Args:
        book: of the sweep.
        signals: by which its user stops it.
        slot: what each trial takes.
        view: shows how it goes.
        metrics: show it to Prometheus.
    """

    def __init__(self, book: SweepBook, signals: StopRequest, slot: Slot, view: View, metrics: SweepMetrics):
        self._book, self._signals, self._slot, self._view = book, signals, slot, view
        self._metrics = metrics
        self._study = book.study
        self.spent = Spent(**self._study.study.user_attrs.get(SPENT, {}))
        self._asked = False
        self._ticked = time.monotonic()
        self._due_note = Every(NOTE_S)

    def why_stop(self) -> str | None:
        """Why the sweep is to end with what it has; None to go on."""
        try:
            self._book.folder.check_held()
        except LeaseLost:
            return TAKEN_OVER
        except StorageError:  # it may answer again; until then nothing is written
            pass
        if self._signals.reason() is not None:
            return "signal"
        if self._asked:
            return "asked"
        config = self._study.config
        return "budget" if self.spent.over(config.budget, config.price) else None

    def tick(self, live: list[Live]) -> None:
        """What is to be done every second."""
        now = time.monotonic()
        self.spent.add(now - self._ticked, sum(trial.started is not None for trial in live), self._slot)
        self._ticked = now
        self._take_wishes(live)
        if self._due_note():
            self.note()
            self._measure(live)
        self._book.clear()
        self._view.show(self._study, live, self.spent)

    def _measure(self, live: list[Live]) -> None:
        found = Counter(trial.state for trial in self._study.trials())
        begun = found.pop(TrialState.RUNNING, 0) + found.pop(TrialState.WAITING, 0)
        num_running = sum(trial.started is not None for trial in live)  # the finalists' repeats too
        self._metrics.trials(
            {state.name: found[state] for state in ENDED}
            | {"running": num_running, "waiting": max(0, begun - num_running)}
        )
        for trial in report.front(self._study)[:1]:
            self._metrics.best(dict(zip(self._book.config.metric, trial.values, strict=True)))

    def note(self) -> None:
        """Write down what was spent."""
        self._study.study.set_user_attr(SPENT, asdict(self.spent))

    def _take_wishes(self, live: list[Live]) -> None:
        wanted = self._study.wanted()
        self._asked = self._asked or wanted["stop"] is True
        for trial in live:
            if isinstance(wanted["stop"], list) and trial.number in wanted["stop"]:
                trial.end = {"kind": "pruned", "reason": BY_HAND}
        if wanted["settings"]:
            self._study.config = with_settings(self._study.config, wanted["settings"])
            self._book.max_concurrent = self._study.config.max_concurrent


@contextmanager
def _held(folder: Storage, say: Callable[[str], object] = lambda text: None) -> Iterator[Storage]:
    """Inside, no other driver is at work on the sweep; yields its folder, to be written by this process alone."""
    was_there = folder.exists()
    folder.check_places(files=FILES, folders=[report.PLOTS])
    if folder.local_path is not None:
        with writing(folder.local_path, "choose another storage="):
            folder.local_path.mkdir(parents=True, exist_ok=True)
    else:
        folder.create()
    taken = f"another process is at work on the sweep {folder}; stop it, or choose another run_name="
    lock = folder.lock(LOCK_S, taken, say=say)
    if lock.weakness:
        say(lock.weakness)
    try:
        yield folder.held_by(lock)
    finally:
        lock.close()
        if not was_there and folder.local_path is not None and [*folder.entries()] == ["lock"]:
            folder.delete_file("lock")
            folder.delete_if_empty()  # it never began


def run_sweep(
    config: SweepConfig,
    *,
    given: Collection[str] = (),
    yes: bool = False,
    dry_run: bool = False,
    view: View | None = None,
) -> SweepResult | None:
    """Begin or continue a sweep.

    Args:
        given: which of `SETTABLE` the user has given now; the others keep what `tune set` gave.
        yes: go on though the estimate exceeds the budget.
        dry_run: tell what would be done, and return None.
        view: what its user reads; None: nothing.

    Raises:
        UserError: a mistake in it, before a trial starts.
        RunFailed: three trials failed with the same error.
    """
    view = view or View()
    outline = Outline.of(config)
    changes = changeable(outline.points, outline.last_step) if config.population is not None else []
    folder = sweep_folder(config)
    check_cluster()
    signals = StopRequest()
    with signals.listening(), ExitStack() as stack:
        if not dry_run:
            folder = stack.enter_context(_held(folder, view.say))
            forget_stop(folder, config)
        grows = stack.enter_context(session())
        slot = slot_of(config, grows)
        check_fits(slot, grows)
        if (waits := waiting_for(slot.bundle, slot.num_workers, grows)) is not None:
            view.say(waits)
        if dry_run:
            found = outline.estimate(slot, grows, signals.reason)
            view.outline(config, outline, slot, found)
            check_budget(found, config, yes)
            return None
        study = _opened(folder, config, given, yes, outline, slot, grows, view, signals)
        book = SweepBook(study, Points(config, slot.gpus), folder, view, changes)
        metrics = stack.enter_context(SweepMetrics(folder.name))
        driver = Driver(book, signals, slot, view, metrics)
        executor = Executor(book, slot, grows=grows, stop=driver.why_stop, on_tick=driver.tick)
        repeated = None
        try:
            if not book.is_over():
                with view.live():
                    executor.run()
            if book.is_over() and executor.why_stop() is None and config.repeat is not None:
                repeated, executor.stop_reason = _repeat(config.repeat, book, driver, slot, grows)
        finally:
            if executor.stop_reason == TAKEN_OVER:
                folder.check_held()
            driver.note()
            book.clear(wait_s=10)
            rows = report.write_table(folder, study)
            ending = {"stop_reason": executor.stop_reason, "repeat": repeated}
            study.study.set_user_attr(ENDING, ending)
            summary = report.summarise(folder, study, rows, driver.spent)
            report.write(folder, study, summary, rows)
    if executor.error is not None:
        raise executor.error
    if executor.stop_reason == "failures":
        raise RunFailed(
            f"{ALIKE} trials failed with the same error: {executor.last_failure}; "
            "fix it, and the same command continues"
        )
    return SweepResult(folder, summary, rows, signals.signal)


def _opened(
    folder: Storage,
    config: SweepConfig,
    given: Collection[str],
    yes: bool,
    outline: Outline,
    slot: Slot,
    grows: Growth | None,
    view: View,
    signals: StopRequest,
) -> SweepStudy:
    """The study of a sweep, begun if it is not there; its budget holds."""
    mend(folder)
    before = earlier(folder, config)
    if before is None:
        _check_empty(folder)
        before = {}
    estimated = before.get(ESTIMATE)
    if estimated is None or estimated.get("num_trials", 0) < num_trials_of(config):
        found = outline.estimate(slot, grows, signals.reason, estimated and Probe.of(estimated))
        view.outline(config, outline, slot, found)
        check_budget(found, config, yes)
        estimated = found.plain()
    study = SweepStudy(
        folder, config, first_step=outline.first_step, last_step=outline.last_step, given=given
    )
    study.study.set_user_attr(ESTIMATE, estimated)
    for name in (CONFIG_FILE, report.TABLE, report.BEST, report.SUMMARY):
        is_ours = partial(report.is_table, study) if name == report.TABLE else is_dumped
        if (copy := keep_changed(folder, name, is_ours)) is not None:
            view.say(
                f"{folder}/{name} has been changed, and is written again; as it was, it is kept as {copy}"
            )
    folder.write(CONFIG_FILE, yaml.safe_dump(plain(config), sort_keys=False).encode())
    return study


def _check_empty(folder: Storage) -> None:
    """Raise UserError if a new study would begin over the trials of another one, or over something else's files."""
    names = folder.entries()
    if numbered(names, "trial-"):
        raise UserError(
            f"{folder} holds trials, but their study is missing or another one; give the same study=, restore "
            "study.log, or choose another run_name="
        )
    if found := [name for name in WRITTEN if name in names]:
        raise UserError(
            f"{folder} holds {found[0]}, which a new sweep would write over; move it away, or choose another run_name="
        )


def _repeat(
    repeat: Repeat, book: SweepBook, driver: Driver, slot: Slot, grows: Growth | None
) -> tuple[list[dict[str, Any]], str | None]:
    """Train the finalists with other seeds.

    Returns:
        a mapping a finalist, by the mean of the new runs, the best first; and why it stopped early, if it did.
    """
    (metric, direction), *_ = book.config.metric.items()
    finalists = report.ranked(book.study)[: repeat.top]
    words = {trial.number: report.words(book.study, trial) for trial in finalists}
    planned = [
        Planned(number, f"repeat-{number:04d}-seed-{seed}", with_seed(own, seed))
        for number, own in words.items()
        for seed in other_seeds(own, repeat.seeds)
    ]
    runs = RunsBook(planned, book.folder, book.points, metric, book.view)
    stopped = run_all(runs, slot, grows, driver.why_stop, driver.tick)
    sign = 1 if direction == "maximize" else -1
    found = []
    for trial in finalists:
        values = [
            v for plan in planned if plan.number == trial.number and (v := runs.value(plan)) is not None
        ]
        if values:
            curse = sign * (trial.values[0] - spread(values)["mean"])
            found.append({"number": trial.number, "value": trial.values[0], "curse": curse, **spread(values)})
    return sorted(found, key=lambda row: -sign * row["mean"]), stopped


def run_all(
    runs: RunsBook,
    slot: Slot,
    grows: Growth | None,
    stop: Callable[[], str | None],
    on_tick: Callable[[list[Live]], None] = lambda live: None,
) -> str | None:
    """Run what is planned; returns why it stopped early, if it did.

    Raises:
        RunFailed: runs fail alike.
        UserError: the data are gone, or the like.
    """
    executor = Executor(runs, slot, grows=grows, stop=stop, on_tick=on_tick)
    if not runs.is_over():
        executor.run()
    if executor.error is not None:
        raise executor.error
    if executor.stop_reason == "failures":
        raise RunFailed(f"{ALIKE} runs failed with the same error: {executor.last_failure}")
    return executor.stop_reason


def promote(
    folder: Storage, words: Sequence[str], *, seeds: int = 3, view: View | None = None
) -> dict[str, Any]:
    """Train the best trial of a sweep at full length, with several seeds.

    What shortens trials (`runs.SHORTENING`) is left out. The runs lie in the sweep's folder; the same command
    goes on.

    Args:
        words: more of ``hrm-ray train``, for all of the runs.

    Returns:
        `runs` (folders), `values`, their `mean`, `std` and `half_width`, `words`, and the signal `stopped_by`.

    Raises:
        UserError: no trial is complete, or a word does not fit.
    """
    view = view or View()
    config = config_of(folder)
    best = _best_of(folder)
    base = [*at_full_length(without(best["words"], ("seed", "run_name"))), *words]
    metric = next(iter(config.metric))
    for word in words:
        if (key := word.partition("=")[0]) in OF_THE_SWEEP:
            raise UserError(f"{key} is set by the sweep, also for promoted runs; leave it out")
    # Other words are other runs.
    other = f"-{hashlib.sha256(shlex.join(words).encode()).hexdigest()[:6]}" if words else ""
    name = f"promoted-{best['number']:04d}{other}"
    planned = [
        Planned(best["number"], f"{name}-seed-{seed}", [*base, f"seed={seed}"]) for seed in range(seeds)
    ]
    signals = StopRequest()
    with signals.listening(), session() as grows:
        slot = slot_of(config, grows)
        check_fits(slot, grows)
        runs = RunsBook(planned, folder, Points(config, slot.gpus), metric, view)
        for plan in planned:
            runs.run(plan)  # what does not fit is said now
        run_all(runs, slot, grows, signals.reason)
    if signals.signal is None and any(runs.value(plan) is None for plan in planned):
        raise RunFailed(
            f"{folder}: a promoted run has failed (see above); fix it, and the same command continues"
        )
    values = [value for plan in planned if (value := runs.value(plan)) is not None]
    return {
        "runs": [str(folder / plan.name) for plan in planned],
        "words": base,
        "metric": metric,
        **(spread(values) if values else {"values": []}),
        "stopped_by": signals.signal,
    }


def _best_of(folder: Storage) -> dict[str, Any]:
    """The best trial of a sweep, as best.yaml tells of it; of several the first."""
    content = folder.read(report.BEST)
    if content is None:
        raise UserError(f"{folder}: no trial is complete yet; let the sweep go on first")
    best = read_yaml(content, f"{folder}/{report.BEST}")
    best = best[0] if isinstance(best, list) and best else best
    words = best.get("words") if isinstance(best, dict) else None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UserError(
            f"{folder}/{report.BEST} has no list of words; the sweep's own command writes it again"
        )
    if type(best.get("number")) is not int:
        raise UserError(f"{folder}/{report.BEST} has no number; the sweep's own command writes it again")
    return best


def config_of(folder: Storage) -> SweepConfig:
    """The sweep that lies in a folder. Raises UserError if there is none."""
    content = folder.read(CONFIG_FILE)
    if content is None:
        raise UserError(
            f"{folder} is not a sweep (it has no {CONFIG_FILE}); give the folder that `hrm-ray tune` printed"
        )
    where = f"{folder}/{CONFIG_FILE}"
    values = read_yaml(content, where)
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{where} is damaged: not KEY: VALUE lines; the sweep's own command writes it again")
    return validated(SweepConfig, values, where)
