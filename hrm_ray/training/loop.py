"""The training loop: the same in a plain process and in every Ray worker. Knows no Ray.

What follows on what: steps (`step`), reports, checkpoints, evaluations, and what is done about faults.
"""

import gc
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch

from hrm_ray import machine, memory
from hrm_ray.config.schema import TrainConfig
from hrm_ray.data.shards import Dataset, open_dataset
from hrm_ray.errors import RunFailed, UserError
from hrm_ray.evaluation.evaluate import Interrupted
from hrm_ray.models.compiled import STANCE
from hrm_ray.storage.lock import Lock
from hrm_ray.storage.storage import Storage, is_full
from hrm_ray.training.account import Account
from hrm_ray.training.agreement import WorkersDisagree, all_finite, bit_sum, odd_ones_out
from hrm_ray.training.checkpoint import (
    FOLDER,
    Checkpoint,
    best,
    finished,
    newest_whole,
    step_name,
    write_manifest,
)
from hrm_ray.training.evaluations import Evaluations
from hrm_ray.training.hooks import Hooks
from hrm_ray.training.logging import RECORDS, check_places
from hrm_ray.training.meter import LossDiverged, Meter
from hrm_ray.training.plan import Plan, why_ends_early
from hrm_ray.training.preparation import Preparation
from hrm_ray.training.resume import check_fits, weights_source
from hrm_ray.training.rollback import check_allowed, steps_left_out
from hrm_ray.training.saver import Saver
from hrm_ray.training.state import TrainState
from hrm_ray.training.step import Stepper
from hrm_ray.training.watchdog import Watchdog
from hrm_ray.world import World


@dataclass(frozen=True)
class Votes:
    """What the workers agree on after every step."""

    stop: bool
    save: bool
    written: bool  # every worker has written its part of the pending checkpoint


EARLY = ("early_stopping", "stop_at")  # ends before the last step that are as planned as it
SMALLER = "use a smaller model, a smaller global_batch_size or more workers"  # where memory is lacking


