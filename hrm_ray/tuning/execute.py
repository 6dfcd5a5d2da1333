"""Ray Tune runs the trials of a sweep; the study says which, and whether they go on.

Three small adapters: `StudySearcher` (a Searcher) hands out the trials of the study, `StudyScheduler` (a scheduler)
writes every value into it and asks its pruner, `Watches` (a callback) looks at the clock, the budget and what other
processes want. None of them has a state that a new driver would miss.
"""

import json
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from hrm_ray.config.schema import TrainConfig
from hrm_ray.errors import Unseen, UserError, about_file
from hrm_ray.every import Every
from hrm_ray.memory import ONE_ARENA
from hrm_ray.nodes import Growth, Request, fit, growth, living, living_names, most, room
from hrm_ray.ray_session import cluster_address, environment, ray_session
from hrm_ray.storage.storage import Storage
from hrm_ray.training.driver import run_folder
from hrm_ray.training.ray_train import absolute, trusted_tasks, where_not_set
from hrm_ray.tuning.trial import Trial
from hrm_ray.tuning.view import View
from hrm_ray.worker_logs import last_words

LOST = "its worker was lost too often"
DOUBT_S = 30.0  # how long after a worker its node may turn out to be lost too; Ray gives one up after 15 s
ALIKE = 3  # so many failures of one kind end a sweep
LOOK_S = 1.0  # how often other processes' wishes and the budget are looked at
NUMBERS = str.maketrans("0123456789", "##########")
SETTINGS = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours stops trials with a checkpoint
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the study and the runs hold everything
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",  # its snapshot of the experiment is not used
    "TUNE_WARN_THRESHOLD_S": "60",
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "1000000000",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


@dataclass(frozen=True)
class Slot:
    """What a trial takes of the cluster: one bundle for each worker.

    Attributes:
        num_workers, cpus, gpus: the last two of each worker.
    """

    num_workers: int
    cpus: int
    gpus: float

    @property
    def bundle(self) -> dict[str, float]:
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})

    @property
    def request(self) -> tune.PlacementGroupFactory:
        """For one worker the trial's actor is the worker; several are started by an actor that takes nothing."""
        if self.num_workers == 1:
            return tune.PlacementGroupFactory([self.bundle])
        return tune.PlacementGroupFactory([{}, *[self.bundle] * self.num_workers])

    def at_once(self) -> int:
        """How many trials fit on the nodes that are there."""
        return fit(living(), self.bundle) // self.num_workers

    def at_most(self, grows: Growth) -> int:
        """How many fit when the cluster has grown."""
        return most(self.bundle, grows) // self.num_workers

    def describe(self) -> str:
        what = " and ".join(f"{n:g} {kind}" for kind, n in self.bundle.items())
        return f"{self.num_workers} x ({what})" if self.num_workers > 1 else what


def check_fits(slot: Slot, grows: Growth | None) -> None:
    """Raise UserError if the cluster can never hold a trial; `grows` says how far it can, None if nobody knows."""
    if grows is None or slot.at_most(grows):
        return
    where = "this machine" if cluster_address() is None else "the cluster"
    raise UserError(
        f"a trial needs {slot.describe()}, {where} has no room for that: {room(grows)}; lower "
        "resources.num_workers, resources.cpus or resources.gpus"
    )


@dataclass
class Live:
    """A trial at work, as a table shows it."""

    number: int
    run: TrainConfig
    last_step: int
    words: str
    step: int = 0
    phase: str = "waiting"
    started: float | None = None  # when it came to hold its resources, by time.monotonic
    num_lost: int = 0  # workers that were lost, except those whose node was lost
    # Of workers that were lost, maybe with their nodes: the last result of each, and when it was lost.
    doubts: list[tuple[dict[str, Any], float]] = field(default_factory=list)
    end: dict[str, str] | None = None  # the outcome that it is to have at once, if any
    copy: int = 0  # of a population: how often it went on from another's checkpoint


