"""ARC: the augmented copies of a test pair vote; pass@k of their answers (see `votes` and `pass_at_k`)."""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import ClassVar

import torch

from hrm_ray.config.inference import Inference
from hrm_ray.data.format import IDENTIFIERS, TEST_PUZZLES, File
from hrm_ray.data.shards import Dataset
from hrm_ray.evaluation.held_out import HeldOut, read_held_out
from hrm_ray.evaluation.names import Names
from hrm_ray.evaluation.pass_at_k import KS, pass_at_k
from hrm_ray.evaluation.scores import Direction, Score
from hrm_ray.evaluation.votes import State, Votes
from hrm_ray.models.act import Batch
from hrm_ray.models.inference import Answers


@lru_cache(maxsize=1)
def _held_out(root: str, extra_files: tuple[File, ...]) -> HeldOut:
    """Read once a run, not at every evaluation: of a million names it takes seconds."""
    return read_held_out(root)


class PassAtK(Score, task="arc"):
    """Votes of the evaluation's own rows.

    Nothing is reported where the data set has no test tasks. Of an evaluation of some rows only, the tasks count all of
    whose test pairs were seen.
    """

    names: ClassVar[Mapping[str, Direction]] = {
        **{f"{kind}@{k}": "maximize" for kind in ("pass", "hrm_pass") for k in KS},
        "row_accuracy": "maximize",
    }

    def __init__(self, dataset: Dataset, inference: Inference, device: torch.device):
        super().__init__(dataset, inference, device)
        self.held_out: HeldOut | None = None
        if self.reported(dataset):
            self.held_out = _held_out(str(dataset.root), dataset.manifest.extra_files)
        self.votes = Votes(self.held_out.names if self.held_out else Names([]))

    def add(self, batch: Batch, answers: Answers) -> None:
        if self.held_out is None:
            return
        columns = batch.inputs, answers.last.tokens, batch.puzzle_identifiers, answers.last.q_halt
        self.votes.add(*(tensor.cpu().numpy() for tensor in columns))

    def state(self) -> State:
        return self.votes.state()

    def metrics(self, states: Iterable[State]) -> dict[str, float]:
        if self.held_out is None:
            return {}
        self.votes.reset()
        self.votes.merge(states)
        seen = {
            task: pairs
            for task, pairs in self.held_out.tasks.items()
            if self.is_whole or all(self.votes.num_votes(task, pair.input) for pair in pairs)
        }
        return pass_at_k(self.votes, self.held_out._replace(tasks=seen))

    @classmethod
    def reported(cls, dataset: Dataset) -> Mapping[str, Direction]:
        has_tasks = all((dataset.root / name).is_file() for name in (IDENTIFIERS, TEST_PUZZLES))
        return cls.names if has_tasks else {}
