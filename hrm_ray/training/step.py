"""One optimizer step of one worker, from its place in the stream of examples to the moved weights.

Every slot's puzzle goes one ACT step on (`supervision_steps` of them, `micro_batch_size` slots at a time), the losses
of all slots of all workers are summed and divided by the global batch size, and the optimizers move. DDP *averages*
gradients over the workers, so the loss of each is multiplied by their number first; then N workers do what one would do
on the same global batch.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hrm_ray.config.schema import TrainConfig
from hrm_ray.data.sampler import Sampler, choice_draws, min_halt_steps, replay_draws
from hrm_ray.data.shards import Dataset
from hrm_ray.models.act import ACT, Batch, Carry, send
from hrm_ray.models.compiled import compile_recursion
from hrm_ray.models.halting import Control
from hrm_ray.models.layers import Linear
from hrm_ray.models.losses import METRICS, LossType, act_loss, count_right
from hrm_ray.optim.sign_sgd import sparse_sign_sgd
from hrm_ray.training.evaluate import make_batch
from hrm_ray.training.plan import Plan
from hrm_ray.training.state import TrainState
from hrm_ray.training.world import World

ReplayLoss = Callable[[Linear], Tensor]


class LossModule(nn.Module):
    """ACT step and loss as one module, for DDP to wrap."""

    def __init__(self, model: ACT, loss_type: LossType):
        super().__init__()
        self.model = model
        self.loss_type: LossType = loss_type

    def forward(
        self, carry: Carry, batch: Batch, control: Control, replay_loss: ReplayLoss | None
    ) -> tuple[Tensor, Tensor, Carry, tuple[Tensor, Tensor]]:
        """The loss and metrics of one ACT step (see `act_loss`), the new carry, and `count_right`."""
        step = self.model(carry, batch, control)
        loss, metrics = act_loss(step, self.loss_type)
        if replay_loss is not None:
            replayed = replay_loss(self.model.inner.q_head)
            loss = loss + 0.5 * replayed
            metrics[METRICS.index("q_continue_loss")] += replayed.detach()
        right = count_right(step.prediction.logits.argmax(-1), step.carry.batch.labels)
        return loss, metrics, step.carry, right


@dataclass(frozen=True)
class Outcome:
    """Sums over this worker's slots: the loss (scalar) and the metrics (in the order of `METRICS`)."""

    loss: Tensor
    metrics: Tensor
    num_slots: int
    data_wait_s: float


