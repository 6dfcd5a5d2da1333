"""Under `select=valid` a puzzle is answered only where a path has found what passes the check of its task."""

from collections.abc import Iterable, Mapping
from typing import ClassVar

import numpy as np
import torch

from hrm_ray.config.inference import Inference
from hrm_ray.data.shards import Dataset
from hrm_ray.evaluation.scores import Direction, Score
from hrm_ray.models.act import Batch
from hrm_ray.models.inference import Answers


class Answered(Score):
    """The share of the puzzles that are answered; of other selections, which answer all, nothing."""

    names: ClassVar[Mapping[str, Direction]] = {"answered": "maximize"}

    def __init__(self, dataset: Dataset, inference: Inference, device: torch.device):
        super().__init__(dataset, inference, device)
        self._counts = np.zeros(2, np.int64)  # puzzles, and those that are answered

    @classmethod
    def reported(cls, dataset: Dataset) -> Mapping[str, Direction]:
        return {}  # in training

    def add(self, batch: Batch, answers: Answers) -> None:
        if self.inference.select == "valid":
            questions, tokens = (tensor.cpu().numpy() for tensor in (batch.inputs, answers.last.tokens))
            self._counts += len(tokens), self.dataset.task.is_solution(questions, tokens).sum()

    def state(self) -> np.ndarray:
        return self._counts

    def metrics(self, states: Iterable[np.ndarray]) -> dict[str, float]:
        count, answered = sum(states, np.zeros(2)).tolist()
        return {"answered": answered / max(count, 1)} if self.inference.select == "valid" else {}
