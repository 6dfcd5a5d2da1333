"""Population based training, by Ray Tune's scheduler. Every member is a trial of the study.

When all members have trained for an interval of steps, the worst go on as copies of the best, with other values. So
the result of a sweep depends on the scores alone, not on the number of machines or on interruptions. Tune
keeps the scores, says which are the worst and the best, and lets members take turns where the cluster holds fewer.

Its checkpoints, which lie where only the driver's node sees them, are not used: a member that waits has ended its
loop, with a checkpoint in its run folder, from where it goes on, and others too (see `lineage`).
"""

from contextlib import suppress
from random import Random
from types import SimpleNamespace
from typing import Any

import ray
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler

from hrm_ray.config.schema import TrainConfig
from hrm_ray.tuning.execute import Executor, Live, StudyScheduler
from hrm_ray.tuning.explore import fits, mutated
from hrm_ray.tuning.lineage import HISTORY, history, point_of, stage
from hrm_ray.tuning.points import Refused
from hrm_ray.tuning.space import Point, words_of
from hrm_ray.tuning.study import trial_name
from hrm_ray.tuning.sweep import SweepBook

TRIES = 20  # points that are tried until one is not refused


class Evolves(StudyScheduler, PopulationBasedTraining):
    """Writes the values of the members down, and says who goes on as whom.

    Args:
        executor: runs them.
        book: of the sweep.
    """

    def __init__(self, executor: Executor, book: SweepBook):
        config = book.config
        population, self._watched = config.population, config.watched
        assert population is not None
        way = config.watched_direction
        PopulationBasedTraining.__init__(
            self,
            time_attr="global_step",
            metric=self._watched,
            mode="max" if way == "maximize" else "min",
            perturbation_interval=population.interval,
            quantile_fraction=population.quantile,
            custom_explore_fn=lambda config: config,  # it wants one; `_checkpoint_or_exploit` is our own
            log_config=False,
            synch=True,
        )
        self._executor, self._book = executor, book
        self._looked_at = last_look(book)
        self._next_perturbation_sync = self._looked_at + population.interval
        self._leaving: dict[str, ray.ObjectRef] = {}  # by Tune's name of a trial: when its loop has ended

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:
        if trial in self._trial_state:  # its worker was lost, and it starts again
            return
        # Tune refuses searchers here, since most of them would choose the values as well.
        without: Any = SimpleNamespace(search_alg=None)
        PopulationBasedTraining.on_trial_add(self, without, trial)
        state = self._trial_state[trial]
        state.last_perturbation_time = state.last_train_time = self._looked_at
        # Tune would end all idle actors but one while the last members are waited for.
        with suppress(AttributeError):
            tune_controller._tune_controller._actor_cache.increase_max(trial.placement_group_factory)

    def on_trial_complete(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> None:
        StudyScheduler.on_trial_complete(self, tune_controller, trial, result)
        with suppress(AttributeError):
            tune_controller._actor_cache.decrease_max(trial.placement_group_factory)

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        decision = StudyScheduler.on_trial_result(self, tune_controller, trial, result)
        if decision != TrialScheduler.CONTINUE:
            return decision
        live, state = self._executor.live[trial.trial_id], self._trial_state[trial]
        for step, metrics in result["reports"]:
            if self._watched in metrics and self._next_perturbation_sync <= step < live.last_step:
                seen = {"global_step": step, self._watched: metrics[self._watched]}
                self._save_trial_state(state, step, seen, trial)
                self._pause(tune_controller, trial, live)
                return TrialScheduler.NOOP
        return TrialScheduler.CONTINUE

    def choose_trial_to_run(self, tune_controller: Any) -> TuneTrial | None:
        """One that is behind; when all of them wait, the population is looked at first."""
        trials = [trial for trial in tune_controller.get_trials() if not trial.is_finished()]
        gone = [trial for trial in trials if self._has_left(trial)]
        if trials and all(trial in gone and self._waits(trial) for trial in trials):
            self._look(trials)
        only: Any = SimpleNamespace(get_trials=lambda: gone)
        return PopulationBasedTraining.choose_trial_to_run(self, only)

    def _waits(self, trial: TuneTrial) -> bool:
        reached = self._trial_state[trial].last_train_time
        return trial.status == TuneTrial.PAUSED and reached >= self._next_perturbation_sync

    def _look(self, trials: list[TuneTrial]) -> None:
        """Let Tune compare the members, all of which wait."""
        # Tune lets the order of this decide between equal scores.
        in_order = sorted(self._trial_state, key=lambda trial: trial.config["number"])
        self._trial_state = {trial: self._trial_state[trial] for trial in in_order}
        last = max(trials, key=lambda trial: self._trial_state[trial].last_train_time)
        seen = self._trial_state[last].last_result
        assert seen is not None
        there: Any = SimpleNamespace(get_trials=lambda: trials, get_live_trials=lambda: trials)
        PopulationBasedTraining.on_trial_result(self, there, last, seen)
        self._looked_at = self._trial_state[last].last_train_time
        # Tune's own value would stand still where reports are further apart than the interval.
        self._next_perturbation_sync = self._looked_at + self._perturbation_interval

    def _checkpoint_or_exploit(
        self,
        trial: TuneTrial,
        tune_controller: Any,
        upper_quantile: list[TuneTrial],
        lower_quantile: list[TuneTrial],
    ) -> None:
        if trial not in lower_quantile:
            return
        live = self._executor.live[trial.trial_id]
        random = Random(f"{self._book.config.sampler.get('seed', 0)}-{live.number}-{live.copy}")
        other = random.choice(upper_quantile)
        state = self._trial_state[other]
        number = self._executor.live[other.trial_id].number
        if replace(
            self._book, live, self._trial_state[trial].last_train_time, number, state.last_train_time, random
        ):
            trial.set_config(self._executor.config_of(live))
            self._num_perturbations += 1

    def _pause(self, tune_controller: Any, trial: TuneTrial, live: Live) -> None:
        actor: Any = trial.temporary_state.ray_actor
        self._leaving[trial.trial_id] = actor.let_go.remote()
        tune_controller.pause_trial(trial, should_checkpoint=False)
        live.phase, live.started = "paused", None

    def _has_left(self, trial: TuneTrial) -> bool:
        """Whether no actor trains it any more."""
        left = self._leaving.get(trial.trial_id)
        if left is not None and ray.wait([left], timeout=0)[0]:
            del self._leaving[trial.trial_id]
        return trial.trial_id not in self._leaving


def replace(book: SweepBook, live: Live, step: int, other: int, other_step: int, random: Random) -> bool:
    """Let a member go on from the checkpoint of another, with a point near the other's.

    Args:
        live: the member, which must not be training; it is changed.
        step: of its last score.
        other: number of the other trial.
        other_step: of its last score.

    Returns:
        False if the other has no checkpoint of that step or later.
    """
    run = book.folder / trial_name(live.number)
    copy = stage(book.folder / trial_name(other), other_step, run, live.copy + 1)
    if copy is None:
        return False
    trials = book.study.trials()
    before = point_of(trials[other], book.config.space)
    point, live.run = explored(book, live.number, before, random)
    move = {"step": step, "from_trial": other, "from_step": copy.manifest.global_step, "point": point}
    book.note_words(live.number, point)
    book.study.note(live.number, HISTORY, [*history(trials[live.number]), move])
    live.copy += 1
    live.words, live.last_step = " ".join(words_of(point)), book.points.plan(live.run).last_step
    return True


def explored(book: SweepBook, number: int, before: Point, random: Random) -> tuple[Point, TrainConfig]:
    """A point near `before`, of which the run `number` can go on from a checkpoint of `before`; else `before`."""
    there = book.run_of(number, before)
    population = book.config.population
    assert population is not None
    for _ in range(TRIES):
        point = mutated(before, book.config.space, book.changeable, population.resample, random)
        try:
            run = book.run_of(number, point)
        except Refused:
            continue
        if fits(there, run):
            return point, run
    return before, there


def last_look(book: SweepBook) -> int:
    """The step at which the members were compared last, by an earlier driver too; every time one is replaced."""
    moves = [move for trial in book.study.trials() for move in history(trial)]
    return max((move["step"] for move in moves), default=0)
