"""What runs and sweeps tell Ray's metrics, which Prometheus reads and cluster/grafana.json shows.

Only on a cluster: a private Ray collects no metrics, since their page asks for no token. Values are set where a record
is written anyway, every `log_interval` steps.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.util.metrics import Gauge

    from hrm_ray.training.loop import Hooks

VARIABLE = "HRM_RAY_METRICS"

# By name: the tag besides the run or sweep, if any, and the meaning. A key of metrics.jsonl stands in `OF_RECORDS`.
GAUGES: dict[str, tuple[tuple[str, ...], str]] = {
    "hrm_ray_step_seconds": (("run",), "Time of an optimizer step"),
    "hrm_ray_data_wait_seconds": (("run",), "Of a step's time, the wait for data"),
    "hrm_ray_examples_per_second": (("run",), "Puzzles that are trained on in a second"),
    "hrm_ray_train_loss": (("run",), "Loss of a step"),
    "hrm_ray_exact_accuracy_ratio": (("run",), "Held-out puzzles that are solved in every cell"),
    "hrm_ray_global_step": (("run",), "Optimizer steps that are done"),
    "hrm_ray_workers": (("run",), "Workers at the last start"),
    "hrm_ray_last_checkpoint_timestamp_seconds": (
        ("run",),
        "When the last checkpoint was whole, as Unix time",
    ),
    "hrm_ray_trials": (("sweep", "state"), "Trials of a sweep"),
    "hrm_ray_sweep_best_value": (("sweep",), "The best value of a sweep with one metric"),
}
OF_RECORDS = {
    "global_step": "hrm_ray_global_step",
    "time/step_s": "hrm_ray_step_seconds",
    "time/data_wait_s": "hrm_ray_data_wait_seconds",
    "train/loss": "hrm_ray_train_loss",
    "eval/exact_accuracy": "hrm_ray_exact_accuracy_ratio",
}


@cache
def _gauge(name: str) -> "Gauge":
    from ray.util.metrics import Gauge

    tags, meaning = GAUGES[name]
    return Gauge(name, description=meaning, tag_keys=tags)


def set_gauge(name: str, value: float, **tags: str) -> None:
    """Set the one of `GAUGES`."""
    _gauge(name).set(value, tags=tags)


def wanted(is_on_cluster: bool) -> dict[str, str]:
    """The variables that tell the processes of a run or sweep whether to tell the metrics."""
    return {VARIABLE: "1"} if is_on_cluster else {}


def of_record(record: Mapping[str, Any], examples_per_step: int) -> dict[str, float]:
    """The gauges that a record of metrics.jsonl sets.

    Args:
        examples_per_step: puzzles in an optimizer step.
    """
    found = {name: float(record[key]) for key, name in OF_RECORDS.items() if key in record}
    if step_s := record.get("time/step_s"):
        found["hrm_ray_examples_per_second"] = examples_per_step / step_s
    return found


def observed(hooks: "Hooks", run: str, examples_per_step: int, num_workers: int) -> "Hooks":
    """`hooks` that tell the metrics too, in a process where that is `wanted`.

    Args:
        run: name of the run.
    """
    if VARIABLE not in os.environ:
        return hooks
    set_gauge("hrm_ray_workers", num_workers, run=run)

    def report(record: dict[str, Any]) -> None:
        for name, value in of_record(record, examples_per_step).items():
            set_gauge(name, value, run=run)
        hooks.report(record)

    def saved(step: int) -> None:
        set_gauge("hrm_ray_last_checkpoint_timestamp_seconds", time.time(), run=run)
        hooks.saved(step)

    return replace(hooks, report=report, saved=saved)
