"""Training metrics between two reports, summed on the device so that no step waits for them."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hrm_ray.models.losses import METRICS, Q_LOSS_WEIGHT
from hrm_ray.training.step import Outcome
from hrm_ray.world import World

NEVER = 2**31 - 1  # a step that no run reaches


class LossDiverged(Exception):
    """A loss or the weights are not finite; raised on every worker alike.

    Attributes:
        step: the first such step.
        what: what is wrong, and where.
    """

    def __init__(self, step: int, what: str):
        super().__init__(step, what)
        self.step, self.what = step, what


class Meter:
    """Sums the metrics of this worker's steps until they are reported.

    Args:
        device: of the losses.
        slots_per_step: of all workers.
        max_loss: mean loss of a slot above which a step counts as not finite.
        has_q_head: whether there is anything to say about Q values.
        sums, num_steps: what an earlier attempt summed and did not report.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        slots_per_step: int,
        max_loss: float,
        has_q_head: bool = True,
        sums: Tensor | None = None,
        num_steps: int = 0,
    ):
        self._device, self._slots_per_step, self._max_loss = device, slots_per_step, max_loss
        self._has_q_head = has_q_head
        self._depth = 0  # of `excluded`
        self._reset()
        if sums is not None:
            self.sums += sums.to(device)
        self.num_steps = num_steps

    def _reset(self) -> None:
        self.sums = torch.zeros(len(METRICS), dtype=torch.float64, device=self._device)
        self.num_steps = 0
        self._bad_step = torch.full((), NEVER, device=self._device)
        self._num_timed = 0  # steps of this attempt
        self._data_wait_s = 0.0
        self._checkpoint_s: float | None = None
        self._started = time.perf_counter()

    def add(self, outcome: Outcome, step: int) -> None:
        """Count what came of `step`."""
        self.sums += outcome.metrics
        good = outcome.loss.abs() <= self._max_loss * outcome.num_slots  # false for NaN too
        self._bad_step = torch.minimum(self._bad_step, torch.where(good, NEVER, step))
        self.num_steps += 1
        self._num_timed += 1
        self._data_wait_s += outcome.data_wait_s

    def check(self, world: World) -> None:
        """Raise `LossDiverged` if a loss since the last report was not finite. Collective."""
        bad_steps = world.gather_objects(int(self._bad_step))
        if min(bad_steps) < NEVER:
            rank = bad_steps.index(min(bad_steps))
            raise LossDiverged(
                min(bad_steps), f"the loss is not finite at step {min(bad_steps)} on rank {rank}"
            )

    def report(self, world: World) -> dict[str, float]:
        """Metrics since the last report, over all workers. Collective.

        Raises:
            LossDiverged: a loss was not finite.
        """
        self.check(world)
        sums = dict(zip(METRICS, world.sum(self.sums).tolist(), strict=True))
        halted = sums.pop("count")
        record: dict[str, float] = {}
        if self.num_steps:  # none, if all were left out after a rollback
            slots = self.num_steps * self._slots_per_step
            weights = {"lm_loss": 1.0, "q_halt_loss": Q_LOSS_WEIGHT, "q_continue_loss": Q_LOSS_WEIGHT}
            means = {name: sums[name] / slots for name in weights if self._has_q_head or "q_" not in name}
            record |= {f"train/{name}": mean for name, mean in means.items()}
            record["train/loss"] = sum(weights[name] * mean for name, mean in means.items())
        if halted:
            for name in ("accuracy", "exact_accuracy", "q_halt_accuracy", "steps"):
                if self._has_q_head or "q_" not in name:
                    record[f"train/{name}"] = sums[name] / halted
        record["time/step_s"] = (time.perf_counter() - self._started) / max(1, self._num_timed)
        record["time/data_wait_s"] = self._data_wait_s / max(1, self._num_timed)
        if self._checkpoint_s is not None:
            record["time/checkpoint_s"] = self._checkpoint_s
        self._reset()
        return record

    @contextmanager
    def excluded(self, *, checkpoint: bool = False) -> Iterator[None]:
        """Do not count what is done inside as time of steps; of a checkpoint, report it. May be nested."""
        started = time.perf_counter()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            seconds = time.perf_counter() - started
            if self._depth == 0:
                self._started += seconds
            if checkpoint:
                self._checkpoint_s = (self._checkpoint_s or 0.0) + seconds
