"""What a run tells its user, and what it is asked from outside, in the process that its user started."""

import sys
import uuid
from typing import Any

from tqdm import tqdm

from hrm_ray.config.schema import TrainConfig
from hrm_ray.storage.storage import Storage
from hrm_ray.training.checkpoint import finished
from hrm_ray.training.hooks import Progress
from hrm_ray.training.signals import StopRequest


def run_folder(config: TrainConfig) -> Storage:
    """STORAGE/RUN_NAME."""
    return Storage(config.storage) / (config.run_name or "train")


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
