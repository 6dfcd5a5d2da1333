"""One optimizer step of one worker, from its place in the stream of examples to the moved weights.

Every slot's puzzle goes one ACT step on (`supervision_steps` of them, `micro_batch_size` slots at a time), the losses
of all slots of all workers are summed and divided by their number, and the optimizers move. DDP *averages* gradients
over the workers, so the loss of each is multiplied by the number of workers first; then N workers do what one would do
on the same global batch.

With `supervised=last` only the last of these ACT steps has a loss, and the others run without gradient: the loss of the
Recursive Stem Model (arXiv:2603.15641). There every update also begins with new puzzles, which `halting=fixed` and
`arch.halt_max_steps=N` beside `supervision_steps=N` do here, and a coin lets the gradient reach into the step before.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from hrm_ray.batch import make_batch
from hrm_ray.config.arch import LossConfig
from hrm_ray.config.schema import TrainConfig
from hrm_ray.data.prefetch import Prefetcher
from hrm_ray.data.sampler import Sampler, filled_cells, visit_draws
from hrm_ray.data.shards import Dataset
from hrm_ray.draws import Purpose, words
from hrm_ray.halting.base import Control, Moment
from hrm_ray.models.act import ACT, Batch, Carry
from hrm_ray.models.compiled import compile_recursion
from hrm_ray.models.layers import Linear
from hrm_ray.models.losses import METRICS, Q_LOSS_WEIGHT, act_loss
from hrm_ray.models.recursive import State
from hrm_ray.models.winner import winners
from hrm_ray.optim.sign_sgd import sparse_sign_sgd
from hrm_ray.training.cuda_graph import Recordings, is_the_same
from hrm_ray.training.plan import Plan
from hrm_ray.training.state import TrainState
from hrm_ray.training.weight_noise import noisy_weights
from hrm_ray.world import World

ReplayLoss = Callable[[Linear], Tensor]


class LossModule(nn.Module):
    """ACT step and loss as one module, for DDP to wrap."""

    def __init__(self, model: ACT, loss: LossConfig, num_paths: int = 1):
        super().__init__()
        self.model, self.loss, self.num_paths = model, loss, num_paths
        self.has_q_head = model.inner.config.has_q_head

    def forward(
        self, carry: Carry, batch: Batch, control: Control, replay_loss: ReplayLoss | None
    ) -> tuple[Tensor, Tensor, Carry, tuple[Tensor, Tensor]]:
        """The loss and metrics of one ACT step (see `act_loss`), the new carry, and `count_right`."""
        z_L: Tensor | None = None
        if self.num_paths > 1:
            carry, control, z_L = winners(self.model, carry, batch, control, self.loss.loss_type)
        step = self.model(carry, batch, control)
        loss, metrics, right = act_loss(
            step, self.loss.loss_type, self.loss.label_smoothing, has_q_head=self.has_q_head
        )
        if replay_loss is not None:
            assert self.model.inner.q_head is not None
            replayed = replay_loss(self.model.inner.q_head)
            loss = loss + Q_LOSS_WEIGHT * replayed
            metrics[METRICS.index("q_continue_loss")] += replayed.detach()
        state = step.carry.state if z_L is None else State(step.carry.state.z_H, z_L)
        return loss, metrics, step.carry._replace(state=state), right


class Call(NamedTuple):
    """The arguments of `Stepper._learn`: what some slots keep and are offered, what decides about them, what is
    recalled (None: nothing), and whether there is a loss."""

    carry: Carry
    batch: Batch
    control: Control
    recall: Any
    is_supervised: bool


class Learned(NamedTuple):
    """The results of an ACT step of some slots, other than the gradients of the weights.

    The loss (scalar) and the metrics (in the order of `METRICS`) are summed over the slots; `right` is `count_right` of
    them, int64 [2, B]; `emb_rows` int32 [B] and `emb_gradients` [B, size] are for the puzzle embedding, None if there
    is none, or no loss.
    """

    loss: Tensor
    metrics: Tensor
    carry: Carry
    right: Tensor
    emb_rows: Tensor | None
    emb_gradients: Tensor | None


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
        self.sampler = Sampler(
            dataset.split("train"), config.seed, config.global_batch_size, plan.num_examples
        )
        self.slots = world.slots(config.global_batch_size)
        self._batches = Prefetcher(
            # Not a method: the thread would keep this worker's model alive.
            partial(_read, dataset, self.sampler, plan, self.slots),
            last=plan.last_step * config.supervision_steps,
        )
        self.device = next(state.model.parameters()).device
        self._losses = LossModule(state.model, config.arch.loss, config.paths.train)
        module: nn.Module = self._losses
        if world.size > 1:
            # After the first step DDP would rearrange its buckets, and thereby the order of summation: a
            # continued run would differ in its last bits. It does not if it looks for unused parameters.
            module = DistributedDataParallel(
                module, broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=True
            )
        self.module = module
        self._recordings = Recordings()  # of `_learn`
        self._gradients: list[Tensor] = []  # of the weights, where what is recorded adds to them
        if state.carry is None:
            first_supervision_step = state.global_step * config.supervision_steps + 1
            state.begin(self.batch(first_supervision_step), config.paths.train)

    def take(self, step: int) -> Outcome | None:
        """Move the state to the end of `step`. Collective.

        Returns:
            what came of it, or None if this step is left out.
        """
        config, state = self.config, self.state
        state.global_step = step
        if step in state.skipped_steps:
            return None
        # Supervision steps are counted through, also over the ends of optimizer steps.
        last = step * config.supervision_steps
        parts: list[Learned] = []
        data_wait_s = 0.0
        for supervision_step in range(last - config.supervision_steps + 1, last + 1):
            with noisy_weights(state.model, config.weight_noise, config.seed, supervision_step):
                data_wait_s += self._supervise(step, supervision_step, parts)
        self._move(step, parts)
        return Outcome(
            torch.stack([part.loss for part in parts]).sum(),
            torch.stack([part.metrics for part in parts]).sum(0),
            sum(part.right.shape[1] for part in parts),
            data_wait_s,
        )

    def compile(self) -> None:
        """Compile the model for the steps to come. Not collective; for what is raised, see `compile_recursion`."""
        state, step = self.state, self.state.global_step + 1
        supervision_step = (step - 1) * self.config.supervision_steps + 1
        # At the full depth, in which there is all that a smaller one has.
        batch = self.batch(supervision_step)
        control = self.control(step, supervision_step)._replace(depth=None)

        def loss_of(size: int) -> Tensor:
            assert state.carry is not None
            rows = slice(0, size)
            args = state.carry.rows(rows), batch.rows(rows), control.rows(rows)
            loss: Tensor = self._losses(*args, None)[0]
            return loss

        sizes = {slots.stop - slots.start: None for slots in self._micro_batches(batch)}
        # Recursions have passes without gradient in every step; the others, for evaluations alone.
        without_gradient = self.config.supervision_steps > self.config.num_supervised_steps
        without_gradient = without_gradient or not state.model.inner.keeps_state
        compile_recursion(state.model, loss_of, list(sizes), without_gradient=without_gradient)

    def record(self) -> None:
        """Record what the steps to come launch as CUDA graphs (one worker only); no weight changes.

        Raises:
            RuntimeError: a replayed ACT step is not the same as one that is not recorded.
            Exception: any error of torch about something that cannot be recorded.
        """
        state, step = self.state, self.state.global_step + 1
        last = step * self.config.supervision_steps  # which is supervised
        some = {last} if self._is_supervised(last - 1) else {last - 1, last}
        recordings = Recordings()
        try:
            self._learn(*next(self._calls(step, last)))
            for name, parameter in state.model.named_parameters():
                if parameter.grad is None:  # zeros in its place would let the optimizer move it
                    raise RuntimeError(f"{name} has no gradient")
                parameter.grad = torch.zeros_like(parameter)  # and there it stays
                self._gradients.append(parameter.grad)
            # After a warm-up of halting, at another depth, and without a loss, it is another step.
            for at, depth, supervision_step in product(
                (step, self.plan.last_step), self.plan.depths(step), sorted(some)
            ):
                for made in self._calls(at, supervision_step):
                    call = made._replace(control=made.control._replace(depth=depth))
                    is_new = recordings.record(self._learn, *call)
                    if is_new and not self._replays_the_same(recordings, call):
                        raise RuntimeError(f"replayed, a step of {len(call.batch.inputs)} puzzles differs")
        except Exception:
            self._gradients = []
            state.optimizer.zero_grad()
            if self.config.arch.puzzle_emb_ndim:
                state.model.inner.puzzle_emb.forget()
            raise
        torch._foreach_zero_(self._gradients)
        self._recordings = recordings

    def _replays_the_same(self, recordings: Recordings, call: Call) -> bool:
        """Whether a replay of the call after this one, with other puzzles and draws, does what `_learn` does.

        In a new run draws and memories change nothing yet that could be seen.
        """
        after = self._learn(*call).carry
        call = tree_map_only(Tensor, _other, call)
        after = after._replace(
            halted=torch.arange(len(after.halted), device=self.device) % 2 == 0,
            batch=tree_map_only(Tensor, _other, call.batch),
        )
        return is_the_same(recordings, self._learn, self._gradients, *call._replace(carry=after))

    def _supervise(self, step: int, supervision_step: int, parts: list[Learned]) -> float:
        """One ACT step of every slot, and its gradient if it is supervised; the results are appended to `parts`.

        Returns:
            seconds spent on data, draws included.
        """
        started = time.perf_counter()
        calls = list(self._calls(step, supervision_step))
        data_wait_s = time.perf_counter() - started
        state, num_before = self.state, len(parts)
        is_end = supervision_step % self.config.supervision_steps == 0
        for i, call in enumerate(calls):
            is_last = is_end and i == len(calls) - 1
            with nullcontext() if is_last else self._without_reduction():
                parts.append(self._recordings.replay(*call) or self._learn(*call))
        state.carry = carry = Carry.cat([part.carry for part in parts[num_before:]])
        if state.learner is not None:
            num_right, num_labelled = torch.cat([part.right for part in parts[num_before:]], dim=1)
            state.learner.remember(
                supervision_step,
                carry.state.z_H[:, 0],
                exact=num_right == num_labelled,
                halted=carry.halted,
                is_last=carry.steps >= state.model.halt_max_steps,
                is_puzzle=num_labelled > 0,
            )
        return data_wait_s

    def _is_supervised(self, supervision_step: int) -> bool:
        """Whether there is a loss."""
        return self.config.supervised == "all" or supervision_step % self.config.supervision_steps == 0

    def _calls(self, step: int, supervision_step: int) -> Iterator[Call]:
        """Those for all slots."""
        state, batch = self.state, self.batch(supervision_step)
        assert state.carry is not None
        control = self.control(step, supervision_step)
        recall = state.learner.recall(self._moment(step, supervision_step)) if state.learner else None
        for slots in self._micro_batches(batch):
            kept, offered = state.carry.rows(slots), batch.rows(slots)
            yield Call(kept, offered, control.rows(slots), recall, self._is_supervised(supervision_step))
            recall = None  # it is of all slots

    def _learn(
        self, carry: Carry, batch: Batch, control: Control, recall: Any, is_supervised: bool
    ) -> Learned:
        """One ACT step of some slots. If it is supervised, adds the gradients of their loss to those of the weights."""
        replay_loss: ReplayLoss | None = None
        if recall is not None:
            assert self.state.learner is not None
            replay_loss = partial(self.state.learner.loss, recall=recall, control=control)
        with torch.set_grad_enabled(is_supervised):
            loss, metrics, carry, right = self.module(carry, batch, control, replay_loss)
        looked_up: tuple[Tensor | None, Tensor | None] = None, None
        if is_supervised:
            num_losses = self.config.global_batch_size * self.config.num_supervised_steps
            (loss * (self.world.size / num_losses)).backward()
            if self.config.arch.puzzle_emb_ndim:
                looked_up = self.state.model.inner.puzzle_emb.take_gradients()
        return Learned(loss.detach(), metrics, carry, torch.stack(right), *looked_up)

    def _micro_batches(self, batch: Batch) -> list[slice]:
        """The slots that are computed at once, `micro_batch_size` of them and at last the rest."""
        num_slots = len(batch.inputs)
        size = self.config.micro_batch_size or num_slots
        return [slice(i, min(i + size, num_slots)) for i in range(0, num_slots, size)]

    def _without_reduction(self) -> AbstractContextManager:
        """Inside, gradients are summed up on this worker alone."""
        return self.module.no_sync() if isinstance(self.module, DistributedDataParallel) else nullcontext()

    def _move(self, step: int, parts: Sequence[Learned]) -> None:
        """Let the optimizers move by the gradients of all workers. Collective."""
        config, state = self.config, self.state
        for group in state.optimizer.param_groups:
            group["lr"], group["weight_decay"] = self.plan.lr(step), self.plan.weight_decay(step)
        state.optimizer.step()
        if self._recordings:
            torch._foreach_zero_(self._gradients)  # they stay where they are
        else:
            state.optimizer.zero_grad()
        if config.arch.puzzle_emb_ndim:
            supervised = [part for part in parts if part.emb_rows is not None]
            looked_up = zip(*((part.emb_rows, part.emb_gradients) for part in supervised), strict=True)
            rows, gradients = (self._of_all_slots(torch.cat(some)) for some in looked_up)
            assert state.touched is not None
            state.touched[rows] = True
            sparse_sign_sgd(
                state.model.inner.puzzle_emb.weights,
                rows,
                gradients,
                lr=config.puzzle_emb_lr * self.plan.lr_share(step),
                weight_decay=config.puzzle_emb_weight_decay,
                backend=config.optimizer_backend,
            )
        if state.learner is not None:
            assert state.model.inner.q_head is not None
            state.learner.follow(state.model.inner.q_head)
        state.update_averages(config.ema_rate)

    def _of_all_slots(self, rows: Tensor) -> Tensor:
        """All workers' rows, where `rows` has one a slot for each supervised ACT step in turn."""
        by_slot = rows.unflatten(0, (self.config.num_supervised_steps, -1)).transpose(0, 1)
        return self.world.gather(by_slot.contiguous(), self.config.global_batch_size).flatten(0, 1)

    def batch(self, supervision_step: int) -> Batch:
        """What this worker's slots are offered."""
        return self._batches.get(supervision_step).to(self.device)

    def control(self, step: int, supervision_step: int) -> Control:
        """What decides about halting and depth, and the keys of what is drawn for the states."""
        moment = self._moment(step, supervision_step)
        control = self.state.model.halting.control(moment)
        keys = slot_keys(moment) if self.config.arch.is_drawn else None
        return control._replace(depth=self.plan.depth(step), keys=keys)

    def _moment(self, step: int, supervision_step: int) -> Moment:
        return Moment(
            self.config.seed,
            step,
            self.plan.total_steps,
            supervision_step,
            self.config.global_batch_size,
            self.slots,
            self.device,
        )


