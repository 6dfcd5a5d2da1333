"""The training loop: the same in a plain process and in every Ray worker. Knows no Ray.

One step: every slot's puzzle goes one ACT step on, the losses of all slots of all workers are summed and divided
by the global batch size, and the optimizers move. DDP *averages* gradients over the workers, so the loss of each
is multiplied by their number first; then N workers do what one would do on the same global batch.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hrm_ray import machine
from hrm_ray.config.schema import TrainConfig
from hrm_ray.data.sampler import Sampler, min_halt_steps
from hrm_ray.data.shards import Dataset, open_dataset
from hrm_ray.errors import RunFailed, UserError
from hrm_ray.models.act import ACT, Batch, Carry
from hrm_ray.models.hrm import num_tokens
from hrm_ray.models.losses import METRICS, LossType, act_loss
from hrm_ray.optim.sign_sgd import sparse_sign_sgd
from hrm_ray.training.checkpoint import (
    FOLDER,
    Checkpoint,
    best,
    finished,
    prune,
    step_name,
    write_manifest,
)
from hrm_ray.training.evaluate import Interrupted, evaluate, make_batch
from hrm_ray.training.logging import Records
from hrm_ray.training.plan import Plan
from hrm_ray.training.state import TrainState
from hrm_ray.training.storage import Storage
from hrm_ray.training.world import World

NEVER = 2**31 - 1  # a step that no run reaches


@dataclass
class Progress:
    """What a progress bar shows; the metrics are of the last report."""

    step: int
    last_step: int
    phase: str  # "train" or "eval"
    setup: str  # what of the machine the first worker uses
    metrics: dict[str, float]


@dataclass(frozen=True)
class Hooks:
    """What the loop tells and asks its surroundings; called on the first worker only, `stop` on every one.

    Attributes:
        progress: called after every step and every evaluated batch.
        stop: whether to end after the step at hand.
    """

    progress: Callable[[Progress], None] = lambda progress: None
    stop: Callable[[], bool] = lambda: False


class LossModule(nn.Module):
    """ACT step and loss as one module, for DDP to wrap."""

    def __init__(self, model: ACT, loss_type: LossType):
        super().__init__()
        self.model = model
        self.loss_type: LossType = loss_type

    def forward(self, carry: Carry, batch: Batch, min_halt_steps_B: Tensor) -> tuple[Tensor, Tensor, Carry]:
        step = self.model(carry, batch, min_halt_steps_B)
        loss, metrics = act_loss(step, self.loss_type)
        return loss, metrics, step.carry


class Meter:
    """Sums the metrics of this worker's steps on its device until they are reported."""

    def __init__(self, device: torch.device):
        self._device = device
        self._reset()

    def _reset(self) -> None:
        self._sums = torch.zeros(len(METRICS), dtype=torch.float64, device=self._device)
        self._bad_step = torch.full((), NEVER, device=self._device)
        self._num_steps = 0
        self._data_wait_s = 0.0
        self._checkpoint_s: float | None = None
        self._started = time.perf_counter()

    def add(self, metrics: Tensor, loss: Tensor, step: int, data_wait_s: float) -> None:
        self._sums += metrics
        bad = torch.where(loss.detach().isfinite(), NEVER, step)
        self._bad_step = torch.minimum(self._bad_step, bad)
        self._num_steps += 1
        self._data_wait_s += data_wait_s

    def report(
        self, step: int, global_batch_size: int, lr: Callable[[int], float], world: World
    ) -> dict[str, float]:
        """Metrics since the last report, over all workers, at `step`; `lr` is a function of it. Collective.

        Raises:
            RunFailed: a loss was not finite; says at which step, on which rank, at which learning rate.
        """
        bad_steps = world.gather_objects(int(self._bad_step))
        if min(bad_steps) < NEVER:
            bad = min(bad_steps)
            raise RunFailed(
                f"the loss is not finite at step {bad} on rank {bad_steps.index(bad)} (lr {lr(bad):.3g}); lower lr or "
                "lengthen lr_warmup_steps; the same command goes on from the last checkpoint, run_name=NAME starts anew"
            )
        sums = dict(zip(METRICS, world.sum(self._sums).tolist(), strict=True))
        slots = max(1, self._num_steps) * global_batch_size
        halted = sums.pop("count")
        record = {
            f"train/{name}": sums[name] / slots for name in ("lm_loss", "q_halt_loss", "q_continue_loss")
        }
        record["train/loss"] = record["train/lm_loss"] + 0.5 * (
            record["train/q_halt_loss"] + record["train/q_continue_loss"]
        )
        if halted:
            for name in ("accuracy", "exact_accuracy", "q_halt_accuracy", "steps"):
                record[f"train/{name}"] = sums[name] / halted
        record["train/lr"] = lr(step)
        record["time/step_s"] = (time.perf_counter() - self._started) / max(1, self._num_steps)
        record["time/data_wait_s"] = self._data_wait_s / max(1, self._num_steps)
        if self._checkpoint_s is not None:
            record["time/checkpoint_s"] = self._checkpoint_s
        self._reset()
        return record

    def restart_clock(self, checkpoint_s: float | None = None) -> None:
        """Do not count an evaluation or a checkpoint as time of steps; report the latter with the next steps."""
        self._started = time.perf_counter()
        self._checkpoint_s = checkpoint_s or self._checkpoint_s


