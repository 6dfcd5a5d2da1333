"""Equations: the loss of the answers, and whether a run has grokked (see `hrm_ray.grokking`)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from hrm_ray.config.inference import Inference
from hrm_ray.config.schema import TrainConfig
from hrm_ray.data.shards import Dataset
from hrm_ray.evaluation.scores import Conclusion, Direction, Score
from hrm_ray.grokking.history import FILE, History
from hrm_ray.grokking.read import source_of
from hrm_ray.grokking.verdict import judge
from hrm_ray.models.act import IGNORE, Batch
from hrm_ray.models.inference import Answers
from hrm_ray.models.losses import cross_entropy


class Loss(Score, task="modular"):
    """The mean cross entropy (over softmax) of the labelled cells, as published: not that of whole equations."""

    names: ClassVar[Mapping[str, Direction]] = {"loss": "minimize"}
    needs_logits: ClassVar[bool] = True

    def __init__(self, dataset: Dataset, inference: Inference, device: torch.device):
        super().__init__(dataset, inference, device)
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)  # losses, and cells

    def add(self, batch: Batch, answers: Answers) -> None:
        losses = cross_entropy(answers.last.logits, batch.labels, "softmax_cross_entropy")
        cells = (batch.labels != IGNORE).sum(dtype=torch.float64)
        self._sums += torch.stack([losses.sum(dtype=torch.float64), cells])

    def state(self) -> Tensor:
        return self._sums.cpu()

    def metrics(self, states: Iterable[Tensor]) -> dict[str, float]:
        loss, cells = sum(states, torch.zeros(2)).tolist()
        return {"loss": loss / max(cells, 1)}

    @classmethod
    def concludes(
        cls,
        config: TrainConfig,
        dataset: Dataset,
        reports: Sequence[Mapping[str, float]],
        finished: bool = True,
    ) -> Conclusion:
        history = History.of_reports(reports)
        verdict = judge(history, replace(source_of(dataset, config), finished=finished))
        return Conclusion(verdict.text, {FILE: history.render(verdict.summary())})
