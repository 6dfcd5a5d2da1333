"""What an evaluation reports: scores of answers, which register themselves.

A score is a module of this room with a class of `Score`. One that is for a task only says so (`task="maze"`); a task of
yours may hold its score in its own module. Every worker scores its own puzzles, and their states, taken together by the
first worker in the order of ranks, give the metrics.
"""

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar, Literal, NamedTuple

import torch

from hrm_ray.config.inference import Inference
from hrm_ray.config.schema import TrainConfig
from hrm_ray.config.validate import nearest
from hrm_ray.data.shards import Dataset
from hrm_ray.data.tasks.base import import_family
from hrm_ray.errors import UserError
from hrm_ray.models.act import Batch
from hrm_ray.models.inference import Answers

Direction = Literal["maximize", "minimize"]


class Conclusion(NamedTuple):
    """What the reports of a whole run come to: in one sentence, and as files to lie beside its summary."""

    text: str
    files: Mapping[str, bytes]


class Score(ABC):
    """Scores the answers of one evaluation on one worker.

    Attributes:
        names: the metrics that it may report, and which way each is better. What is not known is left out of a report.
        needs_logits: whether the answers that it scores have logits.
        of_q_head: those of `names` that only a model with a Q head has.
        is_whole: whether all examples of the split are evaluated, not some only.
    """

    classes: ClassVar[list[tuple[str | None, type["Score"]]]] = []

    names: ClassVar[Mapping[str, Direction]]
    of_q_head: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, task: str | None = None) -> None:
        Score.classes.append((task, cls))

    needs_logits: ClassVar[bool] = False
    is_whole: bool = True

    def __init__(self, dataset: Dataset, inference: Inference, device: torch.device):
        """Begins an evaluation.

        Args:
            dataset: whose answers are scored.
            inference: how the model is used.
            device: where batches and answers are.
        """
        self.dataset, self.inference, self.device = dataset, inference, device

    @classmethod
    def reported(cls, dataset: Dataset) -> Mapping[str, Direction]:
        """Those of `names` that it reports for this data set."""
        return cls.names

    @abstractmethod
    def add(self, batch: Batch, answers: Answers) -> None:
        """Take note of the answers to a batch without padding."""

    @abstractmethod
    def state(self) -> Any:
        """All that `metrics` needs of this worker; small, and can be pickled."""

    @abstractmethod
    def metrics(self, states: Iterable[Any]) -> dict[str, float]:
        """The metrics, from the states of all workers in the order of their ranks.

        Called on the first worker. The states arrive as they are asked for, each once.
        """

    @classmethod
    def concludes(
        cls,
        config: TrainConfig,
        dataset: Dataset,
        reports: Sequence[Mapping[str, float]],
        finished: bool = True,
    ) -> Conclusion | None:
        """What all reports of a run come to, beside its metrics; here nothing.

        Args:
            config, dataset: the run.
            reports: as in metrics.jsonl.
            finished: whether the run has ended as planned, and was not stopped.
        """
        return None


@cache
def _all() -> Sequence[tuple[str | None, type[Score]]]:
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        importlib.import_module(module.name)
    return Score.classes


def scores_of(task: str) -> list[type[Score]]:
    """The scores of a task. Raises UserError: there is no such task."""
    import_family(task)  # it may bring its own
    return [score for of, score in _all() if of in (None, task)]


def directions(task: str | None = None) -> dict[str, Direction]:
    """The metrics of evaluations, of a task or of all, by name (``eval/steps``), and the way each is better."""
    chosen = scores_of(task) if task else [score for _, score in _all()]
    return {f"eval/{name}": way for score in chosen for name, way in score.names.items()}


def of_q_heads(task: str) -> set[str]:
    """The names of metrics of a task that only a model with a Q head has."""
    return {name for score in scores_of(task) for name in score.of_q_head}


def reported(dataset: Dataset, *, has_q_head: bool) -> dict[str, Direction]:
    """The metrics that evaluations on `dataset` report in training, as of `directions`."""
    scores = scores_of(dataset.task.name)
    left_out = set() if has_q_head else of_q_heads(dataset.task.name)
    found = {name: way for score in scores for name, way in score.reported(dataset).items()}
    return {f"eval/{name}": way for name, way in found.items() if name not in left_out}


def check_best_metric(metric: str, dataset: Dataset, *, has_q_head: bool = True) -> None:
    """Raise UserError unless a run on `dataset` can keep its best checkpoint by `metric`."""
    task, metrics = dataset.task.name, reported(dataset, has_q_head=has_q_head)
    known = [name for name, way in metrics.items() if way == "maximize"]
    if metric in directions(task) and metric not in metrics:
        raise UserError(
            f"best_metric={metric} is not known for {dataset.path}: no evaluation in training reports it"
        )
    if metric not in known:
        raise UserError(f"best_metric={metric} is no metric of task {task}; {nearest(metric, known)}")
