"""Runs a training run for its user: says what will be done, shows progress, passes on requests to stop.

The loop itself runs in this process (`scaling=local`) or in the workers of Ray Train (`ray_train`).
"""

import os
import signal
import sys
import threading
import time
import uuid
from contextlib import contextmanager, suppress
from typing import Any

from tqdm import tqdm

from hrm_ray.config.schema import TrainConfig
from hrm_ray.data.shards import Dataset, open_dataset
from hrm_ray.evaluation.scores import check_best_metric
from hrm_ray.storage.storage import Storage
from hrm_ray.training.checkpoint import Checkpoint, finished, newest_whole
from hrm_ray.training.logging import check_places, last_summary
from hrm_ray.training.loop import Hooks, Progress, Trainer
from hrm_ray.training.plan import Plan
from hrm_ray.training.resume import mismatch, resume_point, set_aside
from hrm_ray.training.state import check_weights_fit
from hrm_ray.world import World


class ProgressBar:
    """One line on standard error: steps, loss, exact accuracy, examples a second, time left."""

    def __init__(self, examples_per_step: int):
        self._examples_per_step = examples_per_step
        self._bar: tqdm | None = None

    def show(self, progress: Progress) -> None:
        if self._bar is None:
            print(f"using {progress.setup}", file=sys.stderr)
            self._bar = tqdm(
                initial=progress.step,
                total=progress.last_step,
                unit="step",
                dynamic_ncols=True,
                mininterval=0.5 if sys.stderr.isatty() else 10,  # a log wants fewer lines than a screen
            )
        metrics = progress.metrics
        shown = {}
        if "train/loss" in metrics:
            shown["loss"] = f"{metrics['train/loss']:.3f}"
            shown["ex/s"] = f"{self._examples_per_step / metrics['time/step_s']:.0f}"
        if "eval/exact_accuracy" in metrics:
            shown["exact"] = f"{metrics['eval/exact_accuracy']:.1%}"
        if self._bar.desc in ("compile: ", "record: ") and f"{progress.phase}: " != self._bar.desc:
            self._bar.unpause()  # what it took is no time of steps
        self._bar.set_description(progress.phase, refresh=False)
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(progress.step - self._bar.n)

    def say(self, message: str) -> None:
        """A line above the bar."""
        tqdm.write(message, file=sys.stderr)

    def close(self) -> None:
        if self._bar:
            self._bar.close()


class StopRequest:
    """Asks the run to stop after its step: on the first SIGINT, SIGTERM or SIGHUP, or when `max_time_s` are over.

    The second signal ends the process at once. A SIGHUP that is ignored stays so: what `nohup` starts is to go on.
    """

    def __init__(self, max_time_s: float | None = None) -> None:
        self.signal: int | None = None
        self._deadline = None if max_time_s is None else time.monotonic() + max_time_s

    def reason(self) -> str | None:
        """Why to stop; None to go on."""
        if self.signal is not None:
            return "signal"
        return "max_time_s" if self._deadline is not None and time.monotonic() > self._deadline else None

    @contextmanager
    def listening(self):
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._receive) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        is_hangup = number == signal.SIGHUP  # which may come several times when a terminal closes
        if self.signal not in (None, signal.SIGHUP) and not is_hangup:
            os._exit(128 + number)
        is_first = self.signal is None
        if is_first or not is_hangup:
            self.signal = number
        if is_first:
            with suppress(OSError):  # the terminal may be gone
                # Not by print, which may be at work where the signal came.
                os.write(2, b"\nstopping, with a checkpoint of all steps done; once more to stop at once\n")


class Driver:
    """What a run tells its user, and what it is asked from outside.

    Args:
        config: the run.
        bar: shows progress and events; None: nothing is shown.
        owner: see `Hooks`; None: this driver.
    """

    wants_reports = False  # whether `report` is to be called, which costs a message for each

    def __init__(self, config: TrainConfig, bar: ProgressBar | None = None, owner: str | None = None):
        self.owner = owner or uuid.uuid4().hex
        self.stop = StopRequest(config.max_time_s)
        self._run = run_folder(config)
        self._bar = bar
        self.sweep = ""  # of which it is a trial
        self.num_workers = 0  # at the last start
        self.last_words = ""  # of a worker that was lost, until others go on
        self._warned: str | None = None
        self._waits = ""
        self._starts = 0

    def progress(self, progress: Progress) -> None:
        if self._bar:
            self._bar.show(progress)

    def report(self, record: dict[str, Any]) -> None:
        """Take note of a record of metrics.jsonl; a run that starts again repeats some (see `Hooks.report`)."""

    def event(self, entry: dict[str, Any]) -> None:
        """Print what has happened, except the first start and the end, which are printed elsewhere."""
        if entry["event"] == "started":
            self.num_workers = entry["num_workers"]
            self._starts += 1
        usual = entry["event"] in ("finished", "stopped") or (
            entry["event"] == "started" and self._starts == 1
        )
        if not usual:
            lost = "workers were lost or added: " if entry["event"] == "started" else ""
            self.say(f"{lost}{entry['message']}")
        if entry["event"] == "started" and self.last_words:
            self.say(self.last_words)
            self.last_words = ""

    def say(self, text: str) -> None:
        if self._bar:
            self._bar.say(text)

    def waits(self, for_what: str | None) -> None:
        """Say what the workers wait for, if that has changed."""
        if for_what and for_what != self._waits:
            self.say(f"{for_what}; Ctrl-C gives up")
            self._waits = for_what

    def summary_without_workers(self, reason: str) -> dict[str, Any]:
        """The summary of a run that is stopped while it has no workers."""
        newest = finished(self._run)[-1:]
        return {
            "final": {},
            "best": {},
            "global_step": newest[0].manifest.global_step if newest else 0,
            "train_s": newest[0].manifest.train_s if newest else 0.0,
            "finished": False,
            "stop_reason": reason,
        }

    def warn(self, restart_ahead: str | None) -> None:
        """Say once why the workers are about to be restarted."""
        if restart_ahead and restart_ahead != self._warned:
            self.say(f"{restart_ahead}: a checkpoint is written before the workers are restarted")
        self._warned = restart_ahead


