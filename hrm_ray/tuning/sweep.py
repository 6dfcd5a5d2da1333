"""A sweep for its user: begin or continue it, tell of it, and write down what came of it.

STORAGE/RUN_NAME/
    study.log        the Optuna study, the only state (unless study=URL)
    trial-0007/      an ordinary run
    trials.csv       a row a trial
    best.yaml        the best trial, with the words that repeat it
    summary.json     what came of the sweep, and what it took
    index.html       the same to look at, with plots
"""

import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from optuna.trial import TrialState

from hrm_ray.config.schema import TrainConfig
from hrm_ray.config.validate import validated
from hrm_ray.data.files import writing
from hrm_ray.errors import RunFailed, UserError
from hrm_ray.every import Every
from hrm_ray.training.checkpoint import FOLDER
from hrm_ray.training.plan import Plan
from hrm_ray.training.storage import Storage
from hrm_ray.training.trainer import StopRequest
from hrm_ray.tuning import report, samplers
from hrm_ray.tuning.config import SweepConfig
from hrm_ray.tuning.estimate import Estimate, Spent, estimate, probe
from hrm_ray.tuning.execute import ALIKE, Book, Executor, Live, Slot, check_fits, living_nodes, session
from hrm_ray.tuning.points import Points, checked, value_of
from hrm_ray.tuning.space import words_of
from hrm_ray.tuning.study import ENDED, ESTIMATE, OUTCOME, SPENT, SweepStudy, earlier, num_trials_of
from hrm_ray.tuning.view import View

LOCK_S = 20.0  # workers of a killed driver live on for some seconds
NOTE_S = 10.0  # how often what was spent is written down
SETTABLE = ("num_trials", "max_concurrent", "budget")  # of a sweep at work
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


def trial_name(number: int) -> str:
    """The folder of trial `number`."""
    return f"trial-{number:04d}"


class SweepBook(Book):
    """The trials of the study.

    Args:
        study: of the sweep.
        points: what its points mean.
        folder: of the sweep.
        view: told of every trial that has ended.
    """

    def __init__(self, study: SweepStudy, points: Points, folder: Storage, view: View):
        self.study, self.points, self.folder, self._view = study, points, folder, view
        self.config = points.config
        self.max_concurrent = self.study.config.max_concurrent
        self._cleared: set[int] = set()

    def next(self) -> Live | None:
        while True:
            following = self.study.next_trial()
            if following is None:
                return None
            number, point = following
            try:
                run = self.points.run(point, str(self.folder), trial_name(number))
            except UserError as error:
                self.study.fail(number, str(error))
                self._ended(number)
                continue
            self.max_failures = run.failure.max_failures
            return Live(number, run, self.points.plan(run).last_step, " ".join(words_of(point)))

    def is_over(self) -> bool:
        return len(self.study.trials(*ENDED)) >= self.study.num_trials

    @property
    def metrics(self) -> list[str]:
        return sorted({*self.config.metric, self.config.watched})

    def report(self, number: int, step: int, metrics: dict[str, float]) -> str | None:
        watched = self.config.watched
        if watched not in metrics:
            return None
        self.study.report(number, step, metrics[watched])
        return f"pruned at step {step}" if self.study.should_prune(number) else None

    def end(self, live: Live, outcome: dict[str, Any]) -> None:
        number, study = live.number, self.study
        summary = outcome.get("summary") or {}
        took = {key: summary.get(key) for key in ("global_step", "train_s", "num_params")}
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
        report.write_table(self.folder, self.study, self.points)
        self._view.ended(self.study, number)

    def clear(self, wait_s: float = 0.0) -> None:
        """Delete the checkpoints that are not to be kept, of runs that have ended."""
        for number in unwanted(self.study) - self._cleared:
            run = self.folder / trial_name(number)
            if run.local_path is not None and not (run.local_path / FOLDER).exists():
                self._cleared.add(number)
                continue
            try:
                lock = run.lock(wait_s)
            except UserError:  # it is still writing its last one
                continue
            (run / FOLDER).delete()
            self._cleared.add(number)
            if lock:
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
    """The one process that drives a sweep: its clock, its budget, and what others want of it.

    Args:
        book: of the sweep.
        signals: by which its user stops it.
        slot: what each trial takes.
        view: shows how it goes.
    """

    def __init__(self, book: SweepBook, signals: StopRequest, slot: Slot, view: View):
        self._book, self._signals, self._slot, self._view = book, signals, slot, view
        self._study = book.study
        self.spent = Spent(**self._study.study.user_attrs.get(SPENT, {}))
        self._asked = False
        self._ticked = time.monotonic()
        self._due_note = Every(NOTE_S)

    def why_stop(self) -> str | None:
        """Why the sweep is to end with what it has; None to go on."""
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
        self._book.clear()
        self._view.show(self._study, live, self.spent)

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


def with_settings(config: SweepConfig, settings: Mapping[str, Any]) -> SweepConfig:
    """`config` with some of its keys as another process has set them."""
    values = config.model_dump(mode="json", by_alias=True)
    return validated(SweepConfig, {**values, **settings}, "tune set")


