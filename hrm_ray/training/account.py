"""What a run tells of itself: its records and events, which the first worker writes, and progress."""

from collections.abc import Callable
from typing import Any

from hrm_ray.config.schema import TrainConfig
from hrm_ray.data.shards import Dataset
from hrm_ray.evaluation.scores import scores_of
from hrm_ray.storage.storage import Storage
from hrm_ray.training.hooks import Hooks, Progress
from hrm_ray.training.logging import Records, note_event
from hrm_ray.training.plan import Plan
from hrm_ray.world import World


class Account:
    """One worker's account of a run; on all but the first, nothing is written.

    Args:
        config, plan: the run.
        run: its folder, held by this process.
        world: this worker's place.
        hooks: who is told.
        step: the global step at hand.
    """

    def __init__(
        self,
        config: TrainConfig,
        plan: Plan,
        run: Storage,
        world: World,
        hooks: Hooks,
        step: Callable[[], int],
    ):
        self._config, self._plan, self._run, self._world = config, plan, run, world
        self._hooks, self._step = hooks, step
        self._records: Records | None = None

    def open(self, *, evaluates_again: bool) -> None:
        """Begin, or go on with, the records; for the first worker. See `Records`."""
        self._records = Records(
            self._run,
            self._config,
            self._step(),
            evaluates_again=evaluates_again,
            on_event=self.note,
        )

    @property
    def last(self) -> dict[str, Any]:
        """The newest value of every metric; nothing on other workers than the first."""
        return self._records.last if self._records else {}

    def note(self, event: str, message: str) -> None:
        """Write down what has happened to the run."""
        if self._world.is_first:
            place = {"global_step": self._step(), "num_workers": self._world.size}
            self._hooks.event(note_event(self._run, event, **place, message=message))

    def report(self, values: dict[str, float]) -> None:
        """Write one record of metrics, which every worker has alike."""
        if self._records is None:
            return
        step = self._step()
        record = {"global_step": step, "epoch": round(self._plan.epoch(step), 4), **values}
        self._records.write(record)
        self._hooks.report(record)

    def show(self, phase: str, setup: str) -> None:
        """Tell how far it is."""
        if self._records:
            progress = Progress(self._step(), self._plan.last_step, phase, setup, self.last)
            self._hooks.progress(progress)

    def evaluations(self) -> list[float]:
        """The values of `best_metric` in all evaluations so far; none on other workers than the first."""
        return self._records.evaluations(self._config.best_metric) if self._records else []

    def rewind(self) -> None:
        """Drop what was reported after the step at hand."""
        if self._records:
            self._records.rewind(self._step())

    def flush(self) -> None:
        """Make what was written last, before a checkpoint says that it is there."""
        if self._records:
            self._records.flush()

    def conclude(self, dataset: Dataset, *, finished: bool) -> list[str]:
        """Write the files of what the reports so far come to (see `Score.concludes`); returns it in words."""
        if self._records is None:
            return []
        reports = self._records.reports()
        scores = scores_of(dataset.task.name)
        found = [c for score in scores if (c := score.concludes(self._config, dataset, reports, finished))]
        for name, content in (file for conclusion in found for file in conclusion.files.items()):
            self._records.conclude(name, content)
        return [conclusion.text for conclusion in found]

    def summarise(self, summary: dict[str, Any]) -> None:
        """Write summary.json."""
        if self._records:
            self._records.summarise(summary)

    def close(self) -> None:
        """Let go of what is open."""
        if self._records:
            self._records.close()
