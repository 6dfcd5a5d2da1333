"""Runs a training run for its user: says what will be done, shows progress, passes on requests to stop.

The loop itself runs in this process (`scaling=local`) or in the workers of Ray Train (`ray_train`).
"""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

from hrm_ray.config.halting import halting_of
from hrm_ray.config.schema import TrainConfig
from hrm_ray.data.shards import open_dataset
from hrm_ray.evaluation.scores import check_best_metric
from hrm_ray.models.registry import coordinates_of
from hrm_ray.training.checkpoint import Checkpoint, finished, newest_whole
from hrm_ray.training.driver import Driver, ProgressBar, run_folder
from hrm_ray.training.hooks import Hooks
from hrm_ray.training.logging import check_places, last_summary
from hrm_ray.training.loop import TrainingLoop
from hrm_ray.training.plan import Plan, check_data
from hrm_ray.training.resume import mismatch, resume_point, set_aside
from hrm_ray.training.state import check_weights_fit, dataset_info
from hrm_ray.world import World


class Launch:
    """A run that is about to begin or to continue; its data, plan and checkpoint are looked up once for its user.

    Args:
        config: the run.

    Raises:
        UserError: the data do not fit, or its files cannot be written.
    """

    def __init__(self, config: TrainConfig):
        self.config, self.run = config, run_folder(config)
        self.dataset = open_dataset(config.data_path)
        check_best_metric(config.best_metric, self.dataset, has_q_head=config.arch.has_q_head)
        check_data(config, self.dataset)
        coordinates_of(config.arch, dataset_info(self.dataset))  # raises where the model cannot be made
        self.plan = Plan.of(config, self.dataset.split("train"))
        check_places(self.run)

    @cached_property
    def point(self) -> Checkpoint | None:
        """The checkpoint that it continues, its files not yet verified; None for a new run.

        Raises:
            UserError: it belongs to another model, data set, seed or batch size.
        """
        return None if self._starts_from_weights else resume_point(self.config, self.run, self.dataset)

    @cached_property
    def _starts_from_weights(self) -> bool:
        """Whether the run has a checkpoint that does not fit, of which only the weights are wanted."""
        if self.config.resume != "weights":
            return False
        checkpoints = finished(self.run)
        return bool(checkpoints) and mismatch(checkpoints[-1], self.config, self.dataset) is not None

    def announce(self) -> str:
        """Lines to print before training: where, what, how long, and when each schedule ends."""
        config, plan, point = self.config, self.plan, self.point
        if point and point.manifest.global_step >= plan.last_step:
            step = point.manifest.global_step
            return f"run {self.run} is finished at step {step}; run_name=NAME starts another"
        start = f"continues after step {point.manifest.global_step}" if point else "starts"
        first = (
            f"run {self.run} {start}: {plan.last_step} steps of {_batches(config)} puzzles from "
            f"{config.data_path}, {_where(config)}{_changes(point, config)}"
        )
        splits = self.dataset.manifest.splits
        about = self.dataset.task.about({name: info.num_examples for name, info in splits.items()})
        warnings = [f"warning: {text}" for text in (*plan.warnings(), *self._not_evaluated())]
        return "\n".join([first, *about, f"schedule: {'; '.join(plan.describe())}", *warnings])

    def _not_evaluated(self) -> Iterator[str]:
        """What is in vain where nothing is held out."""
        if self.dataset.splits.get("test"):
            return
        keys = ("stop_at", "early_stopping", "eval_train", "log_norms", "gop_eigenvalues")
        idle = [key for key in keys if getattr(self.config, key)]
        yield f"{self.config.data_path} holds no examples out, so nothing is evaluated" + (
            f": {', '.join(idle)} have no effect" if idle else ""
        )

    def train(self, *, show_progress: bool = True) -> tuple[dict[str, Any], int | None]:
        """Run it.

        Returns:
            the summary, and the signal that stopped the run early, if one did.

        Raises:
            UserError: before anything starts, if an earlier checkpoint does not fit.
            RunFailed: the loss is not finite, or more workers were lost than `failure.max_failures`.
        """
        config, run = self.config, self.run
        bar = ProgressBar(config.global_batch_size * config.supervision_steps)
        if self._starts_from_weights:
            whole = newest_whole(run, lambda event, what: bar.say(what))
            assert whole is not None  # it raises if there are checkpoints but all are damaged
            check_weights_fit(whole, config, self.dataset)
            aside = set_aside(run)
            if show_progress:
                bar.say(f"the old run is kept as {aside}")
        if self.point and self.point.manifest.global_step >= self.plan.last_step:
            summary = last_summary(run)
            if summary.get("finished") and summary["global_step"] == self.point.manifest.global_step:
                return summary, None
        if config.scaling.mode == "ray":
            from hrm_ray.ray_session import check_cluster

            check_cluster()
        driver = Driver(config, bar if show_progress else None)
        with driver.stop.listening():
            try:
                result = self._here(driver) if config.scaling.mode == "local" else self._on_ray(driver)
            finally:
                bar.close()
        return result, driver.stop.signal if not result["finished"] else None

    def _here(self, driver: Driver) -> dict[str, Any]:
        hooks = Hooks(
            progress=driver.progress, stop=driver.stop.reason, event=driver.event, owner=driver.owner
        )
        return TrainingLoop(self.config, self.run, World(), hooks).train()

    def _on_ray(self, driver: Driver) -> dict[str, Any]:
        from hrm_ray.training.ray_train import train_on_ray

        return train_on_ray(self.config, self.run, driver)


def train(config: TrainConfig, *, show_progress: bool = True) -> tuple[dict[str, Any], int | None]:
    """Train, or continue, the run that `config` describes; see `Launch`."""
    return Launch(config).train(show_progress=show_progress)


def _batches(config: TrainConfig) -> str:
    several = f"{config.supervision_steps} x " if config.supervision_steps > 1 else ""
    return f"{several}{config.global_batch_size}"


def _where(config: TrainConfig) -> str:
    scaling = config.scaling
    if scaling.mode == "local":
        return "in this process"
    if scaling.is_elastic:
        return f"on {scaling.min_workers} to {scaling.max_workers} Ray workers"
    return f"on {scaling.num_workers} Ray worker(s)"


def _changes(point: Checkpoint | None, config: TrainConfig) -> str:
    """What differs from the run's earlier configuration, as text to append; empty if nothing does."""
    if point is None:
        return ""
    defaults = TrainConfig(data_path="").model_dump(mode="json")  # of keys that the run did not have yet
    now, before = config.model_dump(mode="json"), defaults | point.manifest.config
    before["halting"] = halting_of(before, str(point.folder)).model_dump(mode="json")
    # Where it runs, not what it does; and what is refused where it differs (see `resume.mismatch`).
    ours = ("data_path", "storage", "device", "scaling", "arch")
    changed = [f"{k} {before.get(k)} -> {v}" for k, v in now.items() if k not in ours and before.get(k) != v]
    return f"; changed: {', '.join(changed)}" if changed else ""
