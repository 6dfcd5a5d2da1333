"""The arithmetic of a run: how long it is and what happens after which step. Pure functions of the clock."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hrm_ray.config.schema import TrainConfig
from hrm_ray.data.shards import Dataset, Split
from hrm_ray.errors import UserError
from hrm_ray.optim.schedules import anneal, first_step_at, warmup_cosine

# Of a batch in evaluations; with fewer cells, what surrounds the products takes most of the time.
LEAST_CELLS = 4096


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
        config.halting.check(total_steps)
        return cls(config, total_steps, last_step, examples_per_epoch)

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps in which every group is visited once."""
        return self.examples_per_epoch / (self.config.global_batch_size * self.config.supervision_steps)

    def warnings(self) -> list[str]:
        """A warning for every number of steps that became a ratio, and for a warm-up that never ends."""
        too_long = []
        if self.lr_warmup_steps > self.total_steps:  # as published, where a short run stays in its warm-up
            too_long.append(
                f"lr_warmup_steps={self.config.lr_warmup_steps} is longer than the run's {self.total_steps} steps: the "
                f"learning rate only rises to {self.lr(self.total_steps):.2g}; lr_warmup_ratio=0.1 is a warm-up of a "
                "tenth of the run"
            )
        return too_long + self.config.halting.warnings(self.total_steps)

    def describe(self) -> list[str]:
        """Lines for a user: the length of the run, and the step at which each schedule ends."""
        config = self.config
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
        if self._depths and (full := config.arch.full_depth):
            depths = [f"{H} x {L} to step {last}" for last, (H, L) in self._depths]
            lines.append(f"H x L cycles: {', '.join(depths)}, then {full[0]} x {full[1]}")
        if config.curriculum.filled:
            share, until = config.curriculum.filled
            lines.append(f"filled in: {share:g} of the open cells, down to 0 at step {self._ends(until)}")
        if config.curriculum.rating:
            share, until = config.curriculum.rating
            lines.append(f"the easiest {share:g} of the puzzles, up to all at step {self._ends(until)}")
        return lines + config.halting.describe(self.total_steps)

    def _ends(self, ratio: float) -> int:
        return first_step_at(ratio, self.total_steps)

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

    @cached_property
    def _depths(self) -> list[tuple[int, tuple[int, int]]]:
        """The last step of each depth before the full one, and its H and L cycles."""
        return [
            (first_step_at(until, self.total_steps), (H, L)) for until, H, L in self.config.curriculum.depth
        ]

    def depth(self, step: int) -> tuple[int, int] | None:
        """H and L cycles of the model at `step`; None: those of its architecture.

        A depth that grows with the run is Curriculum-Guided Adaptive Recursion, arXiv:2511.08653, whose three depths
        begin at 0, 30 and 60 % of it.
        """
        return next((cycles for last, cycles in self._depths if step <= last), None)

    def depths(self, first_step: int) -> set[tuple[int, int] | None]:
        """The depths of the steps from `first_step` to the last."""
        starts = [last + 1 for last, _ in self._depths]
        return {
            self.depth(step)
            for step in (first_step, *starts, self.last_step)
            if first_step <= step <= self.last_step
        }

    def filled(self, step: int) -> float:
        """Share of the open cells of questions that are filled in at `step`, on average.

        Easier puzzles first are curriculum learning (Bengio et al. 2009). To make them by starting near the goal is
        from reverse curricula (Florensa et al. 2017, arXiv:1707.05300), which go back from it as fast as the learner
        follows; here the clock decides.
        """
        if self.config.curriculum.filled is None:
            return 0.0
        share, until = self.config.curriculum.filled
        return anneal(step, self.total_steps, start=share, end=0.0, ratio=until, shape="linear")

    def easiest(self, step: int) -> float:
        """Share of the training puzzles, the easiest, from which those of `step` are.

        Curriculum learning (Bengio et al. 2009), by a rating that the data set has.
        """
        if self.config.curriculum.rating is None:
            return 1.0
        share, until = self.config.curriculum.rating
        return anneal(step, self.total_steps, start=share, end=1.0, ratio=until, shape="linear")

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
        if self.config.curriculum.filled:
            values["train/filled"] = self.filled(step)
        if self.config.curriculum.rating:
            values["train/easiest"] = self.easiest(step)
        annealed = self.config.halting.annealed(step, self.total_steps)
        return values | {f"train/{key}": value for key, value in annealed.items()}

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation follows `step`: at the end of every `eval_interval` epochs, or every
        `eval_interval_steps` steps, or as `eval_spacing` says, and at the end."""
        return step == self.last_step or self.num_evaluations(step) > self.num_evaluations(step - 1)

    def num_evaluations(self, step: int) -> int:
        """Evaluations after the steps up to `step`, without the one that is due at the end only."""
        config = self.config
        if config.eval_spacing is not None:
            return bisect_right(self._spaced, step)
        if config.eval_interval_steps is not None:
            return step // config.eval_interval_steps
        return int(self.epoch(step) // config.eval_interval) if config.eval_interval else 0

    @cached_property
    def _spaced(self) -> list[int]:
        """The steps of evaluations under `eval_spacing`, as openai/grok spaces those of epochs."""
        ratio, interval = 1 + (self.config.eval_spacing or 0), self.config.eval_interval_steps or 1
        steps, step = [], interval
        while step <= self.last_step:
            steps.append(step)
            step = max(step + interval, int(step * ratio))
        return steps

    def saves(self, step: int) -> bool:
        """Whether a checkpoint follows `step`; not for each of many evaluations that are close to each other."""
        interval = self.config.checkpoint_interval
        if step == self.last_step or (interval is not None and step % interval == 0):
            return True
        return self.config.eval_spacing is None and self.evaluates(step)

    def takes_eigenvalues(self, step: int) -> bool:
        """Whether the evaluation after `step` looks at the gradients too."""
        config = self.config
        is_due = step == self.last_step or self.num_evaluations(step) % config.gop_interval == 0
        return config.gop_eigenvalues > 0 and is_due

    def reports(self, step: int) -> bool:
        """Whether training metrics are reported after `step`."""
        return step % self.config.log_interval == 0 or self.evaluates(step)


def evaluated_at_once(config: TrainConfig, batch_size: int, num_workers: int, seq_len: int) -> int:
    """Puzzles of `seq_len` cells that a worker evaluates at once, where `batch_size` of all workers make a step."""
    at_once = max(batch_size // num_workers, LEAST_CELLS // seq_len, 1)
    return min(at_once, config.micro_batch_size or at_once)


def check_data(config: TrainConfig, dataset: Dataset) -> None:
    """Raise UserError if `dataset` has not what `config.curriculum` needs, or shows its answers to the model."""
    if dataset.task.answers_are_inputs and not config.arch.is_causal:
        raise UserError(
            f"{dataset.path} shows the answers behind the questions, and arch={config.arch.name} reads both; use "
            "arch=decoder, or build it with predict_end=false"
        )
    if config.curriculum.filled and not dataset.task.fillable:
        raise UserError(
            f"curriculum.filled: an answer of task {dataset.task.name} is not its question with cells filled in; leave "
            "it out"
        )
    if config.curriculum.rating:
        split = dataset.split("train")
        if split.ratings is None:
            raise UserError(
                f"curriculum.rating: {dataset.path} has no ratings; build it with keep_ratings=true, from a file with "
                "a column rating or with rate=true"
            )
        if np.ptp(np.diff(split.puzzle_starts)):
            raise UserError(
                f"curriculum.rating: the puzzles of {dataset.path} have several numbers of examples"
            )


def why_ends_early(evaluations: Sequence[float], config: TrainConfig) -> str | None:
    """The key of `config` by which a run ends before its last step; None: it goes on.

    Args:
        evaluations: the values of its best_metric so far, of which higher ones are better.
    """
    if config.stop_at is not None and max(evaluations, default=-math.inf) >= config.stop_at:
        return "stop_at"
    patience = config.early_stopping
    if patience is None or len(evaluations) <= patience:
        return None
    return "early_stopping" if max(evaluations[-patience:]) <= max(evaluations[:-patience]) else None