@dataclass(frozen=True)
class Outline:
    """What is known of a sweep before it starts.

    Attributes:
        points: of it.
        run: one in the middle of the space.
        first_step, last_step: of all points that were looked at, the first with a value, and the longest.
        refused: reasons, of as many points of `num_sampled`.
    """

    points: Points
    run: TrainConfig
    first_step: int
    last_step: int
    refused: list[str]
    num_sampled: int

    @classmethod
    def of(cls, config: SweepConfig) -> "Outline":
        """Raises UserError if the sweep cannot run."""
        points = Points(config)
        sampled = checked(points)
        runs = [run for _, run in sampled if isinstance(run, TrainConfig)]
        plans = [points.plan(run) for run in runs]
        first = min(_first_step(plan, config.watched) for plan in plans)
        last = max(plan.last_step for plan in plans)
        samplers.pruner(config.prunes, first_step=first, last_step=last)  # an unknown one is said now
        refused = [run for _, run in sampled if isinstance(run, str)]
        return cls(points, runs[len(runs) // 2], first, last, refused, len(sampled))

    @property
    def rungs(self) -> list[tuple[int, float]]:
        return samplers.rungs(self.points.config.prunes, first_step=self.first_step, last_step=self.last_step)

    def estimate(self, slot: Slot) -> Estimate:
        """From a probe of the run in the middle, on the cluster."""
        config = self.points.config
        at_once = min(slot.trials_in(living_nodes()), config.max_concurrent or self.last_step)
        return estimate(
            probe(self.run, slot),
            self.points.plan(self.run),
            self.rungs,
            num_trials_of(config),
            slot,
            at_once,
        )


def _first_step(plan: Plan, metric: str) -> int:
    happens = plan.evaluates if metric.startswith("eval/") else plan.reports
    return next(step for step in range(1, plan.last_step + 1) if happens(step))


def slot_of(config: SweepConfig) -> Slot:
    """What a trial takes on the present cluster."""
    resources = config.resources
    gpus = resources.gpus
    if gpus == "auto":
        on_cpu = any(word == "device=cpu" for word in config.train)
        gpus = 0.0 if on_cpu or not any(node.get("GPU") for node in living_nodes()) else 1.0
    return Slot(resources.num_workers, resources.cpus, gpus)


def _check_budget(found: Estimate, config: SweepConfig, yes: bool) -> None:
    over = found.spent.over(config.budget, config.price)
    if over is not None and not yes:
        raise UserError(
            f"the sweep is estimated to take {found.spent.describe(config.price)}, more than budget.{over}; lower "
            "num_trials or max_steps, raise the budget, or add --yes to begin and end when it is spent"
        )


@contextmanager
def _held(folder: Storage) -> Iterator[None]:
    """Inside, no other driver is at work on the sweep."""
    if folder.local_path is not None:
        with writing(folder.local_path, "choose another storage="):
            folder.local_path.mkdir(parents=True, exist_ok=True)
    else:
        folder.create()
    lock = folder.lock(
        LOCK_S, f"another process is at work on the sweep {folder}; stop it, or choose another run_name="
    )
    try:
        yield
    finally:
        if lock:
            lock.close()
        if folder.local_path is not None and [p.name for p in folder.local_path.iterdir()] == ["lock"]:
            (folder.local_path / "lock").unlink()
            folder.local_path.rmdir()  # it never began


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
        given: which of `SETTABLE` the user has given now; the others hold as another process has set them.
        yes: go on though the estimate exceeds the budget.
        dry_run: tell what would be done, and return None.
        view: what its user reads; None: nothing.

    Raises:
        UserError: a mistake in it, before a trial starts.
        RunFailed: three trials failed alike.
    """
    view = view or View()
    outline = Outline.of(config)
    folder = sweep_folder(config)
    signals = StopRequest()
    with signals.listening(), ExitStack() as stack:
        if not dry_run:
            stack.enter_context(_held(folder))
        is_private = stack.enter_context(session())
        slot = slot_of(config)
        check_fits(slot, is_private)
        if dry_run:
            view.outline(config, outline, slot, outline.estimate(slot))
            return None
        before = earlier(folder, config)
        if before is None or ESTIMATE not in before:
            found = outline.estimate(slot)
            view.outline(config, outline, slot, found)
            _check_budget(found, config, yes)
            before = {ESTIMATE: found.plain()}
        study = SweepStudy(folder, config, first_step=outline.first_step, last_step=outline.last_step)
        study.study.set_user_attr(ESTIMATE, before[ESTIMATE])
        study.settle(given)
        book = SweepBook(study, Points(config, slot.gpus), folder, view)
        driver = Driver(book, signals, slot, view)
        executor = Executor(book, slot, is_private=is_private, stop=driver.why_stop, on_tick=driver.tick)
        try:
            if not book.is_over():
                with view.live():
                    executor.run()
        finally:
            driver.note()
            book.clear(wait_s=10)
            result = report.write(folder, study, book.points, driver.spent, executor.stop_reason)
    if executor.stop_reason == "failures":
        raise RunFailed(
            f"{ALIKE} trials failed alike, the last: {executor.last_failure}; mend that, and the same command goes on"
        )
    return SweepResult(folder, *result, signals.signal)
