"""How long a step takes on many GPUs, and what a whole training costs: a model of few numbers, each with its source.

A step of n workers with B puzzles takes

    max(B/n * flops / rate, products * launch) + parameters * 28 / memory + all_reduce(n) + data

flops and products are counted from the model itself, in a step that computes shapes only. The others are the machine's:
see `Machine`. Gradients are float32, summed in a ring within a machine, and in one among machines, with nothing else at
the same time. What is not in it: evaluations, and workers that are slower than others.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from hrm_ray.config.schema import TrainConfig
from hrm_ray.config.validate import Settings, nearest, read_yaml, validated
from hrm_ray.errors import UserError
from hrm_ray.machine import Setup
from hrm_ray.models.act import Batch
from hrm_ray.models.halting import Control
from hrm_ray.models.losses import act_loss
from hrm_ray.models.registry import build_model

MACHINES = Path(__file__).parent / "config/machine"
OPTIMIZER_BYTES = (
    28  # that AdamATan2 moves for a parameter: reads weight, gradient, two moments; writes three
)
GRADIENT_BYTES = 4
HOUR_S = 3600.0


class Machine(Settings):
    """What a step takes on a machine, what it costs, and how often it is lost. `sources` says where each is from."""

    flops_per_s: PositiveFloat
    """Rate of the model's products, in bfloat16, of one GPU."""
    launch_s: float = Field(ge=0)
    """Time of a step for each of its products where the GPU waits for the CPU to start them."""
    memory_bytes_per_s: PositiveFloat
    """Rate at which the optimizer moves bytes."""
    gpus: PositiveInt
    """In one machine."""
    link_bytes_per_s: PositiveFloat
    """Between the GPUs of a machine, for each GPU and direction."""
    link_latency_s: float = Field(ge=0)
    """Of one message there."""
    network_bytes_per_s: PositiveFloat
    """Between machines, for each machine and direction."""
    network_latency_s: float = Field(ge=0)
    price_hour: float = Field(ge=0)
    """Of one GPU with its share of the machine, in US dollars, on demand."""
    spot_price_hour: float = Field(ge=0)
    """The same as a spot machine, which may be taken away."""
    interruptions_hour: float = Field(ge=0)
    """How often a spot machine is taken away, on average."""
    restart_s: float = Field(ge=0)
    """From the loss of a machine to the first step after it."""
    checkpoint_s: float = Field(ge=0)
    """How long training waits for one checkpoint."""
    data_s: float = Field(ge=0)
    """How long a step waits for its puzzles, which are read ahead."""
    start_s: float = Field(ge=0)
    """From the command to the first step."""
    sources: dict[str, str] = Field(default_factory=dict)
    """Where the numbers are from, by their names."""


@dataclass(frozen=True)
class Work:
    """What a step of a model is.

    Attributes:
        params: numbers that an optimizer moves and workers sum up.
        flops: multiply-adds x 2 of the products for one puzzle.
        products: matrix products in a step, whatever the batch.
    """

    params: int
    flops: float
    products: int


@dataclass(frozen=True)
class Step:
    """Seconds of a step's parts."""

    compute: float
    launch: float
    optimizer: float
    all_reduce: float
    data: float

    @property
    def total(self) -> float:
        return max(self.compute, self.launch) + self.optimizer + self.all_reduce + self.data