class Stepper:
    """Takes the steps of a run.

    Args:
        config, plan, dataset: the run.
        world: this worker's place.
        state: what is moved.
    """

    def __init__(self, config: TrainConfig, plan: Plan, dataset: Dataset, world: World, state: TrainState):
        self.config, self.plan, self.world, self.state = config, plan, world, state
        self.manifest, self.split = dataset.manifest, dataset.split("train")
        self.sampler = Sampler(self.split, config.seed, config.global_batch_size, plan.num_examples)
        self.slots = world.slots(config.global_batch_size)
        self.device = next(state.model.parameters()).device
        module: nn.Module = LossModule(state.model, config.arch.loss.loss_type)
        if world.size > 1:
            # DDP would lay out its buckets anew after the first step, and with them the order of summation: a
            # continued run would differ in its last bits. It does not if it looks for unused parameters.
            module = DistributedDataParallel(
                module, broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=True
            )
        self.module = module

    def take(self, step: int) -> Outcome | None:
        """Move the state to the end of `step`. Collective.

        Returns:
            what came of it, or None if this step is left out.
        """
        config, state = self.config, self.state
        state.global_step = step
        if state.carry is None:
            state.begin(self.batch((step - 1) * config.supervision_steps + 1), config)
        if step in state.skipped_steps:
            return None
        # Supervision steps are counted through, also over the ends of optimizer steps.
        last = step * config.supervision_steps
        parts = [self._supervise(step, s) for s in range(last - config.supervision_steps + 1, last + 1)]
        self._move(step)
        return Outcome(
            torch.stack([part.loss for part in parts]).sum(),
            torch.stack([part.metrics for part in parts]).sum(0),
            sum(part.num_slots for part in parts),
            sum(part.data_wait_s for part in parts),
        )

    def compile(self) -> None:
        """Compile the model for the steps to come. Not collective; for what is raised, see `compile_recursion`."""
        state, step = self.state, self.state.global_step + 1
        supervision_step = (step - 1) * self.config.supervision_steps + 1
        batch, control = self.batch(supervision_step), self.control(step, supervision_step)
        carry = state.carry or state.model.initial_carry(batch)
        sizes = {slots.stop - slots.start: None for slots in self._micro_batches(batch)}
        compile_recursion(state.model, carry, batch, control, list(sizes))

    def _supervise(self, step: int, supervision_step: int) -> Outcome:
        """One ACT step of every slot and its gradient."""
        started = time.perf_counter()
        batch = self.batch(supervision_step)
        control = self.control(step, supervision_step)
        data_wait_s = time.perf_counter() - started
        state, num_supervised = self.state, self.config.supervision_steps
        assert state.carry is not None
        replay_loss = self._replay_loss(supervision_step, control)
        losses, metrics, carries, rights = [], [], [], []
        for slots in self._micro_batches(batch):
            is_last = slots.stop == len(batch.inputs) and supervision_step % num_supervised == 0
            with nullcontext() if is_last else self._without_reduction():
                loss, sums, carry, right = self.module(
                    state.carry.rows(slots), batch.rows(slots), control.rows(slots), replay_loss
                )
                (loss * (self.world.size / (self.config.global_batch_size * num_supervised))).backward()
            replay_loss = None  # it is of all slots
            losses.append(loss.detach())
            metrics.append(sums)
            carries.append(carry)
            rights.append(torch.stack(right))
        state.carry = carry = Carry.cat(carries)
        if state.learner is not None:
            num_right, num_labelled = torch.cat(rights, dim=1)
            state.learner.remember(
                supervision_step,
                carry.state.z_H[:, 0],
                exact=num_right == num_labelled,
                halted=carry.halted,
                is_last=carry.steps >= state.model.halt_max_steps,
                is_puzzle=num_labelled > 0,
            )
        return Outcome(torch.stack(losses).sum(), torch.stack(metrics).sum(0), len(batch.inputs), data_wait_s)

    def _micro_batches(self, batch: Batch) -> list[slice]:
        """The slots that are computed at once, `micro_batch_size` of them and at last the rest."""
        num_slots = len(batch.inputs)
        size = self.config.micro_batch_size or num_slots
        return [slice(i, min(i + size, num_slots)) for i in range(0, num_slots, size)]

    def _without_reduction(self) -> AbstractContextManager:
        """Inside, gradients are summed up on this worker alone."""
        return self.module.no_sync() if isinstance(self.module, DistributedDataParallel) else nullcontext()

    def _move(self, step: int) -> None:
        """Let the optimizers move by the gradients of all workers. Collective."""
        config, state = self.config, self.state
        group = state.optimizer.param_groups[0]
        group["lr"], group["weight_decay"] = self.plan.lr(step), self.plan.weight_decay(step)
        state.optimizer.step()
        state.optimizer.zero_grad()
        if config.arch.puzzle_emb_ndim:
            table = state.model.inner.puzzle_emb
            sparse_sign_sgd(
                table.weights,
                *(self._of_all_slots(rows) for rows in table.take_gradients()),
                lr=config.puzzle_emb_lr * self.plan.lr_share(step),
                weight_decay=config.puzzle_emb_weight_decay,
                backend=config.optimizer_backend,
            )
        if state.learner is not None:
            state.learner.follow(state.model.inner.q_head)
        state.update_averages(config.ema_rate)

    def _of_all_slots(self, rows: Tensor) -> Tensor:
        """All workers' rows, where `rows` has one a slot for each supervision step in turn."""
        by_slot = rows.unflatten(0, (self.config.supervision_steps, -1)).transpose(0, 1)
        return self.world.gather(by_slot.contiguous(), self.config.global_batch_size).flatten(0, 1)

    def batch(self, supervision_step: int) -> Batch:
        """What this worker's slots are offered."""
        ids = self.sampler.ids(supervision_step)[self.slots]
        manifest = self.manifest
        batch = make_batch(self.split, ids, manifest.ignore_label_id, manifest.blank_identifier_id)
        return batch.to(self.device)

    def control(self, step: int, supervision_step: int) -> Control:
        """What decides about halting; drawn from (seed, supervision step, global slot)."""
        arch, key = self.config.arch, (self.config.seed, supervision_step, self.config.global_batch_size)
        if self.config.halting.name != "q_learning":
            minima = min_halt_steps(
                *key, exploration_prob=arch.halt_exploration_prob, halt_max_steps=arch.halt_max_steps
            )
            return Control(min_halt_steps=self._own(minima))
        values = self.plan.annealed(step)
        return Control(
            uniform=self._own(choice_draws(*key)),
            temperature=values["q_temperature"],
            epsilon=values["epsilon"],
            penalty=values["expansion_penalty"],
            is_warming_up=self.plan.is_warming_up(step),
        )

    def _replay_loss(self, supervision_step: int, control: Control) -> ReplayLoss | None:
        learner = self.state.learner
        if learner is None:
            return None
        draws = replay_draws(
            self.config.seed,
            supervision_step,
            self.config.global_batch_size,
            self.config.halting.replay_samples,
        )
        return partial(
            learner.loss, step=supervision_step, uniform_BN=self._own(draws), penalty=control.penalty
        )

    def _own(self, values: np.ndarray) -> Tensor:
        """This worker's part of an array with a row for every global slot."""
        return send(torch.from_numpy(np.ascontiguousarray(values[self.slots])), self.device)
