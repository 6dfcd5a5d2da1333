"""The Optuna study, the only state of a sweep: every point, every value on the way, and what became of each trial.

One driver at a time changes its trials. Other processes may read it, and leave requests for the driver
(`want`). Knows no Ray.
"""

import fcntl
import json
import logging
import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock
from optuna.trial import FrozenTrial, TrialState

from hrm_ray.config.validate import as_text
from hrm_ray.errors import UserError, first_line
from hrm_ray.storage import lock
from hrm_ray.storage.lock import Unconditional
from hrm_ray.storage.storage import Storage
from hrm_ray.tuning import samplers
from hrm_ray.tuning.config import SETTABLE, SweepConfig, plain, with_settings
from hrm_ray.tuning.journal import ObjectJournal
from hrm_ray.tuning.space import Point, as_sampled, suggest

LOG = "study.log"
ENTRIES = "study"  # the folder that is in its place on an object storage
# Attributes of the study.
CONFIG = "config"  # the sweep as its last driver had it
SETTINGS = "settings"  # what another process wants of the driver
STOP = "stop"
FOLDER = "folder"  # of the sweep
ENDING = "ending"  # `stop_reason` and `repeat` of the last command
SPENT = "spent"  # in all commands so far
ESTIMATE = "estimate"
STEPS = "steps"  # at which a trial reports its metric first, and last
# Of a trial: what became of it.
REASON = "reason"
WORDS = "words"  # of `hrm-ray train`, by which it runs
OUTCOME = "outcome"  # global_step, train_s, num_params, stop_reason

NUM_REHEARSED = 12  # Optuna draws the first 10 at random
NUM_TRIALS = 20  # unless the sweep says
ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)

logging.getLogger("optuna").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


class _FileLock(BaseJournalFileLock):
    """A lock that ends with its process, unlike Optuna's own, whose next user waits for half a minute after a kill."""

    def __init__(self, file: Path):
        self._file = file
        self._held: IO[bytes] | None = None

    def acquire(self) -> bool:
        self._held = self._file.open("ab")
        fcntl.flock(self._held, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        assert self._held is not None
        self._held.close()


def study_storage(folder: Storage, url: str | None) -> BaseStorage:
    """Where the study of a sweep is kept.

    Raises:
        UserError: its journal is damaged, or its database does not answer.
    """
    if url is not None:
        try:
            return RDBStorage(url)
        except Exception as error:  # of any kind: SQLAlchemy and its drivers have their own
            raise UserError(f"study={url}: {first_line(error)}; check the address and its driver") from None
    if folder.local_path is None:
        entries = folder / ENTRIES
        try:
            return JournalStorage(ObjectJournal(entries.object_store(), str(entries)))
        except Unconditional as why:
            raise UserError(
                f"{folder}: a study cannot be kept on this storage ({why}); give study=URL of a database for it, such "
                "as postgresql://..., or another storage="
            ) from None
    file = folder.local_path / LOG
    folder.local_path.mkdir(parents=True, exist_ok=True)
    try:
        return JournalStorage(JournalFileBackend(str(file), _FileLock(file)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} is damaged{_where(file)}; restore it from a copy, or choose another run_name="
        ) from error


def _where(file: Path) -> str:
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            json.loads(line)
        except ValueError:
            return f" in line {number}"
    return ""


def is_there(folder: Storage) -> bool:
    """Whether the folder of a sweep has a study."""
    if folder.local_path is None:
        return bool((folder / ENTRIES).entries())
    return folder.read(LOG) is not None


def mend(folder: Storage) -> None:
    """Cut off what a power cut left of a last line. Only for who holds the sweep's lock."""
    if folder.local_path is None or not (folder.local_path / LOG).exists():
        return
    with (folder.local_path / LOG).open("r+b") as file:
        content = file.read()
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)


def load(folder: Storage, config: SweepConfig) -> optuna.Study:
    """The study of a sweep that exists, to be read. Raises UserError if there is none."""
    attributes = earlier(folder, config)
    if attributes is None:
        raise UserError(f"{folder}: the sweep has not started yet; start it with hrm-ray tune")
    return optuna.load_study(study_name=config.run_name, storage=study_storage(folder, config.study))