def run_folder(config: TrainConfig) -> Storage:
    """STORAGE/RUN_NAME."""
    return Storage(config.storage) / (config.run_name or "train")


def _dataset_and_plan(config: TrainConfig) -> tuple[Dataset, Plan]:
    """Raises UserError if they do not fit the configuration."""
    dataset = open_dataset(config.data_path)
    check_best_metric(config.best_metric, dataset)
    return dataset, Plan.of(config, dataset.split("train"))


def announce(config: TrainConfig) -> str:
    """Lines to print before training: where, what, how long, and when each schedule ends."""
    dataset, plan = _dataset_and_plan(config)
    run = run_folder(config)
    check_places(run)
    point = None if _starts_from_weights(config, dataset) else resume_point(config, run, dataset)
    if point and point.manifest.global_step >= plan.last_step:
        step = point.manifest.global_step
        return f"run {run} is finished at step {step}; run_name=NAME starts another"
    start = f"continues after step {point.manifest.global_step}" if point else "starts"
    first = (
        f"run {run} {start}: {plan.last_step} steps of {_batches(config)} puzzles from "
        f"{config.data_path}, {_where(config)}{_changes(point, config)}"
    )
    warnings = [f"warning: {text}" for text in plan.warnings()]
    return "\n".join([first, f"schedule: {'; '.join(plan.describe())}", *warnings])


def _batches(config: TrainConfig) -> str:
    several = f"{config.supervision_steps} x " if config.supervision_steps > 1 else ""
    return f"{several}{config.global_batch_size}"


def _where(config: TrainConfig) -> str:
    scaling = config.scaling
    if scaling.mode == "local":
        return "in this process"
    if scaling.is_elastic:
        return f"on {scaling.min_workers} to {scaling.max_workers} Ray workers"
    return f"on {scaling.num_workers} Ray worker(s)"


def _starts_from_weights(config: TrainConfig, dataset: Dataset) -> bool:
    """Whether the run has a checkpoint that does not fit, of which only the weights are wanted."""
    if config.resume != "weights":
        return False
    checkpoints = finished(run_folder(config))
    return bool(checkpoints) and mismatch(checkpoints[-1], config, dataset) is not None


def _changes(point: Checkpoint | None, config: TrainConfig) -> str:
    """What differs from the run's earlier configuration, as text to append; empty if nothing does."""
    if point is None:
        return ""
    defaults = TrainConfig(data_path="").model_dump(mode="json")  # of keys that the run did not have yet
    now, before = config.model_dump(mode="json"), defaults | point.manifest.config
    ours = ("data_path", "storage", "device", "scaling")  # where it runs, not what it does
    changed = [f"{k} {before.get(k)} -> {v}" for k, v in now.items() if k not in ours and before.get(k) != v]
    return f"; changed: {', '.join(changed)}" if changed else ""


def train(config: TrainConfig, *, show_progress: bool = True) -> tuple[dict[str, Any], int | None]:
    """Train, or continue, the run that `config` describes.

    Returns:
        the summary, and the signal that stopped the run early, if one did.

    Raises:
        UserError: before anything starts, if the data or an earlier checkpoint does not fit.
        RunFailed: the loss is not finite, or more workers were lost than `failure.max_failures`.
    """
    dataset, plan = _dataset_and_plan(config)
    run = run_folder(config)
    check_places(run)
    bar = ProgressBar(config.global_batch_size * config.supervision_steps)
    if _starts_from_weights(config, dataset):
        whole = newest_whole(run, lambda event, what: bar.say(what))
        assert whole is not None  # it raises if there are checkpoints but all are damaged
        check_weights_fit(whole, config, dataset)
        aside = set_aside(run)
        if show_progress:
            bar.say(f"the old run is kept as {aside}")
    point = resume_point(config, run, dataset)
    if point and point.manifest.global_step >= plan.last_step:
        summary = last_summary(run)
        if summary.get("finished") and summary["global_step"] == point.manifest.global_step:
            return summary, None
    if config.scaling.mode == "ray":
        from hrm_ray.ray_session import check_cluster

        check_cluster()
    driver = Driver(config, bar if show_progress else None)
    with driver.stop.listening():
        try:
            result = (
                _train_here(config, driver) if config.scaling.mode == "local" else _on_ray(config, driver)
            )
        finally:
            bar.close()
    return result, driver.stop.signal if not result["finished"] else None


def _train_here(config: TrainConfig, driver: Driver) -> dict[str, Any]:
    hooks = Hooks(progress=driver.progress, stop=driver.stop.reason, event=driver.event, owner=driver.owner)
    return Trainer(config, run_folder(config), World(), hooks).train()


def _on_ray(config: TrainConfig, driver: Driver) -> dict[str, Any]:
    from hrm_ray.training.ray_train import train_on_ray

    return train_on_ray(config, run_folder(config), driver)
