"""Mazes: is the path a path, and the shortest? There may be several, of which the label is one."""

from collections.abc import Iterable, Mapping
from typing import ClassVar

import numpy as np
import torch

from hrm_ray.config.inference import Inference
from hrm_ray.data.shards import Dataset
from hrm_ray.data.tasks.maze import WALL, Maze
from hrm_ray.evaluation.scores import Direction, Score
from hrm_ray.models.act import Batch
from hrm_ray.models.inference import Answers


class Path(Score, task="maze"):
    """Shares of the mazes.

    - `valid_path`: start, goal and path are connected, nothing else is changed (`Maze.is_solution`);
    - `shortest_path`: and no path is shorter;
    - `free_exact_accuracy`: all cells that are no wall are as in the label.
    """

    names: ClassVar[Mapping[str, Direction]] = {
        "valid_path": "maximize",
        "shortest_path": "maximize",
        "free_exact_accuracy": "maximize",
    }

    def __init__(self, dataset: Dataset, inference: Inference, device: torch.device):
        super().__init__(dataset, inference, device)
        assert isinstance(dataset.task, Maze)
        self._task = dataset.task
        self._sums = np.zeros(1 + len(self.names))

    def add(self, batch: Batch, answers: Answers) -> None:
        questions, labels, tokens = (
            tensor.cpu().numpy() for tensor in (batch.inputs, batch.labels, answers.last.tokens)
        )
        right = (tokens == labels) | (questions == WALL)
        self._sums += (
            len(tokens),
            self._task.is_solution(questions, tokens).sum(),
            self._task.is_shortest(questions, tokens).sum(),
            right.all(axis=1).sum(),
        )

    def state(self) -> np.ndarray:
        return self._sums

    def metrics(self, states: Iterable[np.ndarray]) -> dict[str, float]:
        count, *sums = sum(states, np.zeros(1)).tolist()
        return {name: value / max(count, 1) for name, value in zip(self.names, sums, strict=True)}
