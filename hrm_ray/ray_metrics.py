"""Numbers of runs and sweeps among Ray's metrics, which Prometheus fetches from every node (as ``ray_hrm_ray_...``).

They are what the loop and the sweep report anyway, so a step costs nothing more. Ray forgets a gauge as soon as it has
handed it on. So the last values are repeated while a run is at work, and disappear some 20 s after it has ended. Where
Ray collects no metrics, as in a private one, all of this does nothing.
"""

import math
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.util.metrics import Gauge

    from hrm_ray.config.schema import TrainConfig
    from hrm_ray.training.hooks import Hooks

REPEAT_S = 5.0  # Ray hands on every 10 s, unless told otherwise
OF_A_RUN = {
    "hrm_ray_step_seconds": "mean time of an optimizer step since the report before",
    "hrm_ray_data_wait_ratio": "part of that time in which the first worker waited for data",
    "hrm_ray_examples_per_second": "examples trained on, by all workers together",
    "hrm_ray_global_step": "optimizer steps done",
    "hrm_ray_workers": "workers that train",
    "hrm_ray_restarts": "times that workers were started again in this command",
    "hrm_ray_train_loss": "mean loss of a slot since the report before",
    "hrm_ray_train_exact_accuracy_ratio": "puzzles of the training set that were solved since the report before",
    "hrm_ray_eval_exact_accuracy_ratio": "puzzles of the test set that the last evaluation solved",
    "hrm_ray_last_checkpoint_timestamp_seconds": "when the last checkpoint became whole, in epoch seconds",
}
OF_A_SWEEP = {
    "hrm_ray_trials": "trials in this state: waiting for room, running, complete, pruned or fail",
    "hrm_ray_best_value": "the best value of this metric among the trials that are complete",
}
RECORDED = {  # what stands in the records of metrics.jsonl as it is
    "time/step_s": "hrm_ray_step_seconds",
    "global_step": "hrm_ray_global_step",
    "train/loss": "hrm_ray_train_loss",
    "train/exact_accuracy": "hrm_ray_train_exact_accuracy_ratio",
    "eval/exact_accuracy": "hrm_ray_eval_exact_accuracy_ratio",
}


class Metrics:
    """Gauges with tags of their own; to be closed, in a session of Ray."""

    def __init__(self, descriptions: Mapping[str, str], tag_keys: tuple[str, ...], **tags: str):
        self._descriptions, self._tag_keys, self._tags = descriptions, tag_keys, tags
        self._values: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        self._lock, self._is_over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="metrics", daemon=True)
        self._thread.start()

    def set(self, name: str, value: float, **tags: str) -> None:
        """Set one of the gauges; what is not finite is left out, since a graph cannot show it."""
        if not math.isfinite(value):
            return
        with self._lock:
            self._values[name, frozenset({**self._tags, **tags}.items())] = value
        self._hand_on(name, value, {**self._tags, **tags})

    def _repeat(self) -> None:
        while not self._is_over.wait(REPEAT_S):
            with self._lock:
                values = list(self._values.items())
            for (name, tags), value in values:
                self._hand_on(name, value, dict(tags))

    def _hand_on(self, name: str, value: float, tags: dict[str, str]) -> None:
        keys = tuple(key for key in self._tag_keys if key in tags)
        _gauge(name, self._descriptions[name], keys).set(value, tags)

    def close(self) -> None:
        """No call comes afterwards, so that Ray may be shut down."""
        self._is_over.set()
        self._thread.join()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@cache
def _gauge(name: str, description: str, tag_keys: tuple[str, ...]) -> "Gauge":
    from ray.util.metrics import Gauge

    return Gauge(name, description, tag_keys)


class RunMetrics(Metrics):
    """Those of a run, from its first worker.

    Args:
        config: the run.
        sweep: of which it is a trial; "" for one by itself.
        num_restarts: of the workers, in this command.
    """

    def __init__(self, config: "TrainConfig", sweep: str = "", num_restarts: int = 0):
        super().__init__(OF_A_RUN, ("run", "sweep"), run=config.run_name or "train", sweep=sweep)
        self._examples_per_step = config.global_batch_size * config.supervision_steps
        self.set("hrm_ray_restarts", num_restarts)

    def heard_by(self, hooks: "Hooks") -> "Hooks":
        """Hooks that set the gauges besides what they did."""

        def report(record: dict[str, Any]) -> None:
            for name, value in values_of(record, self._examples_per_step).items():
                self.set(name, value)
            hooks.report(record)

        def saved() -> None:
            self.set("hrm_ray_last_checkpoint_timestamp_seconds", time.time())
            hooks.saved()

        def event(entry: dict[str, Any]) -> None:
            if entry["event"] == "started":
                self.set("hrm_ray_workers", entry["num_workers"])
            hooks.event(entry)

        return replace(hooks, report=report, saved=saved, event=event)


def values_of(record: Mapping[str, float], examples_per_step: int) -> dict[str, float]:
    """The gauges that a record of metrics.jsonl sets."""
    values = {gauge: record[name] for name, gauge in RECORDED.items() if name in record}
    if (step_s := record.get("time/step_s")) is not None and step_s > 0:
        values["hrm_ray_examples_per_second"] = examples_per_step / step_s
        values["hrm_ray_data_wait_ratio"] = record["time/data_wait_s"] / step_s
    return values


class SweepMetrics(Metrics):
    """Those of a sweep, from its driver."""

    def __init__(self, sweep: str):
        super().__init__(OF_A_SWEEP, ("sweep", "state", "metric"), sweep=sweep)

    def trials(self, states: Mapping[str, int]) -> None:
        """How many trials there are in each state; all states at every call, since one that is left out keeps its
        number."""
        for state, count in states.items():
            self.set("hrm_ray_trials", count, state=state.lower())

    def best(self, values: Mapping[str, float]) -> None:
        """The best trial's value of each metric."""
        for metric, value in values.items():
            self.set("hrm_ray_best_value", value, metric=metric)
