"""Runs that are known beforehand: finalists with other seeds, and the best trial at full length.

What is finished says so in its own folder; so nothing else is kept, and the same command continues.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hrm_ray.config.compose import train_config
from hrm_ray.config.schema import TrainConfig
from hrm_ray.config.validate import split_word
from hrm_ray.storage.storage import Storage
from hrm_ray.training.launch import last_summary
from hrm_ray.tuning.execute import Book, Live
from hrm_ray.tuning.points import Points, value_of
from hrm_ray.tuning.view import View

SHORTENING = (
    "max_steps",
    "max_time_s",
    "early_stopping",
    "stop_at",
    "num_eval_examples",
)  # what "full length" leaves out


@dataclass(frozen=True)
class Planned:
    """A run to be.

    Attributes:
        number: of the trial that it repeats.
        name: of its folder.
        words: of ``hrm-ray train``, without the folder of the run.
    """

    number: int
    name: str
    words: list[str]


class RunsBook(Book):
    """Hands out what is planned and not finished yet."""

    def __init__(self, planned: Sequence[Planned], folder: Storage, points: Points, metric: str, view: View):
        self.planned, self.folder, self.points, self._metric, self.view = (
            planned,
            folder,
            points,
            metric,
            view,
        )
        self._left = [plan for plan in planned if self.value(plan) is None]
        self.max_concurrent = points.config.max_concurrent

    def value(self, plan: Planned) -> float | None:
        """Of a run; None if it is not finished."""
        summary = last_summary(self.folder / plan.name)
        return value_of(summary, self._metric) if summary.get("finished") else None

    def next(self) -> Live | None:
        if not self._left:
            return None
        plan = self._left.pop(0)
        run = self.run(plan)
        return Live(plan.number, run, self.points.plan(run).last_step, plan.name)

    def run(self, plan: Planned) -> TrainConfig:
        return train_config([*plan.words, f"storage={self.folder}", f"run_name={plan.name}"])

    @property
    def num_to_come(self) -> int:
        return len(self._left)

    def is_over(self) -> bool:
        return not self._left

    @property
    def metrics(self) -> list[str]:
        return [self._metric]

    def end(self, live: Live, outcome: dict[str, Any]) -> None:
        value = value_of(outcome.get("summary") or {}, self._metric)
        name = self._metric.rpartition("/")[2]
        said = f"{name} {value:.4g}" if value is not None else outcome.get("reason", outcome["kind"])
        self.view.say(f"{live.words}: {said}")


def with_seed(words: Sequence[str], seed: int) -> list[str]:
    """The words with another seed, and without a name of a run."""
    return [*without(words, ("seed", "run_name")), f"seed={seed}"]


def without(words: Sequence[str], keys: Sequence[str]) -> list[str]:
    return [word for word in words if split_word(word)[0] not in keys]


def at_full_length(words: Sequence[str]) -> list[str]:
    """The words without what shortens trials, be it one of them or of their experiment."""
    words = without(words, SHORTENING)
    config = train_config(words)
    return [*words, *(f"{key}=null" for key in SHORTENING if getattr(config, key) is not None)]


def seed_of(words: Sequence[str]) -> int:
    """The seed that a run with these words has."""
    return train_config(words).seed


def other_seeds(words: Sequence[str], count: int) -> Iterator[int]:
    """So many seeds, none that of the words."""
    own = seed_of(words)
    yield from [seed for seed in range(count + 1) if seed != own][:count]
