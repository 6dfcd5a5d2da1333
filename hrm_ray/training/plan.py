"""The arithmetic of a run: how long it is and what happens after which step. Pure functions of the clock."""

from collections.abc import Sequence
from dataclasses import dataclass

from hrm_ray.config.schema import TrainConfig
from hrm_ray.data.shards import Split
from hrm_ray.optim.schedules import warmup_cosine


@dataclass(frozen=True)
class Plan:
    """Steps are counted from 1.

    Attributes:
        total_steps: optimizer steps of the whole schedule.
        last_step: where the run ends (`max_steps` may come first).
        examples_per_epoch: one puzzle of every group, on average.
    """

    config: TrainConfig
    total_steps: int
    last_step: int
    examples_per_epoch: float

    @classmethod
    def of(cls, config: TrainConfig, split: Split) -> "Plan":
        examples_per_epoch = split.num_groups * split.info.mean_puzzle_examples
        batches = config.epochs * examples_per_epoch / config.global_batch_size
        total_steps = max(1, int(batches) if config.drop_last else -int(-batches // 1))
        last_step = min(total_steps, config.max_steps or total_steps)
        return cls(config, total_steps, last_step, examples_per_epoch)

    @property
    def num_examples(self) -> int | None:
        """End of the stream of examples if the last batch may be partial, else None."""
        return None if self.config.drop_last else round(self.config.epochs * self.examples_per_epoch)

    def epoch(self, step: int) -> float:
        """Epochs seen after `step`."""
        return step * self.config.global_batch_size / self.examples_per_epoch

    def lr_share(self, step: int) -> float:
        """Share of each base learning rate at `step`."""
        return warmup_cosine(
            step,
            self.total_steps,
            warmup_steps=self.config.lr_warmup_steps,
            min_ratio=self.config.lr_min_ratio,
        )

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation follows `step`: at the end of every `eval_interval` epochs, and at the end."""
        if step == self.last_step:
            return True
        interval = self.config.eval_interval
        return interval is not None and self.epoch(step) // interval > self.epoch(step - 1) // interval

    def saves(self, step: int) -> bool:
        """Whether a checkpoint follows `step`."""
        interval = self.config.checkpoint_interval
        return self.evaluates(step) or (interval is not None and step % interval == 0)

    def reports(self, step: int) -> bool:
        """Whether training metrics are reported after `step`."""
        return step % self.config.log_interval == 0 or self.evaluates(step)


def out_of_patience(evaluations: Sequence[float], patience: int | None) -> bool:
    """Whether the last `patience` evaluations (higher is better) brought nothing better than those before."""
    if patience is None or len(evaluations) <= patience:
        return False
    return max(evaluations[-patience:]) <= max(evaluations[:-patience])
