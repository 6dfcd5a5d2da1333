"""A model made ready for training: compiled, and its steps recorded, where that is wanted and works here."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch

from hrm_ray import machine
from hrm_ray.config.schema import TrainConfig
from hrm_ray.models.compiled import reason, uncompile
from hrm_ray.training.meter import Meter
from hrm_ray.training.plan import Plan
from hrm_ray.training.state import TrainState
from hrm_ray.training.step import Stepper
from hrm_ray.world import World

COMPILED, NOT_WANTED = None, ""  # what may come of compiling, besides a reason why it failed


class Preparation:
    """Prepares the models of a run: of its start, and of each rollback as it was done at the start.

    Args:
        config, plan: the run.
        world: this worker's place.
        setup: what of the machine is used.
        note: called with the name of an event and a message.
        show: called with what is being done.

    Attributes:
        setup: the same, with what came of preparing.
    """

    def __init__(
        self,
        config: TrainConfig,
        plan: Plan,
        world: World,
        setup: machine.Setup,
        *,
        note: Callable[[str, str], object],
        show: Callable[[str], object],
    ):
        self.setup = setup
        self._config, self._plan, self._world, self._note, self._show = config, plan, world, note, show
        self._is_first_time = True

    def prepare(self, state: TrainState, stepper: Stepper, meter: Meter, *, has_work: bool) -> None:
        """Make the model of `state` ready. Collective.

        Args:
            meter: does not count the time that this takes.
            has_work: whether there are steps or an evaluation to come.
        """
        state.model.train()
        is_first_time, self._is_first_time = self._is_first_time, False
        if has_work and (is_first_time or self.setup.compile):
            self._compile(state, stepper, meter, is_first_time)
        has_steps = state.global_step < self._plan.last_step
        if has_steps and (self._config.cuda_graphs if is_first_time else self.setup.cuda_graphs):
            self._record(stepper, meter, is_first_time)

    def _compile(self, state: TrainState, stepper: Stepper, meter: Meter, is_first_time: bool) -> None:
        """Compile the model, if that is wanted and every worker can. Collective."""
        started = time.monotonic()
        outcomes = self._world.gather_objects(self._try_to_compile(state, stepper, meter))
        self.setup = replace(self.setup, compile=all(outcome is COMPILED for outcome in outcomes))
        if self.setup.compile:
            if is_first_time:
                self._note("compiled", f"compiled the model in {time.monotonic() - started:.0f} s")
            return
        uncompile(state.model)
        if any(outcome != NOT_WANTED for outcome in outcomes):
            missing = [(rank, why) for rank, why in enumerate(outcomes) if why is not COMPILED]
            rank, why = max(
                missing, key=lambda one: one[1] != NOT_WANTED
            )  # the first that failed, if one did
            self._note("not_compiled", f"continues without compiling: {why or 'no compiler'} (rank {rank})")

    def _try_to_compile(self, state: TrainState, stepper: Stepper, meter: Meter) -> str | None:
        """COMPILED, NOT_WANTED, or why it failed. Not collective."""
        config, model = self._config, state.model
        num_slots = self._plan.total_steps * config.supervision_steps * config.global_batch_size
        on_cpu = self.setup.device.type == "cpu"
        if config.compile == "auto" and on_cpu and not model.inner.gains_by_compiling_on_cpu:
            return NOT_WANTED
        try:
            if not machine.compiles(
                config.compile,
                self.setup.device,
                num_params=sum(p.numel() for p in model.parameters()),
                num_tokens=num_slots * model.inner.num_tokens,
            ):
                return NOT_WANTED
            self._show("compile")
            with meter.excluded():
                stepper.compile()
            return COMPILED
        except Exception as error:  # of any kind: a compiler has many ways to fail
            return reason(error)

    def _record(self, stepper: Stepper, meter: Meter, is_first_time: bool) -> None:
        """Record the steps as CUDA graphs, or say why that failed. For one worker."""
        started = time.monotonic()
        self._show("record")
        # Anything compiled now would use other settings, or would become part of the recording.
        stance = torch.compiler.set_stance("fail_on_recompile") if self.setup.compile else nullcontext()
        try:
            with meter.excluded(), stance:
                stepper.record()
        except Exception as error:  # of any kind, as above
            self.setup = replace(self.setup, cuda_graphs=False)
            self._note("not_recorded", f"continues without CUDA graphs: {reason(error)}")
            return
        self.setup = replace(self.setup, cuda_graphs=True)
        if is_first_time:
            self._note("recorded", f"recorded CUDA graphs in {time.monotonic() - started:.0f} s")