class Stateless:
    """For what Tune writes into its snapshot of an experiment, which nobody reads."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Executor:
    """Runs what `book` hands out, until there is nothing more or somebody wants it to stop.

    Args:
        book: knows the trials; see `Book`.
        slot: what each takes.
        grows: how far the cluster can; None if that is not known.
        stop: why to stop; None to go on. Asked several times a second.
        on_tick: called every second, with the live trials.
    """

    def __init__(
        self,
        book: "Book",
        slot: Slot,
        *,
        grows: Growth | None,
        stop: Callable[[], str | None],
        on_tick: Callable[[list[Live]], None],
    ):
        self.book, self.slot, self.grows = book, slot, grows
        self.owner = uuid.uuid4().hex  # of the runs
        self._request = Request(f"sweep-{self.owner}")
        self.stop, self.on_tick = stop, on_tick
        self.live: dict[str, Live] = {}  # by Tune's name of the trial
        self.again: list[Live] = []  # to be handed out to Tune once more
        self.never_begun: Counter[int] = Counter()  # by number: how often an idle worker was lost
        self.failures: Counter[str] = Counter()
        self.stop_reason: str | None = None
        self.last_failure = ""
        self.error: UserError | None = None  # that ended the sweep

    def run(self) -> None:
        """Until the end, or the stop; then `stop_reason` says why. Raises UserError if failures are alike."""
        with (
            environment(where_not_set(SETTINGS)),
            tempfile.TemporaryDirectory(prefix="hrm_ray-tune-") as aside,
            closing(self._request),
        ):
            tune.run(
                Trial,
                name="sweep",
                storage_path=aside,
                config={},
                num_samples=-1,
                search_alg=StudySearcher(self),
                scheduler=self.book.scheduler(self),
                stop=_Stops(self),
                callbacks=[Watches(self)],
                resources_per_trial=self.slot.request,
                reuse_actors=True,
                max_failures=-1,  # `Watches` counts them
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False, checkpoint_frequency=0),
                raise_on_failed_trial=False,
                trial_dirname_creator=lambda trial: trial.trial_id,
                verbose=0,
            )

    def why_stop(self) -> str | None:
        if self.stop_reason is None:
            self.stop_reason = self.stop()
        return self.stop_reason

    def has_room(self) -> bool:
        """Whether one more trial may be asked for: a sampler chooses the better the later it is asked."""
        if not self.live or self.book.takes_turns:
            return True
        at_once = self.slot.at_once()
        return len(self.live) < min(at_once, self.book.max_concurrent or at_once)

    def ask_for_nodes(self) -> None:
        """For those of all trials that can be at work together, and no longer than there are so many left."""
        if self.grows is not None and not self.grows.types:
            return
        useful = len(self.live) + len(self.again) + self.book.num_to_come
        useful = min(useful, self.book.max_concurrent or useful)
        if self.grows is not None:
            useful = min(useful, self.slot.at_most(self.grows))
        self._request.ask([self.slot.bundle] * (useful * self.slot.num_workers))

    def config_of(self, live: Live) -> dict[str, Any]:
        """The configuration that its actor gets."""
        run, unmade = live.run, None
        if folder := run_folder(run).local_path:
            try:  # an actor that does not see it is on a machine without this storage
                folder.mkdir(exist_ok=True)
            except OSError as error:
                unmade = str(about_file(error))
        values = run.model_dump(mode="json") | {"data_path": absolute(run.data_path)}
        if not self.slot.gpus:  # Ray hides no GPU from an actor that asked for none
            values["device"] = "cpu"
        return {
            "number": live.number,
            "run": values,
            "cpus": self.slot.cpus,
            "metrics": self.book.metrics,
            "copy": live.copy,
            "unmade": unmade,
            "owner": self.owner,
            "sweep": self.book.folder.name,
        }

    def end(self, trial_id: str, outcome: dict[str, Any]) -> None:
        """What became of a trial."""
        live = self.live.pop(trial_id)
        if (
            outcome["kind"] == "unseen"
        ):  # of no single trial; this one is left as if the driver had been killed
            self.stop_reason, self.error = "error", Unseen(outcome["reason"])
            return
        if outcome["kind"] == "failed":
            self.last_failure = outcome["reason"]
            self.failures[outcome["reason"].translate(NUMBERS)] += 1
        self.book.end(live, outcome)
        if outcome.get("log"):
            self.book.view.say(outcome["log"])
        if max(self.failures.values(), default=0) >= ALIKE and self.stop_reason is None:
            self.stop_reason = "failures"


class Book:
    """What an executor asks: the trials of a study, or others that are to run. To be derived from.

    Attributes:
        folder: of the sweep.
        view: what its user reads.
        max_concurrent: trials at once; None: as many as fit.
        takes_turns: all trials begin, and take turns where the cluster holds fewer.
    """

    folder: Storage
    view: View
    max_concurrent: int | None = None
    takes_turns = False

    def next(self) -> Live | None:
        """The trial to run next; None if there is none (more)."""
        raise NotImplementedError

    @property
    def num_to_come(self) -> int:
        """How many `next` has not handed out yet."""
        raise NotImplementedError

    def is_over(self) -> bool:
        """Whether none will come."""
        raise NotImplementedError

    @property
    def metrics(self) -> list[str]:
        """Metrics that trials report."""
        raise NotImplementedError

    def report(self, number: int, step: int, metrics: dict[str, float]) -> str | None:
        """Take note; returns why the trial is to end, or None."""
        return None

    def end(self, live: Live, outcome: dict[str, Any]) -> None:
        """Take note of the outcome: of kind `ended`, `pruned`, `refused` or `failed`, the last maybe with a `log`."""
        raise NotImplementedError

    def scheduler(self, executor: Executor) -> TrialScheduler:
        return StudyScheduler(executor)


class StudySearcher(Stateless, Searcher):
    """Hands out the trials of the book."""

    def __init__(self, executor: Executor):
        super().__init__(metric=None, mode=None)
        self._executor = executor

    def suggest(self, trial_id: str) -> Any:
        """The configuration of a trial, FINISHED, or None if there is none now."""
        executor = self._executor
        if executor.why_stop() is None and not executor.has_room():
            return None
        following = None if executor.why_stop() is not None else self._next()
        if following is None:
            # "Finished" cannot be taken back, and somebody may want more trials while others are at work.
            return None if executor.live else Searcher.FINISHED
        executor.live[trial_id] = following
        return executor.config_of(following)

    def _next(self) -> Live | None:
        executor = self._executor
        if executor.again:
            return executor.again.pop()
        try:
            return executor.book.next()
        except UserError as error:  # of no single point: the data are gone, say
            executor.stop_reason, executor.error = "error", error
            return None

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """Called for trials that ended by themselves, were pruned, or failed beyond recovery; not at a stop."""
        executor = self._executor
        live = executor.live.get(trial_id)
        if live is None or not error:
            return
        if live.phase == "never begun" and executor.never_begun[live.number] <= live.run.failure.max_failures:
            live.phase = "waiting"
            executor.again.append(executor.live.pop(trial_id))
        else:
            executor.end(trial_id, live.end or _lost(live))

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""


class StudyScheduler(Stateless, FIFOScheduler):
    """Writes the values of a trial down and asks whether it goes on."""

    def __init__(self, executor: Executor):
        super().__init__()
        self._executor = executor

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        executor = self._executor
        live = executor.live.get(trial.trial_id)
        if live is None:
            return TrialScheduler.STOP
        live.step, live.phase = result["global_step"], result["phase"]
        if live.end is not None:
            executor.end(trial.trial_id, live.end)
            return TrialScheduler.STOP
        for step, metrics in result["reports"]:
            reason = executor.book.report(live.number, step, metrics)
            if reason is not None:
                executor.end(trial.trial_id, {"kind": "pruned", "reason": reason})
                return TrialScheduler.STOP
        return TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> None:
        live = self._executor.live.get(trial.trial_id)
        if live is None:
            return
        for step, metrics in result.get("reports", ()):
            self._executor.book.report(live.number, step, metrics)
        live.step = result["global_step"]
        self._executor.end(trial.trial_id, json.loads(result["outcome"]))

    def on_trial_error(self, tune_controller: Any, trial: TuneTrial) -> None:
        """Tune gives a trial up whose worker was lost while it was idle, which shows when it is to take the trial."""
        live = self._executor.live.get(trial.trial_id)
        if live is not None and trial.status == TuneTrial.PENDING:
            live.phase = "never begun"
            self._executor.never_begun[live.number] += 1


class Watches(Stateless, tune.Callback):
    """The clock of a sweep."""

    def __init__(self, executor: Executor):
        self._executor = executor
        self._due = Every(LOOK_S)

    def on_step_end(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        if self._due():
            self._settle_doubts(trials)
            self._executor.ask_for_nodes()
            self._executor.on_tick(list(self._executor.live.values()))

    def on_trial_start(self, iteration: int, trials: list, trial: TuneTrial, **info: Any) -> None:
        live = self._executor.live.get(trial.trial_id)
        if live is not None:
            live.phase, live.started = "start", time.monotonic()

    def on_trial_recover(self, iteration: int, trials: list, trial: TuneTrial, **info: Any) -> None:
        """Its actor is gone; Tune starts another. One whose node is gone too does not count.

        Ray may know of the node a little later than of the actor.
        """
        live = self._executor.live.get(trial.trial_id)
        if live is None:
            return
        live.phase, live.started = "lost", None
        error = _last_error(trial)
        result = trial.last_result or {}
        if _lacked_memory(error):
            reason = "its worker was killed since its node ran out of memory"
            live.end = {"kind": "refused", "reason": reason}
        elif "unavailable" in error and "node" in result:
            live.doubts.append((result, time.monotonic()))
        elif not _lost_its_node(error):
            self._count(live, trial, result)

    def _count(self, live: Live, trial: TuneTrial, result: dict[str, Any]) -> None:
        """Its worker, whose last result is given, was lost on a node that is there."""
        live.num_lost += 1
        if live.num_lost > live.run.failure.max_failures:
            live.end = _lost(live, result)
            trial.max_failures = 0  # should it be lost once more before it hears of it

    def _settle_doubts(self, trials: list[TuneTrial]) -> None:
        """Of the workers that were lost: whether their nodes are gone too."""
        known = [(self._executor.live.get(trial.trial_id), trial) for trial in trials]
        doubted = [(live, trial) for live, trial in known if live is not None and live.doubts]
        there = living_names() if doubted else set()
        for live, trial in doubted:
            doubts = [doubt for doubt in live.doubts if doubt[0]["node"] in there]
            live.doubts = [doubt for doubt in doubts if time.monotonic() - doubt[1] <= DOUBT_S]
            for result, _ in doubts[: len(doubts) - len(live.doubts)]:  # the oldest come first
                self._count(live, trial, result)


def _lost(live: Live, result: dict[str, Any] | None = None) -> dict[str, str]:
    """The outcome of a trial whose worker is gone; where it was, Tune notes in its last result."""
    log = ""
    if result and "pid" in result:
        name = f"the worker of trial {live.number}"
        log = last_words(name, result["hostname"], result["node_ip"], result["pid"])
    return {"kind": "failed", "reason": LOST, "log": log}


def _last_error(trial: TuneTrial) -> str:
    """What Tune has noted of the last failure: beside the driver, since the copy in its storage comes later."""
    try:
        return Path(str(trial.error_file)).read_text(errors="replace").rpartition("Failure # ")[2]
    except OSError:
        return ""


def _lacked_memory(error: str) -> bool:
    """Whether Ray's monitor of memory killed the worker."""
    return "OutOfMemoryError" in error or "running low on memory" in error


def _lost_its_node(error: str) -> bool:
    return "node has died" in error or "preempt" in error


class _Stops(Stateless, tune.Stopper):
    def __init__(self, executor: Executor):
        self._executor = executor

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._executor.why_stop() is not None


@contextmanager
def session() -> Iterator[Growth | None]:
    """A Ray to work on; yields how far it can grow, None if that is not known."""
    with ray_session(env_vars=where_not_set(ONE_ARENA) | trusted_tasks()):
        yield growth()
