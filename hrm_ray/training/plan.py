"""The arithmetic of a run: how long it is and what happens after which step. Pure functions of the clock."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from hrm_ray.config.halting import OLD_STEP_COUNTS, HaltingConfig
from hrm_ray.config.schema import TrainConfig
from hrm_ray.data.shards import Split
from hrm_ray.errors import UserError
from hrm_ray.optim.schedules import Shape, anneal, first_step_at, warmup_cosine

# What is annealed while halting is learned: the key, the ratio that says until when, the shape.
ANNEALED: tuple[tuple[str, str, Shape], ...] = (
    ("expansion_penalty", "expansion_anneal_ratio", "cosine"),
    ("q_temperature", "q_temperature_anneal_ratio", "exponential"),
    ("epsilon", "epsilon_anneal_ratio", "linear"),
)


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
        """The plan of a run on the examples `split`.

        Raises:
            UserError: a duration is longer than the run.
        """
        examples_per_epoch = split.num_groups * split.info.mean_puzzle_examples
        # As many as the run will take: its batches go on over the ends of epochs, as in the published schedule.
        batches = config.epochs * examples_per_epoch / (config.global_batch_size * config.supervision_steps)
        total_steps = max(1, int(batches) if config.drop_last else -int(-batches // 1))
        last_step = min(total_steps, config.max_steps or total_steps)
        plan = cls(config, total_steps, last_step, examples_per_epoch)
        plan._check_durations()
        return plan

    def _check_durations(self) -> None:
        for key, ratio in OLD_STEP_COUNTS.items():
            value = getattr(self.config.halting, key)
            if value is not None and value > self.total_steps:
                raise UserError(
                    f"{key}={value} is longer than the run's {self.total_steps} steps; lower it, or give "
                    f"{ratio}=RATIO, a share of the run"
                )

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps in which every group is visited once."""
        return self.examples_per_epoch / (self.config.global_batch_size * self.config.supervision_steps)

    @cached_property
    def halting(self) -> HaltingConfig:
        """`config.halting` with numbers of steps, where they were given, turned into ratios."""
        given = {old: getattr(self.config.halting, old) for old in OLD_STEP_COUNTS}
        ratios = {OLD_STEP_COUNTS[old]: n / self.total_steps for old, n in given.items() if n is not None}
        return self.config.halting.model_copy(update=ratios)

    def warnings(self) -> list[str]:
        """A warning for every number of steps that became a ratio, and for a warm-up that never ends."""
        too_long = []
        if self.lr_warmup_steps > self.total_steps:  # as published, where a short run stays in its warm-up
            too_long.append(
                f"lr_warmup_steps={self.config.lr_warmup_steps} is longer than the run's {self.total_steps} steps: the "
                f"learning rate only rises to {self.lr(self.total_steps):.2g}; lr_warmup_ratio=0.1 is a warm-up of a "
                "tenth of the run"
            )
        return too_long + [
            f"{old}={getattr(self.config.halting, old)} of {self.total_steps} steps is taken as "
            f"{ratio}={getattr(self.halting, ratio):g}; give that instead"
            for old, ratio in OLD_STEP_COUNTS.items()
            if getattr(self.config.halting, old) is not None
        ]

    def describe(self) -> list[str]:
        """Lines for a user: the length of the run, and the step at which each schedule ends."""
        config, h = self.config, self.halting
        lines = [f"{self.total_steps} steps, {self.steps_per_epoch:.5g} an epoch"]
        ratio = self.lr_warmup_steps / self.total_steps
        warmup = f"lr: warm-up to step {math.ceil(self.lr_warmup_steps)} (lr_warmup_ratio={ratio:.3g})"
        constant = config.lr_min_ratio == 1 or ratio >= 1
        lines.append(
            warmup + ("" if constant else f", down to {config.lr_min_ratio:g} at {self.total_steps}")
        )
        if config.weight_decay_end is not None:
            end = self._ends(config.weight_decay_anneal_ratio)
            lines.append(
                f"weight_decay: {config.weight_decay:g} to {config.weight_decay_end:g} at step {end}"
            )
        if h.name == "q_learning":
            lines.append(f"Q-learning: warm-up to step {self._ends(h.dqn_warmup_ratio)}")
            for key, ratio_key, _ in ANNEALED:
                start, end = getattr(h, key), getattr(h, f"{key}_end")
                lines.append(f"{key}: {start:g} to {end:g} at step {self._ends(getattr(h, ratio_key))}")
        return lines

    def _ends(self, ratio: float) -> int:
        return first_step_at(ratio, self.total_steps)

    def annealed(self, step: int) -> dict[str, float]:
        """The values of `ANNEALED` at `step`, by name."""
        h = self.halting
        return {
            key: anneal(
                step,
                self.total_steps,
                start=getattr(h, key),
                end=getattr(h, f"{key}_end"),
                ratio=getattr(h, ratio),
                shape=shape,
            )
            for key, ratio, shape in ANNEALED
        }

    def is_warming_up(self, step: int) -> bool:
        """Whether Q-learning only watches at `step`."""
        return step <= self._ends(self.halting.dqn_warmup_ratio)

    def weight_decay(self, step: int) -> float:
        """Weight decay of the dense parameters at `step`."""
        config = self.config
        if config.weight_decay_end is None:
            return config.weight_decay
        return anneal(
            step,
            self.total_steps,
            start=config.weight_decay,
            end=config.weight_decay_end,
            ratio=config.weight_decay_anneal_ratio,
            shape="cosine",
        )

    @property
    def num_examples(self) -> int | None:
        """End of the stream of examples if the last batch may be partial, else None."""
        return None if self.config.drop_last else round(self.config.epochs * self.examples_per_epoch)

    def epoch(self, step: int) -> float:
        """Epochs seen after `step`."""
        batches = step * self.config.supervision_steps
        return batches * self.config.global_batch_size / self.examples_per_epoch

    def lr_share(self, step: int) -> float:
        """Share of each base learning rate at `step`."""
        return warmup_cosine(
            step,
            self.total_steps,
            warmup_steps=self.lr_warmup_steps,
            min_ratio=self.config.lr_min_ratio,
        )

    @property
    def lr_warmup_steps(self) -> float:
        ratio = self.config.lr_warmup_ratio
        return self.config.lr_warmup_steps if ratio is None else ratio * self.total_steps

    def lr(self, step: int) -> float:
        """Learning rate of the dense parameters at `step`."""
        return self.config.lr * self.lr_share(step)

    def values(self, step: int) -> dict[str, float]:
        """What is scheduled, at `step`, by the names of metrics."""
        values = {"train/lr": self.lr(step)}
        if self.config.weight_decay_end is not None:
            values["train/weight_decay"] = self.weight_decay(step)
        if self.config.halting.name == "q_learning":
            values |= {f"train/{key}": value for key, value in self.annealed(step).items()}
        return values

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation follows `step`: at the end of every `eval_interval` epochs, or every
        `eval_interval_steps` steps, and at the end."""
        if step == self.last_step:
            return True
        if self.config.eval_interval_steps is not None:
            return step % self.config.eval_interval_steps == 0
        interval = self.config.eval_interval
        return interval is not None and self.epoch(step) // interval > self.epoch(step - 1) // interval

    def saves(self, step: int) -> bool:
        """Whether a checkpoint follows `step`."""
        interval = self.config.checkpoint_interval
        return self.evaluates(step) or (interval is not None and step % interval == 0)

    def reports(self, step: int) -> bool:
        """Whether training metrics are reported after `step`."""
        return step % self.config.log_interval == 0 or self.evaluates(step)


def stops_early(evaluations: Sequence[float], patience: int | None) -> bool:
    """Whether the last `patience` evaluations (higher is better) brought nothing better than those before."""
    if patience is None or len(evaluations) <= patience:
        return False
    return max(evaluations[-patience:]) <= max(evaluations[:-patience])
