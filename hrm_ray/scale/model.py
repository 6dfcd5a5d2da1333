"""The model of docs/scale.md: seconds of a step, and hours and cost of a training, for any number of workers.

Pure functions of a machine's numbers (`machine`) and of what a training has to do (`work`). All seconds.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from hrm_ray.scale.machine import Machine
from hrm_ray.scale.work import Work
from hrm_ray.training.plan import evaluated_at_once

OPTIMIZER_BYTES = (
    28  # that AdamATan2 reads and writes a parameter: weight and two moments twice, the gradient once
)
HALF = 0.5  # efficiency from which on workers are worth adding
MOST_WORKERS, LARGEST_BATCH = 4096, 2**24
HOUR_S = 3600.0


@dataclass(frozen=True)
class Step:
    """Seconds of a step by part.

    Attributes:
        products, launches: of all products; how they add up depends on the machine.
        optimizer: moving the weights.
        exchange: adding up gradients over the workers; not thought to overlap with anything.
        data: waiting for puzzles.
        computing: products, launches and optimizer together, as slow as neighbours make them.
    """

    products: float
    launches: float
    optimizer: float
    exchange: float
    data: float
    computing: float

    @property
    def seconds(self) -> float:
        return self.computing + self.exchange + self.data


def all_reduce_s(machine: Machine, num_workers: int, size_bytes: float, num_messages: int) -> float:
    """Seconds to add up `size_bytes` over all workers, in `num_messages` parts.

    A ring of n sends each byte 2 (n - 1) / n times and each message over 2 (n - 1) hops; one ring inside each machine,
    then one of the machines.
    """
    m, inside = machine, min(num_workers, machine.workers)

    def ring(n: int, bytes_per_s: float, latency_s: float) -> float:
        return 2 * (n - 1) / n * size_bytes / bytes_per_s + num_messages * 2 * (n - 1) * latency_s

    return ring(inside, m.inside_bytes_per_s.value, m.inside_latency_s.value) + ring(
        num_machines(machine, num_workers), m.between_bytes_per_s.value, m.between_latency_s.value
    )


def num_machines(machine: Machine, num_workers: int) -> int:
    """Machines that so many workers take."""
    return math.ceil(num_workers / machine.workers)


def crowding(machine: Machine, num_workers: int) -> float:
    """Times as long that a worker computes: 1 alone, `machine.crowded` with all its neighbours, a line between."""
    others = min(num_workers, machine.workers) - 1
    return 1 + (machine.crowded.value - 1) * others / max(1, machine.workers - 1)


def step(machine: Machine, work: Work, num_workers: int, batch_size: int) -> Step:
    """One optimizer step of `batch_size` puzzles, at least one a worker, on `num_workers`."""
    model, config = work.model, work.config
    local = math.ceil(batch_size / num_workers)
    num_passes = config.supervision_steps * math.ceil(local / (config.micro_batch_size or local))
    products = config.supervision_steps * local * model.training.flops / machine.flops_per_s.value
    launches = num_passes * model.training.products * machine.launch_s.value
    optimizer = OPTIMIZER_BYTES * model.num_params / machine.optimizer_bytes_per_s.value
    busy = max(products, launches) if machine.runs_ahead else products + launches
    # Gathering what every worker has sends each byte once where an all-reduce sends it twice.
    exchanged = work.gradient_bytes + work.embedding_bytes(batch_size) / 2
    return Step(
        products,
        launches,
        optimizer,
        all_reduce_s(machine, num_workers, exchanged, work.num_messages),
        machine.data_s.value,
        (busy + optimizer) * crowding(machine, num_workers),
    )


def evaluation_s(machine: Machine, work: Work, num_workers: int, batch_size: int) -> float:
    """One evaluation, every puzzle with all its ACT steps."""
    most = evaluated_at_once(work.config, batch_size, num_workers, work.puzzles.seq_len)
    at_once = min(most, math.ceil(work.num_evaluated / num_workers))
    num_passes = math.ceil(work.num_evaluated / (num_workers * at_once)) * work.config.arch.halt_max_steps
    products = at_once * work.model.evaluation.flops / machine.flops_per_s.value
    launches = work.model.evaluation.products * machine.launch_s.value
    busy = max(products, launches) if machine.runs_ahead else products + launches
    return num_passes * busy * crowding(machine, num_workers)


@dataclass(frozen=True)
class Training:
    """A whole training in seconds, and its cost.

    Attributes:
        step: one of its steps.
        start, steps, evaluations, checkpoints: where an undisturbed run spends its time.
        save_interval: between two checkpoints.
        lost: by each interruption, on average at most: work since the last checkpoint, and until training goes on.
        spot: expected, with interruptions; infinite if they come faster than work is done.
    """

    step: Step
    num_steps: int
    start: float
    steps: float
    evaluations: float
    checkpoints: float
    save_interval: float
    lost: float
    spot: float
    cost: float
    spot_cost: float

    @property
    def seconds(self) -> float:
        return self.start + self.steps + self.evaluations + self.checkpoints


def training(machine: Machine, work: Work, num_workers: int, batch_size: int) -> Training:
    """The whole training of `work`, with as many puzzles as it has, `batch_size` in each step."""
    m, config = machine, work.config
    of_step, num_steps = step(machine, work, num_workers, batch_size), work.num_steps(batch_size)
    steps_s = num_steps * of_step.seconds
    evaluation = evaluation_s(machine, work, num_workers, batch_size) if work.num_evaluations else 0.0
    size = work.checkpoint_bytes(math.ceil(batch_size / num_workers))
    intervals = [steps_s]
    if config.eval_spacing is None:  # else evaluations alone are no reason for a checkpoint
        intervals.append(steps_s / max(1, work.num_evaluations))
    if config.checkpoint_interval_s is not None:
        intervals.append(config.checkpoint_interval_s)
    if config.checkpoint_interval is not None:
        intervals.append(config.checkpoint_interval * of_step.seconds)
    interval = min(intervals)
    num_saved = steps_s / interval
    start = m.start_s.value
    # An evaluation that is interrupted begins from its first puzzle.
    repeated = max(interval, evaluation) / 2 + size / m.store_bytes_per_s.value
    lost = repeated + m.replace_s.value + start
    seconds = (
        start + steps_s + work.num_evaluations * evaluation + num_saved * size / m.copy_bytes_per_s.value
    )
    interruptions_per_s = m.interruptions_per_hour.value / HOUR_S * num_machines(machine, num_workers)
    left = 1 - interruptions_per_s * lost  # the share of the time in which work is done that is kept
    spot = seconds / left if left > 0 else math.inf
    return Training(
        of_step,
        num_steps,
        start,
        steps_s,
        work.num_evaluations * evaluation,
        num_saved * size / m.copy_bytes_per_s.value,
        interval,
        lost,
        spot,
        seconds / HOUR_S * num_workers * m.price_per_hour.value,
        spot / HOUR_S * num_workers * m.spot_price_per_hour.value if spot < math.inf else math.inf,
    )


def efficiency(machine: Machine, work: Work, num_workers: int, batch_size: int) -> float:
    """Speed of `num_workers` on a batch, as a share of so many times that of one worker on the same batch."""
    one, many = (step(machine, work, n, batch_size).seconds for n in (1, num_workers))
    return one / (num_workers * many)


def most_useful_workers(machine: Machine, work: Work, batch_size: int) -> int:
    """The most workers (up to `MOST_WORKERS`) that share a batch at half their speed or more."""
    tried = range(min(batch_size, MOST_WORKERS), 0, -1)
    return next(n for n in tried if efficiency(machine, work, n, batch_size) >= HALF)


def fastest_workers(machine: Machine, work: Work, batch_size: int) -> int:
    """How many workers (up to `MOST_WORKERS`) take the shortest step: the fewest of equals."""
    tried = range(1, min(batch_size, MOST_WORKERS) + 1)
    return min(tried, key=lambda n: step(machine, work, n, batch_size).seconds)


def smallest_useful_batch(machine: Machine, work: Work, num_workers: int) -> int | None:
    """The smallest batch, a multiple of the workers, on which they work at half their speed or more; None: none."""

    def is_useful(local: int) -> bool:
        return efficiency(machine, work, num_workers, local * num_workers) >= HALF

    local = first(is_useful, LARGEST_BATCH // num_workers)
    return local and local * num_workers


def first(holds: Callable[[int], bool], most: int) -> int | None:
    """The smallest number from 1 to `most` for which `holds`, which holds for all above it; None: for none."""
    low, high = 1, most
    if most < 1 or not holds(most):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low