class Trainer:
    """One worker's part of a run.

    Args:
        config: the run.
        run: its folder.
        world: this worker's place.
        hooks: see `Hooks`.
    """

    def __init__(self, config: TrainConfig, run: Storage, world: World, hooks: Hooks):
        self.config, self.run, self.world, self.hooks = config, run, world, hooks
        self.dataset = open_dataset(config.data_path)
        self.split = self.dataset.split("train")
        self.plan = Plan.of(config, self.split)
        self.setup = machine.resolve(
            device=config.device,
            forward_dtype=config.forward_dtype,
            attention=config.attention,
            optimizer_backend=config.optimizer_backend,
            num_tokens=num_tokens(config.arch, self.dataset.manifest.seq_len),
            local_rank=world.local_rank,
        )
        self.state = TrainState.initial(config, self.dataset, self.setup)
        # The first worker decides where the run goes on, and keeps others off it.
        self._lock = run.lock() if world.is_first else None
        checkpoint = resume_point(config, run, self.dataset) if world.is_first else None
        name = world.from_first(checkpoint.name if checkpoint else None)
        if name is not None:
            checkpoint = checkpoint or Checkpoint(run / FOLDER / name)
            self.state.restore(checkpoint, world)
        self.sampler = Sampler(self.split, config.seed, config.global_batch_size, self.plan.num_examples)
        module: nn.Module = LossModule(self.state.model, config.arch.loss.loss_type)
        if world.size > 1:
            module = DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)
        self.module = module
        self._meter = Meter(self.setup.device)
        self._stopping = False
        # The last step whose evaluation is done; a checkpoint without metrics was not evaluated.
        self._evaluated_step = self.state.global_step if checkpoint and checkpoint.manifest.metrics else 0
        self._records: Records | None = None
        if world.is_first:
            self._records = Records(
                run, config, self.state.global_step, evaluates_again=self._evaluation_is_due
            )

    def train(self) -> dict[str, Any]:
        """Run to the end, or to the step after which `hooks.stop` asks to stop. Collective.

        Returns:
            the summary, which the first worker also writes to summary.json.
        """
        try:
            self._run()
            summary = self._summary()
            if self._records:
                self._records.summarise(summary)
            return summary
        finally:
            if self._records:
                self._records.close()
            if self._lock:
                self._lock.close()

    def _run(self) -> None:
        state, plan = self.state, self.plan
        state.model.train()
        self._evaluate_if_due()  # what a stop or a crash prevented
        while state.global_step < plan.last_step and not self._stopping:
            step = state.global_step + 1
            started = time.perf_counter()
            self._step(step)
            self._stopping = self._any_asks_to_stop()
            if plan.reports(step) or self._stopping:
                self._report(self._meter.report(step, self.config.global_batch_size, self._lr, self.world))
            state.train_s += time.perf_counter() - started
            if plan.saves(step) or self._stopping:
                self._save()
            self._show("train")
            self._evaluate_if_due()

    def _lr(self, step: int) -> float:
        return self.config.lr * self.plan.lr_share(step)

    def _batch(self, step: int) -> tuple[Batch, Tensor]:
        """This worker's puzzles and exploration minima for `step`."""
        slots = self.world.slots(self.config.global_batch_size)
        manifest = self.dataset.manifest
        batch = make_batch(
            self.split, self.sampler.ids(step)[slots], manifest.ignore_label_id, manifest.blank_identifier_id
        )
        minima = min_halt_steps(
            self.config.seed,
            step,
            self.config.global_batch_size,
            exploration_prob=self.config.arch.halt_exploration_prob,
            halt_max_steps=self.config.arch.halt_max_steps,
        )
        device = self.setup.device
        return batch.to(device), torch.from_numpy(np.ascontiguousarray(minima[slots])).to(device)

    def _step(self, step: int) -> None:
        config, state = self.config, self.state
        started = time.perf_counter()
        batch, minima = self._batch(step)
        data_wait_s = time.perf_counter() - started
        if state.carry is None:
            state.carry = state.model.initial_carry(batch)
        loss, metrics, state.carry = self.module(state.carry, batch, minima)
        (loss * (self.world.size / config.global_batch_size)).backward()

        share = self.plan.lr_share(step)
        state.optimizer.param_groups[0]["lr"] = self._lr(step)
        state.optimizer.step()
        state.optimizer.zero_grad()
        if config.arch.puzzle_emb_ndim:
            table = state.model.inner.puzzle_emb
            identifiers, gradients = table.take_gradients()
            sparse_sign_sgd(
                table.weights,
                identifiers,
                gradients,
                lr=config.puzzle_emb_lr * share,
                weight_decay=config.puzzle_emb_weight_decay,
                gather=self.world.gather,
            )
        state.global_step = step
        state.update_averages(config.ema_rate)
        self._meter.add(metrics, loss, step, data_wait_s)

    def _any_asks_to_stop(self) -> bool:
        return bool(self.world.sum(torch.tensor(int(self.hooks.stop()))).item())

    @property
    def _evaluation_is_due(self) -> bool:
        step, test = self.state.global_step, self.dataset.splits.get("test")
        return step > 0 and bool(test) and self.plan.evaluates(step) and self._evaluated_step != step

    def _evaluate_if_due(self) -> None:
        """Evaluate and note the metrics in the checkpoint of this step, which was saved first: an evaluation may be
        long, and what comes during it must not cost training."""
        if self._stopping or not self._evaluation_is_due:
            return
        started = time.perf_counter()
        try:
            with self.state.averaged_weights():
                metrics, _ = evaluate(
                    self.state.model,
                    self.dataset.split("test"),
                    ignore_label_id=self.dataset.manifest.ignore_label_id,
                    loss_type=self.config.arch.loss.loss_type,
                    batch_size=self.config.global_batch_size // self.world.size,
                    num_examples=self.config.num_eval_examples,
                    world=self.world,
                    on_batch=lambda _: self._show("eval"),
                    interrupt=self._any_asks_to_stop,
                )
        except Interrupted:
            self._stopping = True
            return
        self.state.train_s += time.perf_counter() - started
        self._evaluated_step = self.state.global_step
        named = {f"eval/{name}": value for name, value in metrics.items()}
        self._report(named)
        if self.world.is_first:
            folder = self.run / FOLDER / step_name(self.state.global_step)
            manifest = Checkpoint(folder).manifest
            update = {"metrics": named, "train_s": self.state.train_s}
            write_manifest(folder, manifest.model_copy(update=update))
            prune(self.run, keep_last=self.config.keep_last)
        self._meter.restart_clock()
        self._show("train")

    def _save(self) -> None:
        started = time.perf_counter()
        if not all(bool(p.isfinite().all()) for p in self.state.model.parameters()):
            raise RunFailed(
                f"the weights are not finite after step {self.state.global_step}; lower lr or lengthen "
                "lr_warmup_steps; the same command goes on from the last checkpoint, run_name=NAME starts anew"
            )
        self.state.save(self.run, self.config, self.dataset, self.world)
        if self._records:
            self._records.flush()
            prune(self.run, keep_last=self.config.keep_last)
        self._meter.restart_clock(checkpoint_s=time.perf_counter() - started)

    def _report(self, values: dict[str, float]) -> None:
        """Write one record of metrics, which every worker has alike."""
        if self._records is None:
            return
        step = self.state.global_step
        self._records.write({"global_step": step, "epoch": round(self.plan.epoch(step), 4), **values})

    def _show(self, phase: str) -> None:
        if self._records:
            progress = Progress(
                self.state.global_step, self.plan.last_step, phase, self.setup.describe(), self._records.last
            )
            self.hooks.progress(progress)

    def _summary(self) -> dict[str, Any]:
        """What summary.json holds; metrics of the end and of the best checkpoint."""
        chosen = best(finished(self.run)) if self._records else None
        done = self.state.global_step >= self.plan.last_step
        return {
            "final": self._records.last if self._records else {},
            "best": chosen.manifest.metrics if chosen else {},
            "global_step": self.state.global_step,
            "finished": done and not self._evaluation_is_due,
            "train_s": round(self.state.train_s, 3),
            "num_params": sum(p.numel() for p in self.state.model.parameters()),
            "checkpoint": str(chosen.folder) if chosen else None,
        }


