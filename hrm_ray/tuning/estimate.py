"""What a sweep will take, from a measured probe of some steps, and what it has taken."""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from hrm_ray.config.schema import CurriculumConfig, TrainConfig
from hrm_ray.errors import UserError, first_line
from hrm_ray.training.plan import Plan
from hrm_ray.training.ray_train import absolute
from hrm_ray.training.shared import check_seen
from hrm_ray.tuning.config import Budget, Price
from hrm_ray.tuning.execute import Slot

PROBE_STEPS = 4  # the first is not counted: it warms up
HOUR_S = 3600.0


@dataclass
class Spent:
    """Resources that a sweep has held, in seconds; `wall_s` is the time of its commands."""

    cpu_s: float = 0.0
    gpu_s: float = 0.0
    wall_s: float = 0.0

    def add(self, seconds: float, num_trials: int, slot: Slot) -> None:
        """So many trials have held a slot each for so long."""
        self.wall_s += seconds
        self.cpu_s += seconds * num_trials * slot.num_workers * slot.cpus
        self.gpu_s += seconds * num_trials * slot.num_workers * slot.gpus

    def money(self, price: Price) -> float:
        return (self.cpu_s * price.cpu_hour + self.gpu_s * price.gpu_hour) / HOUR_S

    def over(self, budget: Budget, price: Price) -> str | None:
        """Which part of the budget it is more than: "cpu_hours=2"; None if there is none."""
        there = {
            "cpu_hours": self.cpu_s / HOUR_S,
            "gpu_hours": self.gpu_s / HOUR_S,
            "wall_hours": self.wall_s / HOUR_S,
            "money": self.money(price),
        }
        for key, spent in there.items():
            most = getattr(budget, key)
            if most is not None and spent > most:
                return f"{key}={most:g}"
        return None

    def describe(self, price: Price) -> str:
        """For a person: "12 min, 24 min of CPUs"."""
        parts = [duration(self.wall_s), f"{duration(self.cpu_s)} of CPUs"]
        if self.gpu_s:
            parts.append(f"{duration(self.gpu_s)} of GPUs")
        if self.money(price):
            parts.append(f"{self.money(price):.2f} of money")
        return ", ".join(parts)


def duration(seconds: float) -> str:
    """For a person: "45 s", "12 min", "3.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / HOUR_S:.1f} h"


@dataclass(frozen=True)
class Probe:
    """Seconds of a step, of a whole evaluation, and of a trial before its first step."""

    step_s: float
    eval_s: float
    start_s: float

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Probe":
        """What `Estimate.plain` says of it."""
        return cls(**{field.name: values[field.name] for field in fields(cls)})


def measure(run: TrainConfig, cpus: int) -> Probe:
    """Train a few steps of `run` in this process, somewhere else than where it will lie. Not collective.

    At the full depth of the model: of a run whose depth grows, it is an upper bound.
    """
    import torch

    from hrm_ray.data.shards import open_dataset
    from hrm_ray.storage.storage import Storage
    from hrm_ray.training.hooks import Hooks, Progress
    from hrm_ray.training.loop import TrainingLoop
    from hrm_ray.training.plan import evaluated_at_once
    from hrm_ray.world import World

    dataset = open_dataset(run.data_path)
    test = dataset.splits.get("test")
    num_test = test.num_examples if test else 0
    num_wanted = min(num_test, run.num_eval_examples or num_test)
    num_tried = min(num_wanted, evaluated_at_once(run, run.global_batch_size, 1, dataset.manifest.seq_len))
    times: list[tuple[str, float]] = []

    def progress(at: Progress) -> None:
        times.append((at.phase, time.perf_counter()))

    short = {
        "max_steps": PROBE_STEPS,
        "num_eval_examples": num_tried or None,
        "wandb": "off",
        "tensorboard": False,
        "curriculum": CurriculumConfig(),
    }
    with tempfile.TemporaryDirectory(prefix="hrm_ray-probe-") as aside:
        torch.set_num_threads(cpus)
        started = time.perf_counter()
        trainer = TrainingLoop(
            run.model_copy(update=short | {"checkpoint_interval": None}),
            Storage(aside),
            World(),
            Hooks(progress),
        )
        trainer.train()
        ended = time.perf_counter()
    steps = [at for phase, at in times if phase == "train"][:PROBE_STEPS]
    step_s = (steps[-1] - steps[0]) / max(1, len(steps) - 1)
    start_s = max(0.0, steps[0] - started - step_s)
    eval_s = max(0.0, ended - steps[-1]) * (num_wanted / num_tried if num_tried else 0)
    return Probe(step_s, eval_s, start_s)


def probe(runs: Sequence[TrainConfig], slot: Slot, stop: Callable[[], str | None] = lambda: None) -> Probe:
    """`measure` the first of `runs` that can train, where the trials will run.

    Several workers are taken to share the steps of one evenly.

    Args:
        stop: why to give up; None to wait on, for a cluster that is busy or has to grow first.

    Raises:
        UserError: none of them can.
        KeyboardInterrupt: `stop` said so.
    """
    import ray

    task: Any = ray.remote(num_cpus=slot.cpus, num_gpus=slot.gpus, max_retries=0)(_measured)
    problem = ""
    for run in runs:
        values = run.model_dump(mode="json") | {"data_path": absolute(run.data_path)}
        values["scaling"] = {"mode": "ray", "num_workers": 1}
        if not slot.gpus:
            values["device"] = "cpu"
        measured = task.remote(values, slot.cpus)
        while not ray.wait([measured], timeout=0.5)[0]:
            if stop() is not None:
                raise KeyboardInterrupt
        try:
            found = ray.get(measured)
        except Exception as error:  # its worker was killed, say
            found = first_line(error)
        if isinstance(found, Probe):
            return Probe(found.step_s / slot.num_workers, found.eval_s / slot.num_workers, found.start_s)
        problem = problem or found
    raise UserError(f"no trial can train: {problem}")


def _measured(values: dict[str, Any], cpus: int) -> Probe | str:
    """What was measured, or why that failed."""
    try:
        check_seen("data", values["data_path"])
        return measure(TrainConfig.model_validate(values), cpus)
    except Exception as error:  # of any kind, as a trial would
        return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"


@dataclass(frozen=True)
class Estimate:
    """What a sweep will take."""

    probe: Probe
    spent: Spent
    num_steps: int  # of all trials
    num_trials: int

    def plain(self) -> dict[str, Any]:
        return {
            **asdict(self.probe),
            **asdict(self.spent),
            "num_steps": self.num_steps,
            "num_trials": self.num_trials,
        }


def estimate(
    found: Probe, plan: Plan, rungs: list[tuple[int, float]], num_trials: int, slot: Slot, concurrency: int
) -> Estimate:
    """Of `num_trials` trials like the one that was probed.

    Args:
        rungs: (step, share of the trials that train up to it).
    """
    seconds, steps, before = found.start_s, 0.0, 0
    for step, share in rungs:
        num_evaluations = sum(plan.evaluates(s) for s in range(before + 1, step + 1))
        steps += share * (step - before)
        seconds += share * ((step - before) * found.step_s + num_evaluations * found.eval_s)
        before = step
    spent = Spent()
    spent.add(seconds * num_trials, 1, slot)
    spent.wall_s /= max(1, min(concurrency, num_trials))
    return Estimate(found, spent, round(steps * num_trials), num_trials)