def machine_of(name: str) -> Machine:
    """A machine by its name, or by the path of a YAML file of the same keys. Raises UserError."""
    known = {path.stem: path for path in MACHINES.glob("*.yaml")}
    path = known.get(name, Path(name))
    if not path.is_file():
        raise UserError(f"machine={name} is neither a file nor {nearest(name, known)}")
    values = read_yaml(path.read_bytes(), str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no keys of a machine; see {MACHINES / 'h200.yaml'}")
    return validated(Machine, values, str(path))


class _Products(TorchDispatchMode):
    """Counts matrix products, and their multiply-adds x 2."""

    count, flops = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        flops_of = flop_registry.get(func._overloadpacket)
        if flops_of is not None:
            self.count += 1
            self.flops += flops_of(*args, **(kwargs or {}), out_val=out)
        return out


@dataclass(frozen=True)
class _Shape:
    vocab_size: int
    seq_len: int
    num_puzzle_identifiers: int = 1


def work_of(config: TrainConfig, vocab_size: int = 11, seq_len: int = 81) -> Work:
    """Counted in a step on torch's meta device, which knows shapes only; the sizes are those of 9x9 Sudoku unless
    given."""
    setup = Setup(torch.device("meta"), torch.float32, attention="matmul", optimizer_backend="reference")
    model = build_model(config.arch, _Shape(vocab_size, seq_len), setup, config.halting)
    count = 2  # with one puzzle a product may become another operation
    with torch.device("meta"):
        cells = torch.ones(count, seq_len, dtype=torch.int64)
        numbers = torch.ones(count, dtype=torch.int32)
        batch, control = Batch(cells.int(), cells, numbers), Control(numbers, numbers.float())
    with _Products() as products:
        loss, _ = act_loss(model(model.initial_carry(batch), batch, control), config.arch.loss.loss_type)
        loss.backward()
    return Work(sum(p.numel() for p in model.inner.parameters()), products.flops / count, products.count)


def step_of(work: Work, machine: Machine, batch: int, workers: int) -> Step:
    """A step of `workers` GPUs with `batch` puzzles in all; the worker with most of them counts."""
    largest = math.ceil(batch / workers)
    return Step(
        compute=largest * work.flops / machine.flops_per_s,
        launch=work.products * machine.launch_s,
        optimizer=work.params * OPTIMIZER_BYTES / machine.memory_bytes_per_s,
        all_reduce=all_reduce_s(work.params * GRADIENT_BYTES, machine, workers),
        data=machine.data_s,
    )


def all_reduce_s(num_bytes: float, machine: Machine, workers: int) -> float:
    """Sum a tensor over workers: in each machine, then, its parts at the same time, among the machines."""
    inside, machines = min(workers, machine.gpus), math.ceil(workers / machine.gpus)
    return ring_s(num_bytes, inside, machine.link_bytes_per_s, machine.link_latency_s) + ring_s(
        num_bytes, machines, machine.network_bytes_per_s, machine.network_latency_s
    )


def ring_s(num_bytes: float, members: int, bytes_per_s: float, latency_s: float) -> float:
    """An all-reduce in a ring: 2 (n - 1) messages of the n-th part each."""
    return 2 * (members - 1) * (num_bytes / members / bytes_per_s + latency_s)


def most_useful(work: Work, machine: Machine, batch: int) -> int:
    """The largest power of two of workers of which each still does half of the work of one alone in the same time."""
    alone = step_of(work, machine, batch, 1).total
    workers = 1
    while (
        2 * workers <= batch
        and alone / (2 * workers * step_of(work, machine, batch, 2 * workers).total) >= 0.5
    ):
        workers *= 2
    return workers


@dataclass(frozen=True)
class Training:
    """A whole training.

    Attributes:
        hours: without interruptions. price: on demand, in US dollars.
        spot_hours: with what interruptions cost. spot_price: of these.
        lost: share of the spot hours that is lost to interruptions.
    """

    hours: float
    price: float
    spot_hours: float
    spot_price: float
    lost: float


def training_of(
    step_s: float, steps: int, machine: Machine, workers: int, checkpoint_every_s: float
) -> Training:
    """What `steps` of `step_s` cost. All workers stop when one machine is lost, and repeat half an interval."""
    working_s = steps * step_s
    working_s += working_s / checkpoint_every_s * machine.checkpoint_s
    losses_per_s = math.ceil(workers / machine.gpus) * machine.interruptions_hour / HOUR_S
    lost = min(1.0, losses_per_s * (checkpoint_every_s / 2 + machine.restart_s))
    hours = (working_s + machine.start_s) / HOUR_S
    spot_hours = hours / (1 - lost) if lost < 1 else math.inf
    return Training(
        hours,
        hours * workers * machine.price_hour,
        spot_hours,
        spot_hours * workers * machine.spot_price_hour,
        lost,
    )


# In words

WORKERS = (1, 2, 8, 64, 512)


def describe(config: TrainConfig, *, machine: str, groups: int, vocab_size: int, seq_len: int) -> str:
    """What a training takes on 1 to 512 GPUs, as text.

    Args:
        machine: see `machine_of`.
        groups: of the data set: puzzles, their copies not counted.
        vocab_size, seq_len: of its puzzles.

    Raises:
        UserError: there is no such machine.
    """
    hardware = machine_of(machine)
    work = work_of(config, vocab_size, seq_len)
    batch = config.global_batch_size
    alone_s = step_of(work, hardware, batch, 1).total
    strong = [_row(work, hardware, batch, n, alone_s / n) for n in WORKERS if n <= batch]
    weak = [_row(work, hardware, batch * n, n, alone_s) for n in WORKERS]
    lines = [
        f"{work.params / 1e6:.1f}M parameters; an ACT step of one puzzle is {work.flops / 1e9:.3g} GFLOP in "
        f"{work.products} products; machine={machine}",
        "",
        f"strong scaling: {batch} puzzles a step, whatever the number of GPUs",
        HEADER,
        *strong,
        "",
        f"weak scaling: {batch} puzzles a step on each GPU; a larger batch needs other settings",
        HEADER,
        *weak,
        "",
        f"at {batch} puzzles a step, more than {most_useful(work, hardware, batch)} GPUs are less than half used; with "
        f"fewer than {fewest_puzzles(work, hardware)} puzzles a GPU waits for the CPU",
        "",
        *_costs(config, work, hardware, groups),
        "",
        "the numbers of the machine:",
        *(
            f"  {name} = {value:g}: {hardware.sources.get(name, 'given')}"
            for name, value in _numbers(hardware)
        ),
    ]
    return "\n".join(lines)


HEADER = (
    " GPUs  each  compute  launch  optimizer  all-reduce    step ms  puzzles/s  efficiency"  # times in ms
)


def _row(work: Work, machine: Machine, batch: int, workers: int, ideal_s: float) -> str:
    """A line of a table; `ideal_s` is what a step would take if workers did not disturb each other."""
    step = step_of(work, machine, batch, workers)
    ms = [
        1e3 * seconds for seconds in (step.compute, step.launch, step.optimizer, step.all_reduce, step.total)
    ]
    return (
        f"{workers:5d} {math.ceil(batch / workers):5d} {ms[0]:8.2f} {ms[1]:7.2f} {ms[2]:10.2f} {ms[3]:11.2f} "
        f"{ms[4]:10.2f} {batch / step.total:10,.0f} {ideal_s / step.total:11.0%}"
    )


def fewest_puzzles(work: Work, machine: Machine) -> int:
    """With fewer of them a GPU waits for the CPU."""
    return math.ceil(work.products * machine.launch_s * machine.flops_per_s / work.flops)


def _costs(config: TrainConfig, work: Work, machine: Machine, groups: int) -> list[str]:
    """What the whole training costs on several numbers of GPUs."""
    batch, every_s = config.global_batch_size, config.checkpoint_interval_s or HOUR_S
    steps = max(1, int(config.epochs * groups / (batch * config.supervision_steps)))
    steps = min(steps, config.max_steps or steps)
    rows = []
    for workers in (n for n in WORKERS if n <= batch):
        step_s = config.supervision_steps * step_of(work, machine, batch, workers).total
        found = training_of(step_s, steps, machine, workers, every_s)
        rows.append(
            f"{workers:5d} {found.hours:8.2f} {found.price:14.2f} {found.spot_hours:11.2f} {found.spot_price:11.2f} "
            f"{found.lost:6.1%}"
        )
    return [
        f"a whole training: {steps:,} steps, {groups:,} groups; a checkpoint every {every_s:g} s; without evaluations",
        " GPUs    hours  US$ on demand  spot hours    US$ spot   lost",
        *rows,
    ]


def _numbers(machine: Machine) -> list[tuple[str, float]]:
    return [(name, value) for name, value in machine if name != "sources"]