def resume_point(config: TrainConfig, run: Storage, dataset: Dataset) -> Checkpoint | None:
    """The newest checkpoint of `run`, or None for a new run.

    Raises:
        UserError: it belongs to another model, data set, seed or batch size.
    """
    checkpoints = finished(run)
    if not checkpoints:
        return None
    newest = checkpoints[-1]
    manifest = newest.manifest
    there = {
        "data set": manifest.dataset.fingerprint,
        "arch": manifest.arch,
        **{key: manifest.config[key] for key in ("seed", "global_batch_size", "ema")},
    }
    here = {
        "data set": dataset.fingerprint,
        "arch": config.arch,
        **{key: getattr(config, key) for key in ("seed", "global_batch_size", "ema")},
    }
    for key, value in here.items():
        if there[key] != value:
            raise UserError(
                f"{run} was trained with {key} {_short(there[key], value)}; "
                "choose another run_name=, or the same values to continue it"
            )
    return newest


def _short(there: Any, here: Any) -> str:
    """Both values, or of two architectures the fields that differ."""
    if hasattr(there, "model_dump"):
        a, b = there.model_dump(), here.model_dump()
        changed = [key for key in a if a[key] != b.get(key)]
        return (
            ", ".join(f"{key}={a[key]}" for key in changed) + ", not " + ", ".join(f"{b[k]}" for k in changed)
        )
    return f"{str(there)[:16]}, not {str(here)[:16]}"
