"""What every task reports: right cells, whole answers right, what the Q head knows, steps taken."""

from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from hrm_ray.config.inference import Inference
from hrm_ray.data.shards import Dataset
from hrm_ray.evaluation.scores import Direction, Score
from hrm_ray.models.act import Batch
from hrm_ray.models.inference import Answers
from hrm_ray.models.losses import count_right

_LEARNED = "learned_"  # of the step at which the Q head would have halted


class Exact(Score):
    """Means over the puzzles that have labels."""

    names: ClassVar[Mapping[str, Direction]] = {
        "accuracy": "maximize",
        "exact_accuracy": "maximize",
        "q_halt_accuracy": "maximize",
        "steps": "minimize",
        f"{_LEARNED}exact_accuracy": "maximize",
        f"{_LEARNED}steps": "minimize",
    }

    of_q_head: ClassVar[frozenset[str]] = frozenset(
        name for name in names if name.startswith(("q_", _LEARNED))
    )

    def __init__(self, dataset: Dataset, inference: Inference, device: torch.device):
        super().__init__(dataset, inference, device)
        self._sums = torch.zeros(1 + len(self.names), dtype=torch.float64, device=device)

    def add(self, batch: Batch, answers: Answers) -> None:
        last, learned = answers
        num_right, num_labelled = count_right(last.tokens, batch.labels)
        exact = num_right == num_labelled
        num_right_learned, _ = count_right(learned.tokens, batch.labels)
        parts = (
            torch.ones_like(exact),
            num_right / num_labelled.clamp(min=1),
            exact,
            (last.q_halt >= 0) == exact,
            last.steps,
            num_right_learned == num_labelled,
            learned.steps,
        )
        is_puzzle = num_labelled > 0
        self._sums += torch.stack([(part * is_puzzle).sum(dtype=torch.float64) for part in parts])

    def state(self) -> Tensor:
        return self._sums.cpu()

    def metrics(self, states: Iterable[Tensor]) -> dict[str, float]:
        count, *sums = sum(states, torch.zeros(1)).tolist()
        means = {name: value / max(count, 1) for name, value in zip(self.names, sums, strict=True)}
        if self.inference.ends_early:  # then they say the same
            means = {name: mean for name, mean in means.items() if not name.startswith(_LEARNED)}
        return means