class TrainingLoop:
    """One worker's part of a run.

    Args:
        config: the run.
        run: its folder.
        world: this worker's place.
        hooks: see `Hooks`.
    """

    def __init__(self, config: TrainConfig, run: Storage, world: World, hooks: Hooks):
        self.config, self.world, self.hooks = config, world, hooks
        self.dataset = open_checked(config.data_path, world)
        self.plan = Plan.of(config, self.dataset.split("train"))
        setup = self._resolve(config.forward_dtype)
        if len(set(world.gather_objects(setup.dtype))) > 1:  # "auto" on unlike machines
            setup = self._resolve("float32")
        if setup.device.type == "cpu":
            memory.keep_memory()
        self._stop_reason: str | None = None
        if world.is_first:
            check_places(run)
        # The first worker decides where the run goes on, and keeps others off it.
        self._lock = run.lock(owner=hooks.owner, say=self._say_waits) if world.is_first else Lock()
        self.run = run = run.held_by(self._lock)
        self._account = Account(config, self.plan, run, world, hooks, lambda: self.state.global_step)
        self._note = self._account.note
        self._preparation = Preparation(config, self.plan, world, setup, note=self._note, show=self._show)
        self._evaluations = Evaluations(config, self.plan, self.dataset, world, setup.device)
        self._watchdog = Watchdog(config.watchdog_s)
        self._saver = Saver(
            run,
            world,
            keep_last=config.keep_last,
            keep_best=config.keep_best,
            on_wait=self._watchdog.beat,
            on_event=self._note,
        )
        try:
            with memory.needed_for(f"the model and a batch on {self.setup.device}", SMALLER):
                self._begin()
            if world.is_first:
                run.sweep(RECORDS)
                self._account.open(evaluates_again=self._evaluation_is_due)
                if self._lock.weakness:
                    self._note("unlocked", self._lock.weakness)
        except BaseException as error:
            self._close()
            raise _as_full_disk(error, run) from None

    @property
    def setup(self) -> machine.Setup:
        """What of this worker's machine is used."""
        return self._preparation.setup

    def _resolve(self, forward_dtype: str) -> machine.Setup:
        """What of this worker's machine is used."""
        config = self.config
        return machine.resolve(
            device=config.device,
            forward_dtype=forward_dtype,
            attention=config.attention,
            optimizer_backend=config.optimizer_backend,
            num_tokens=config.arch.num_tokens(self.dataset.manifest.seq_len),
            head_dim=config.arch.hidden_size // config.arch.num_heads,
            cuda_graphs=config.cuda_graphs,
            local_rank=self.world.local_rank,
        )

    def _begin(self) -> None:
        """Make the state of the newest whole checkpoint, or of a new run. Collective."""
        config = self.config
        self.state = TrainState.initial(config, self.dataset, self.setup)
        checkpoint = self._newest_checkpoint()
        sums, num_steps = None, 0
        if checkpoint is not None:
            sums = self.state.restore(checkpoint, self.world)
            num_steps = checkpoint.manifest.unreported_steps
        elif config.resume == "weights":
            self._start_from_weights()
        self._meter = Meter(
            self.setup.device,
            slots_per_step=config.global_batch_size * config.supervision_steps,
            max_loss=config.max_loss,
            has_q_head=config.arch.has_q_head,
            sums=sums,
            num_steps=num_steps,
        )
        self.stepper = Stepper(config, self.plan, self.dataset, self.world, self.state)
        self._saved_step = self.state.global_step if checkpoint else 0  # of the newest checkpoint
        before = checkpoint.manifest.generation if checkpoint else 0
        self._saver.generation = max(self._lock.generation, before)
        self._saved_at = time.monotonic()
        # The last step whose evaluation is done; a checkpoint without metrics was not evaluated.
        self._evaluated_step = self.state.global_step if checkpoint and checkpoint.manifest.metrics else 0

    def _newest_checkpoint(self) -> Checkpoint | None:
        """Where the run goes on; the first worker verifies it and decides for all. Collective."""
        checkpoint = None
        if self.world.is_first:
            checkpoint = newest_whole(self.run, self._note)
            if checkpoint is not None:
                check_fits(checkpoint, self.config, self.run, self.dataset)
        name = self.world.from_first(checkpoint.name if checkpoint else None)
        return checkpoint or (Checkpoint(self.run / FOLDER / name) if name else None)

    def _start_from_weights(self) -> None:
        source = weights_source(self.run)
        left = self.state.load_weights(source.weights())
        new = f" (newly initialised: {', '.join(left)})" if left else ""
        self._note("weights_taken", f"new run from the weights of {source.folder}{new}")

    def train(self) -> dict[str, Any]:
        """Run to the end, or to the step after which `hooks.stop` asks to stop. Collective.

        Returns:
            the summary, which the first worker also writes to summary.json.

        Raises:
            UserError: there is too little memory.
            RunFailed: the loss is not finite, or there is no room on the disk.
            WorkersDisagree: their weights differ; the last checkpoint is from before.
        """
        try:
            step, workers = self.state.global_step, f"on {self.world.size} worker(s)"
            self._note("started", f"continues from step {step} {workers}" if step else f"starts {workers}")
            with memory.needed_for(*self._memory_need()):
                self._run()
            summary = self._summary()
            self._account.summarise(summary)
            self._note("finished" if summary["finished"] else "stopped", summary["stop_reason"] or "done")
            return summary
        except (UserError, OSError) as error:
            failure = _as_full_disk(error, self.run)
            with suppress(OSError):
                self._note("failed", str(failure))
            raise failure from None
        finally:
            self._close()

    def _memory_need(self) -> tuple[str, str]:
        """What needs memory, and what to do if there is not enough (see `memory.needed_for`)."""
        slots = self.stepper.slots
        num_slots = slots.stop - slots.start
        at_once = min(self.config.micro_batch_size or num_slots, num_slots)
        mend = f"micro_batch_size={at_once // 2} computes half of them at once, for the same update"
        return f"{at_once} puzzle(s) at once on {self.setup.device}", mend if at_once > 1 else SMALLER

    def _close(self) -> None:
        """Let go of everything."""
        self._saver.close()
        self._watchdog.close()
        self._account.close()
        self._lock.close()

    def _run(self) -> None:
        self._prepare()
        # Only then, since it imports the compiler, which takes a second.
        with torch.compiler.set_stance(STANCE) if self.setup.compile else nullcontext():
            self._run_to_the_end()

    def _run_to_the_end(self) -> None:
        self._evaluate_if_due()  # what a stop or a crash prevented
        self._stop_early_if_due()
        while self.state.global_step < self.plan.last_step and self._stop_reason is None:
            try:
                self._advance()
            except LossDiverged as problem:
                self._roll_back(problem)
            self._watchdog.beat()
        self._finish_saving()

    def _prepare(self) -> None:
        """Make the model ready for training. Collective."""
        self._preparation.prepare(self.state, self.stepper, self._meter, has_work=not self._is_at_end)

    def _advance(self) -> None:
        """One step and what is due after it."""
        state, plan = self.state, self.plan
        step = state.global_step + 1
        started = time.perf_counter()
        self._step(step)
        votes = self._vote()
        if plan.reports(step):
            self._account.report(self._meter.report(self.world) | plan.values(step))
        interval = self.config.checksum_interval
        if interval is not None and step % interval == 0:
            self._check_state()
        state.train_s += time.perf_counter() - started
        if plan.saves(step) or votes.stop or votes.save:
            self._save()
        elif votes.written:
            self._finish_saving()
        self._show("train")
        self._evaluate_if_due()

    def _step(self, step: int) -> None:
        outcome = self.stepper.take(step)
        if outcome is not None:  # it was not left out
            self._meter.add(outcome, step)

    def _vote(self) -> Votes:
        """What all workers agree on after a step or a batch of an evaluation. Collective."""
        reason = self.hooks.stop()
        save = self.world.is_first and (self.hooks.save() or self._is_time_to_save())
        votes = torch.tensor([reason is not None, save, self._saver.is_writing], dtype=torch.int64)
        stop, save, writing = self.world.sum(votes).tolist()
        if stop:
            self._stop_reason = reason or "another worker"
        return Votes(bool(stop), bool(save), self._saver.is_pending and not writing)

    def _is_time_to_save(self) -> bool:
        interval_s = self.config.checkpoint_interval_s
        return interval_s is not None and time.monotonic() - self._saved_at > interval_s

    @property
    def _is_at_end(self) -> bool:
        """Whether neither steps nor an evaluation are to come."""
        return self.state.global_step >= self.plan.last_step and not self._evaluation_is_due

    @property
    def _evaluation_is_due(self) -> bool:
        step, test = self.state.global_step, self.dataset.splits.get("test")
        return step > 0 and bool(test) and self.plan.evaluates(step) and self._evaluated_step != step

    def _evaluate_if_due(self) -> None:
        """Evaluate and note the metrics in the checkpoint of this step, if there is one. That was saved first: an
        evaluation may be long, and a request during it must not cost training time."""
        if self._stop_reason is not None or not self._evaluation_is_due:
            return
        if self._saved_step != self.state.global_step:
            self._check_state()  # else it was when it was saved
        started = time.perf_counter()
        try:
            with self._meter.excluded(), self.state.averaged_weights():
                named = self._evaluations.of(
                    self.state.model,
                    self.state.global_step,
                    on_batch=self._show_evaluation,
                    interrupt=self._interrupts_evaluation,
                )
        except Interrupted:
            self._save_the_end()
            return
        self.state.train_s += time.perf_counter() - started
        self._evaluated_step = self.state.global_step
        self._account.report(named)
        self._stop_early_if_due()
        if self._stop_reason is not None:
            self._save_the_end()
        self._finish_saving()
        if self.world.is_first and self._saved_step == self.state.global_step:
            self._account.flush()  # before the checkpoint says that this evaluation is done
            folder = self.run / FOLDER / step_name(self.state.global_step)
            manifest = Checkpoint(folder).manifest
            update = {"metrics": named, "train_s": self.state.train_s}
            write_manifest(folder, manifest.model_copy(update=update))
            self._saver.prune(self.state.global_step)
        self._show("train")

    def _interrupts_evaluation(self) -> bool:
        votes = self._vote()
        if votes.written:
            self._finish_saving()
        return votes.stop

    def _show_evaluation(self, num_examples: int) -> None:
        self._watchdog.beat()
        self._show("eval")

    def _stop_early_if_due(self) -> None:
        reason = self.world.from_first(why_ends_early(self._account.evaluations(), self.config))
        if reason is not None and self.state.global_step < self.plan.last_step:
            self._stop_reason = reason

    def _check_state(self) -> None:
        """Whether the workers have the same weights, and these and the optimizer's moments are finite. Collective.

        Raises:
            WorkersDisagree, LossDiverged.
        """
        weights = self.state.take_touched()
        sums = self.world.gather_objects(bit_sum(weights))
        step = self.state.global_step
        if len(set(sums)) > 1:
            what = f"the weights of {odd_ones_out(sums)} differ from the others' after step {step}"
            self._note("workers_disagree", what)
            self._finish_saving()  # of an earlier step, at which they agreed
            raise WorkersDisagree(what)
        # Of the moments too: they keep an infinite gradient, which the weights may show steps later.
        if not all_finite([*weights, *self.state.moments()]):
            raise LossDiverged(step, f"the weights or their moments are not finite after step {step}")

    def _save(self) -> None:
        """Start writing a checkpoint; the state has been checked. Collective."""
        self._finish_saving()
        with self._meter.excluded(checkpoint=True):
            self._meter.check(self.world)
            self._check_state()
            snapshot = self.state.snapshot(
                self.config,
                self.dataset,
                self.world,
                sums=self._meter.sums,
                unreported_steps=self._meter.num_steps,
            )
            self._saver.start(snapshot)
        self._saved_step, self._saved_at = self.state.global_step, time.monotonic()

    def _save_the_end(self) -> None:
        """See to it that there is a checkpoint of the step at hand, with which the run ends. Collective."""
        if self._saved_step != self.state.global_step:
            self._save()

    def _finish_saving(self) -> None:
        """Make the pending checkpoint valid, if there is one. Collective."""
        if self._saver.is_pending:
            with self._meter.excluded(checkpoint=True):
                self._saver.finish(self._account.flush)
            if self.world.is_first:
                self.hooks.saved()

    def _roll_back(self, problem: LossDiverged) -> None:
        """Go back to the last checkpoint and leave out the batches around `problem`. Collective.

        Raises:
            RunFailed: the run is to stop instead, or was rolled back too often.
        """
        skipped, num_rollbacks = self.state.skipped_steps, self.state.num_rollbacks
        self._finish_saving()
        check_allowed(self.config, problem, num_rollbacks, self.plan.lr(problem.step))
        # The memory of the old ones is wanted for the new: frames of `problem` and compiled modules refer to them.
        del self.stepper, self.state
        problem.__traceback__ = None
        gc.collect()
        self._begin()
        state = self.state
        left_out = steps_left_out(problem, state.global_step, num_rollbacks - state.num_rollbacks)
        state.skipped_steps = skipped.union(left_out)
        state.num_rollbacks = num_rollbacks + 1
        self._prepare()
        self._account.rewind()
        self._note(
            "rolled_back",
            f"{problem.what}; back to step {state.global_step}; the batches of steps {left_out[0]} to "
            f"{problem.step} are skipped",
        )

    def _say_waits(self, text: str) -> None:
        """Tell the user, before this process may write in the run's folder."""
        self.hooks.event({"event": "waits", "message": text})

    def _show(self, phase: str) -> None:
        self._account.show(phase, self._setup_in_words)

    @property
    def _setup_in_words(self) -> str:
        setup = self.setup
        optimizer = self.config.optimizer.describe(setup.optimizer_backend, setup.device)
        return setup.describe(optimizer)

    def _summary(self) -> dict[str, Any]:
        """What summary.json holds; metrics of the end and of the best checkpoint."""
        chosen = best(finished(self.run)) if self.world.is_first else None
        at_end = self._is_at_end
        is_finished = at_end or self._stop_reason in EARLY
        return {
            "final": self._account.last,
            "best": chosen.manifest.metrics if chosen else {},
            "global_step": self.state.global_step,
            "finished": is_finished,
            "stop_reason": None if at_end else self._stop_reason,
            "conclusions": self._account.conclude(self.dataset, finished=is_finished),
            "num_rollbacks": self.state.num_rollbacks,
            "train_s": round(self.state.train_s, 3),
            "num_params": sum(p.numel() for p in self.state.model.parameters()),
            "checkpoint": str(chosen.folder) if chosen else None,
        }


def _as_full_disk(error: BaseException, run: Storage) -> BaseException:
    """`error`, or a RunFailed if a write failed because the disk is full."""
    if isinstance(error, OSError) and is_full(error):
        return RunFailed(
            f"{run}: the disk is full; free some space, and the same command continues from the last checkpoint"
        )
    return error


def open_checked(path: str, world: World) -> Dataset:
    """Open the dataset of a run; one worker a node compares its files with the manifest. Collective.

    Raises:
        UserError: on all workers alike, if any of them found it missing or damaged, or another one.
    """
    dataset, problem = None, None
    try:
        dataset = open_dataset(path)
        for name in ("train", "test"):
            if world.local_rank == 0 and name in dataset.splits:
                dataset.split(name).check_files()
    except UserError as error:
        problem = error
    problems = [problem for problem in world.gather_objects(problem) if problem]
    if problems:
        raise problems[0]
    assert dataset is not None
    if len(set(world.gather_objects(dataset.fingerprint))) > 1:
        raise UserError(
            f"{path}: the workers' nodes hold different data sets; copy the same one to all of them"
        )
    return dataset