def earlier(folder: Storage, config: SweepConfig) -> dict[str, Any] | None:
    """The attributes of the study, if it is there already."""
    if config.study is None and not is_there(folder):
        return None
    storage = study_storage(folder, config.study)
    try:
        return optuna.load_study(study_name=config.run_name, storage=storage).user_attrs
    except KeyError:
        return None


class ReadStudy:
    """The study of a sweep, to be read.

    Attributes:
        study: Optuna's.
        config: the sweep, as its driver has it now.
    """

    def __init__(self, study: optuna.Study, config: SweepConfig):
        self.study, self.config = study, config
        # Directions of the study's values and of the metric that is watched may differ.
        self._sign = 1 if config.watched_direction == study.directions[0].name.lower() else -1

    @property
    def num_trials(self) -> int:
        """How many trials there are to be, as was said last."""
        return num_trials_of(self.config)

    @property
    def rungs(self) -> list[int]:
        """Optimizer steps at which successive halving and Hyperband give trials up."""
        first, last = self.study.user_attrs[STEPS]
        rungs = samplers.rungs(self.config.prunes, first_step=first, last_step=last)
        return [step for step, _ in rungs if step < last]

    @property
    def is_over_seeds(self) -> bool:
        """Whether trials differ in nothing but the seed."""
        return list(self.config.space) == ["seed"]

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Those in one of `states`, or all, by number."""
        return self.study.get_trials(deepcopy=False, states=states or None)

    def seen(self, trial: FrozenTrial) -> dict[int, float]:
        """The watched metric of a trial by optimizer step; in the study its sign may be turned."""
        return {step: self._sign * value for step, value in trial.intermediate_values.items()}


class SweepStudy(ReadStudy):
    """The study in the hands of the one driver.

    Args:
        folder: of the sweep; its lock is held.
        config: the sweep.
        first_step, last_step: at which a trial reports its metric first, and last.
        given: which of `SETTABLE` the user has given now; the others keep what `tune set` gave.

    Raises:
        UserError: a study of another space, metric or words; one that is damaged; a sampler or pruner that is unknown.
    """

    def __init__(
        self,
        folder: Storage,
        config: SweepConfig,
        *,
        first_step: int,
        last_step: int,
        given: Collection[str] = (),
    ):
        self.config = config
        self._sampler(0)  # what is wrong with it is said before anything is written
        pruner = samplers.pruner(
            config.prunes,
            first_step=first_step,
            last_step=last_step,
            is_turned=config.watched_direction != next(iter(config.metric.values())),
        )
        storage = study_storage(folder, config.study)
        before = earlier(folder, config)
        if before is None:
            directions = list(config.metric.values())
            study = optuna.create_study(storage=storage, study_name=config.run_name, directions=directions)
        else:
            there = before.get(FOLDER, str(folder))
            if config.study is not None and there != str(folder):
                raise UserError(
                    f"study={config.study}: its study {config.run_name} is of {there}; choose another run_name="
                )
            _check_same(before.get(CONFIG, plain(config)), plain(config), folder)
            study = optuna.load_study(storage=storage, study_name=config.run_name)
        study.pruner = pruner
        super().__init__(study, config)
        before = self.study.user_attrs.get(CONFIG)
        if before is not None:
            self._settle({*given, *(key for key in SETTABLE if before.get(key) != plain(config)[key])})
        else:
            for point in config.try_first[: self.num_trials]:
                self.study.enqueue_trial(as_sampled(config.space, point, "try_first"), skip_if_exists=True)
        self.study.set_metric_names(list(config.metric))
        self.study.set_user_attr(CONFIG, plain(config))
        self.study.set_user_attr(FOLDER, str(folder))
        self.study.set_user_attr(STEPS, [first_step, last_step])
        self._asked: dict[int, optuna.trial.Trial] = {}
        self._to_resume = [t.number for t in self.trials(TrialState.RUNNING)]

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        space = self.config.space
        is_conditional = any(values.when for values in space.values())
        return samplers.sampler(
            self.config.sampler, number, grid=grid_of(self.config), is_conditional=is_conditional
        )

    def next_trial(self) -> tuple[int, Point] | None:
        """The trial to run next: one that was running when the last driver ended, else a new one; None if all are
        there."""
        while self._to_resume:
            number = self._to_resume.pop(0)
            trial = self._resumed(number)
            if not self._had_ended(trial):
                break
        else:
            if self._num_begun >= self.num_trials:
                return None
            trial = self._ask()
        self._asked[trial.number] = trial
        return trial.number, suggest(trial, self.config.space)

    @property
    def num_to_come(self) -> int:
        """How many trials `next_trial` has still to hand out."""
        return len(self._to_resume) + max(0, self.num_trials - self._num_begun)

    @property
    def is_over(self) -> bool:
        """Whether no trial is at work or to come."""
        return not self._asked and not self.num_to_come

    @property
    def _num_begun(self) -> int:
        return len(self.trials()) - len(self.trials(TrialState.WAITING))

    def _had_ended(self, trial: optuna.trial.Trial) -> bool:
        """End a trial whose end had been decided when the driver was killed."""
        reason = trial.user_attrs.get(REASON)
        if reason is not None:
            state = TrialState.PRUNED if reason.startswith(("pruned", "stopped")) else TrialState.FAIL
            self.study.tell(trial, state=state)
        return reason is not None

    def _ask(self) -> optuna.trial.Trial:
        waiting = self.trials(TrialState.WAITING)
        self.study.sampler = self._sampler(waiting[0].number if waiting else len(self.trials()))
        return self.study.ask()

    def _resumed(self, number: int) -> optuna.trial.Trial:
        """A trial that was asked for by an earlier driver; its parameters are stored, but for those that it was
        killed before."""
        self.study.sampler = self._sampler(number)
        return optuna.trial.Trial(self.study, self.trials()[number]._trial_id)

    def report(self, number: int, step: int, value: float) -> bool:
        """Write down the watched metric of a trial at an optimizer step; returns whether that is new."""
        known = self.trials()[number].intermediate_values
        is_new = len(self.config.metric) == 1 and step > max(known, default=0)
        if is_new:
            self._asked[number].report(self._sign * value, step)
        return is_new

    def should_prune(self, number: int) -> bool:
        """Whether the pruner gives the trial up, after its last report."""
        return len(self.config.metric) == 1 and bool(self._asked[number].should_prune())

    def note(self, number: int, key: str, value: Any) -> None:
        """An attribute of a trial."""
        self._asked[number].set_user_attr(key, value)

    def complete(self, number: int, values: Sequence[float]) -> None:
        self.study.tell(self._asked.pop(number), list(values))

    def prune(self, number: int, reason: str) -> None:
        """The trial was given up, by the pruner or by hand."""
        self.note(number, REASON, reason)
        self.study.tell(self._asked.pop(number), state=TrialState.PRUNED)

    def fail(self, number: int, reason: str) -> None:
        """The trial has no value, and is not tried again."""
        self.note(number, REASON, reason)
        self.study.tell(self._asked.pop(number), state=TrialState.FAIL)

    def _settle(self, given: Collection[str]) -> None:
        """Let what the user has given now hold, and else what another process has set."""
        settings = {k: v for k, v in (self.study.user_attrs.get(SETTINGS) or {}).items() if k not in given}
        self.study.set_user_attr(SETTINGS, settings)
        self.config = with_settings(self.config, settings)

    def wanted(self) -> dict[str, Any]:
        """What other processes want: `settings`, and `stop`."""
        attrs = self.study.user_attrs
        return {"settings": attrs.get(SETTINGS) or {}, "stop": attrs.get(STOP)}


def trial_name(number: int) -> str:
    """The folder of trial `number`."""
    return f"trial-{number:04d}"


def grid_of(config: SweepConfig) -> dict[str, list[Any]] | None:
    """All values of every key; None if they cannot be listed."""
    grid: dict[str, list[Any]] = {}
    for key, values in config.space.items():
        distribution = values.distribution
        if values.when:
            return None
        if isinstance(distribution, optuna.distributions.CategoricalDistribution):
            grid[key] = list(distribution.choices)
        elif isinstance(distribution, optuna.distributions.IntDistribution) and not distribution.log:
            grid[key] = list(range(distribution.low, distribution.high + 1, distribution.step))
        elif isinstance(distribution, optuna.distributions.FloatDistribution) and distribution.step:
            count = round((distribution.high - distribution.low) / distribution.step) + 1
            grid[key] = [distribution.low + i * distribution.step for i in range(count)]
        else:
            return None
    return grid


def num_trials_of(config: SweepConfig) -> int:
    """`num_trials`, or what stands for it; of a grid not more than it has points."""
    grid = grid_of(config) if config.sampler.get("name") == "grid" else None
    if grid is None:
        return config.num_trials or NUM_TRIALS
    size = math.prod(map(len, grid.values()))
    return min(config.num_trials or size, size)


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any], folder: Storage) -> None:
    """Raise UserError if trials of the two cannot be compared."""
    for key in ("train", "metric"):
        if before[key] != now[key]:
            raise _other(folder, key, _shown(before[key]), _shown(now[key]))
    for key in sorted(before["space"].keys() | now["space"].keys()):
        there, here = before["space"].get(key), now["space"].get(key)
        if there != here:
            raise _other(folder, f"space.{key}", _shown(there), _shown(here))


def _other(folder: Storage, key: str, there: str, here: str) -> UserError:
    return UserError(
        f"{folder} is a sweep with {key} = {there}, not {here}; give the same value to continue it, or "
        "--new-name to start another sweep"
    )


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        value = {k: v for k, v in value.items() if v not in (None, {})}
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return as_text(value)


def forget_stop(folder: Storage, config: SweepConfig) -> None:
    """A stop that was asked of an earlier driver is not for this one, which holds the sweep's lock."""
    if earlier(folder, config) is not None:
        load(folder, config).set_user_attr(STOP, None)


