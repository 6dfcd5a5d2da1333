"""What is known of a sweep before it starts: its rungs, what a trial takes, and what all of it will."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from hrm_ray.config.schema import TrainConfig
from hrm_ray.errors import UserError
from hrm_ray.nodes import Growth, most
from hrm_ray.training.plan import Plan
from hrm_ray.tuning import samplers
from hrm_ray.tuning.config import SweepConfig
from hrm_ray.tuning.estimate import Estimate, Probe, Spent, estimate, probe
from hrm_ray.tuning.execute import Slot
from hrm_ray.tuning.points import Points, checked
from hrm_ray.tuning.study import num_trials_of, rehearse

NUM_PROBED = 5  # points at most, until one can train


@dataclass(frozen=True)
class Outline:
    """What is known of a sweep before it starts.

    Attributes:
        points: of it.
        runs: some of the space, to be probed.
        first_step, last_step: of all points that were looked at, the first with a value, and the longest.
        refused: reasons, of as many points of `num_sampled`.
    """

    points: Points
    runs: list[TrainConfig]
    first_step: int
    last_step: int
    refused: list[str]
    num_sampled: int

    @classmethod
    def of(cls, config: SweepConfig) -> "Outline":
        """Raises UserError if the sweep cannot run."""
        rehearse(config)
        points = Points(config)
        sampled = checked(points)
        runs = [run for _, run in sampled if isinstance(run, TrainConfig)]
        plans = [points.plan(run) for run in runs]
        first = min(_first_step(plan, config.watched) for plan in plans)
        last = max(plan.last_step for plan in plans)
        samplers.pruner(config.prunes, first_step=first, last_step=last)  # an unknown one is said now
        refused = [run for _, run in sampled if isinstance(run, str)]
        return cls(points, runs[-NUM_PROBED:], first, last, refused, len(sampled))

    @property
    def rungs(self) -> list[tuple[int, float]]:
        return samplers.rungs(self.points.config.prunes, first_step=self.first_step, last_step=self.last_step)

    def estimate(
        self, slot: Slot, grows: Growth | None, stop: Callable[[], str | None], found: Probe | None = None
    ) -> Estimate:
        """From a probe of one of them, on the cluster when it has grown; `found` if that was done before."""
        config = self.points.config
        at_once = min(slot.at_most(grows or Growth()), config.max_concurrent or self.last_step)
        plan = self.points.plan(self.runs[0])
        found = found or probe(self.runs, slot, stop)
        trials = estimate(found, plan, self.rungs, num_trials_of(config), slot, at_once)
        if config.repeat is None:
            return trials
        whole = [(plan.last_step, 1.0)]
        again = estimate(found, plan, whole, config.repeat.seeds * config.repeat.top, slot, at_once)
        both = {name: value + vars(again.spent)[name] for name, value in vars(trials.spent).items()}
        return replace(trials, spent=Spent(**both), num_steps=trials.num_steps + again.num_steps)


def _first_step(plan: Plan, metric: str) -> int:
    happens = plan.evaluates if metric.startswith("eval/") else plan.reports
    return next(step for step in range(1, plan.last_step + 1) if happens(step))


def slot_of(config: SweepConfig, grows: Growth | None) -> Slot:
    """What a trial takes on the present cluster, which may still grow."""
    resources = config.resources
    gpus = resources.gpus
    if gpus == "auto":
        on_cpu = any(word == "device=cpu" for word in config.train)
        gpus = 0.0 if on_cpu or not most({"GPU": 1}, grows or Growth()) else 1.0
    return Slot(resources.num_workers, resources.cpus, gpus)


def check_budget(found: Estimate, config: SweepConfig, yes: bool) -> None:
    over = found.spent.over(config.budget, config.price)
    if over is not None and not yes:
        raise UserError(
            f"the sweep is estimated to take {found.spent.describe(config.price)}, more than budget.{over}; lower "
            "num_trials or max_steps, raise the budget, or add --yes to start anyway and stop when it is spent"
        )
