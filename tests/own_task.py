"""A task that is found by its import path, with a score of its own: tokens, and whether the last cell is right."""

from typing import ClassVar

import torch

from hrm_ray.data.tasks.tokens import Tokens
from hrm_ray.evaluation.scores import Score


class Own(Tokens):
    name = "tests.own_task"


class LastWrong(Score, task=Own.name):
    names: ClassVar = {"last_wrong": "minimize", "last_right": "maximize"}

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._wrong, self._count = torch.zeros(()), 0

    def add(self, batch, answers):
        self._wrong += (answers.last.tokens[:, -1] != batch.labels[:, -1]).sum().cpu()
        self._count += len(batch.labels)

    def state(self):
        return self._wrong, self._count

    def metrics(self, states):
        wrong, counts = zip(*states, strict=True)
        share = float(sum(wrong)) / sum(counts)
        return {"last_wrong": share, "last_right": 1 - share}