def rehearse(config: SweepConfig) -> None:
    """Choose some points as the sweep will, on a study of its own.

    Raises:
        UserError: the sampler does not suit the space or the metrics, or a point of `try_first` is not in the space.
    """
    study = optuna.create_study(directions=list(config.metric.values()))
    is_conditional = any(values.when for values in config.space.values())
    for point in config.try_first:
        study.enqueue_trial(as_sampled(config.space, point, "try_first"))
    for number in range(NUM_REHEARSED):
        study.sampler = samplers.sampler(
            config.sampler, number, grid=grid_of(config), is_conditional=is_conditional
        )
        try:
            trial = study.ask()
            suggest(trial, config.space)
            study.tell(trial, [float(number)] * len(config.metric))
        except (
            Exception
        ) as error:  # of any kind: Optuna's samplers check what they are given when they use it
            raise UserError(f"sampler: {config.sampler['name']}: {first_line(error)}") from None


def want(
    folder: Storage, config: SweepConfig, *, stop: Any = None, settings: Mapping[str, Any] | None = None
) -> None:
    """Write down what another process wants of the driver.

    Args:
        stop: True, or the numbers of trials.
        settings: of `SETTABLE` keys.
    """
    study = load(folder, config)
    if stop is not None:
        before = study.user_attrs.get(STOP)
        study.set_user_attr(STOP, [*before, *stop] if isinstance(before, list) and stop is not True else stop)
    if settings:
        study.set_user_attr(SETTINGS, {**(study.user_attrs.get(SETTINGS) or {}), **settings})


def is_driven(folder: Storage) -> bool:
    """Whether a driver is at work on a sweep; of one at a URI, by its clock and ours."""
    path = folder.local_path
    if path is None:
        return lock.is_fresh(folder.read(lock.NAME))
    if not (path / "lock").exists():
        return False
    with (path / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