def slot_keys(moment: Moment) -> Tensor:
    """A key for each of this worker's slots, under which its random numbers of this ACT step are drawn; int64 [B]."""
    drawn = words(moment.seed, Purpose.NOISE, moment.supervision_step, moment.num_slots)
    return moment.own(drawn.view(np.int64))


def _read(dataset: Dataset, sampler: Sampler, plan: Plan, slots: slice, supervision_step: int) -> Batch:
    config, manifest = plan.config, dataset.manifest
    of_the_step = config.seed, supervision_step, config.global_batch_size
    step = (supervision_step - 1) // config.supervision_steps + 1
    filled = plan.filled(step)
    return make_batch(
        dataset.split("train"),
        sampler.ids(supervision_step, plan.easiest(step))[slots],
        manifest.ignore_label_id,
        manifest.blank_identifier_id,
        task=dataset.task,
        keys=visit_draws(*of_the_step)[slots],
        filled=filled_cells(*of_the_step, manifest.seq_len, filled)[slots] if filled else None,
    )


def _other(tensor: Tensor) -> Tensor:
    """Other values that may stand there too."""
    if not tensor.ndim:
        return tensor + 1
    moved = tensor.roll(1, 0).roll(1, -1)
    return moved / 2 + 0.1 if tensor.is_floating_point() else moved
