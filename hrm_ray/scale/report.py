"""What `hrm-ray scale` prints: for people, and as plain values."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from hrm_ray.errors import UserError
from hrm_ray.scale.machine import Machine
from hrm_ray.scale.model import (
    HALF,
    HOUR_S,
    MOST_WORKERS,
    Training,
    efficiency,
    fastest_workers,
    most_useful_workers,
    num_machines,
    smallest_useful_batch,
    step,
    training,
)
from hrm_ray.scale.work import Work

WORKERS = (1, 2, 8, 64, 512)  # if none are asked for
HEAD: tuple[str, ...] = ("workers", "puzzles", "products", "launches", "optim.", "exchange", "data", "step")
HEAD += ("puzzles/s", "eff.", "hours", "dollars", "hours", "dollars")
WIDTHS = (7, 7, 8, 8, 6, 8, 5, 8, 9, 5, 7, 8, 7, 8)
OVER = (
    " " * 18 + " milliseconds of a step ".center(53, "-") + " " * 18 + "-- on demand ---  ----- spot ------"
)


def workers_of(work: Work, asked: Sequence[int] | None) -> list[int]:
    """The workers that strong scaling is shown for: those asked for, or those of `WORKERS` that have a puzzle each.

    Raises:
        UserError: one that is asked for would have none.
    """
    batch = work.config.global_batch_size
    for n in asked or ():
        if n > batch:
            raise UserError(
                f"workers={n}: global_batch_size={batch} is too few puzzles for them; use fewer or a larger batch"
            )
    return [n for n in asked or WORKERS if n <= batch]


def plain(name: str, machine: Machine, work: Work, workers: Sequence[int] | None = None) -> dict[str, Any]:
    """All that `text` shows, in seconds, bytes and dollars; numbers that are infinite are null."""
    batch = work.config.global_batch_size
    shared = workers_of(work, workers)
    return {
        "name": name,
        "arch": work.config.arch.name,
        "puzzles": {key: value for key, value in vars(work.puzzles).items() if key != "task"},
        "num_params": work.model.num_params,
        "flops_per_puzzle": work.model.training.flops,
        "products_per_step": work.model.training.products,
        "gradient_bytes": work.gradient_bytes,
        "messages_per_step": work.num_messages,
        "num_steps": work.last_step,
        "num_evaluations": work.num_evaluations,
        "global_batch_size": batch,
        "machine": machine.model_dump(),
        "strong": [_row(machine, work, n, batch, shared=True) for n in shared],
        "weak": [_row(machine, work, n, batch * n, shared=False) for n in workers or WORKERS],
        "most_useful_workers": most_useful_workers(machine, work, batch),
        "fastest_workers": fastest_workers(machine, work, batch),
        "smallest_useful_batch": {
            n: smallest_useful_batch(machine, work, n) for n in workers or WORKERS if n > 1
        },
    }


def _row(machine: Machine, work: Work, num_workers: int, batch_size: int, *, shared: bool) -> dict[str, Any]:
    found = training(machine, work, num_workers, batch_size)
    # What is shared out is compared with one worker that has all of it, what grows with one that has a share.
    one = step(machine, work, 1, batch_size if shared else batch_size // num_workers)
    share = efficiency(machine, work, num_workers, batch_size) if shared else one.seconds / found.step.seconds
    values = asdict(found) | {"step": asdict(found.step) | {"seconds": found.step.seconds}}
    return {
        "workers": num_workers,
        "machines": num_machines(machine, num_workers),
        "batch_size": batch_size,
        "puzzles_per_s": batch_size / found.step.seconds,
        "efficiency": share,
        "seconds": found.seconds,
        **{key: None if value == math.inf else value for key, value in values.items()},
    }


def text(name: str, machine: Machine, work: Work, workers: Sequence[int] | None = None) -> str:
    """The tables for people, without the machine's numbers."""
    values = plain(name, machine, work, workers)
    batch, model, config = values["global_batch_size"], work.model, work.config
    kind = f"{config.arch.name}{', mlp_t' if getattr(config.arch, 'mlp_t', False) else ''}"
    lines = [
        f"{name}: {kind}, {model.num_params:,} parameters; {work.last_step:,} steps of {batch} puzzles, "
        f"{work.num_evaluations} evaluation(s) of {work.num_evaluated:,} ({work.puzzles.source})",
        f"counted: {model.training.flops / 1e9:.4g} GFLOP a puzzle and {model.training.products} products an ACT step; "
        f"{work.gradient_bytes / 1e6:.4g} MB of gradients, {work.num_messages} messages a step",
        "",
        f"strong scaling: {batch} puzzles a step, shared by all workers",
        *_table(values["strong"]),
        _useful(values),
        "",
        f"weak scaling: {batch} puzzles a step for each worker, and as many fewer steps",
        *_table(values["weak"]),
        f"Whether a batch above {batch} learns as much from as many puzzles is not known: hours hold only if it does.",
        "",
        _of_one(training(machine, work, 1, batch)),
    ]
    return "\n".join(lines)


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [OVER, _line(HEAD)]
    for row in rows:
        of_step = row["step"]
        parts = [of_step[key] for key in ("products", "launches", "optimizer", "exchange", "data", "seconds")]
        lines.append(
            _line(
                [
                    str(row["workers"]),
                    str(math.ceil(row["batch_size"] / row["workers"])),
                    *(f"{part * 1e3:.2f}" for part in parts),
                    f"{row['puzzles_per_s']:,.0f}",
                    f"{row['efficiency']:.0%}",
                    *_training(row["seconds"], row["cost"]),
                    *_training(row["spot"], row["spot_cost"]),
                ]
            )
        )
    return lines


def _line(cells: Sequence[str]) -> str:
    return "  ".join(cell.rjust(width) for cell, width in zip(cells, WIDTHS, strict=True))


def _training(seconds: float | None, cost: float | None) -> tuple[str, str]:
    if seconds is None or cost is None:
        return "never", "-"
    return f"{seconds / HOUR_S:.2f}", f"{cost:,.2f}"


def _useful(values: dict[str, Any]) -> str:
    def number(n: int) -> str:
        return f"{n}{' or more' if n == MOST_WORKERS else ''}"

    batch = values["global_batch_size"]
    needed = ", ".join(f"{n}: {least or 'none'}" for n, least in values["smallest_useful_batch"].items())
    return (
        f"With {batch} puzzles more than {number(values['most_useful_workers'])} worker(s) are less than {HALF:.0%} "
        f"efficient; {number(values['fastest_workers'])} take the shortest step."
        + (f"\nThe smallest batch for {HALF:.0%}, by workers: {needed}." if needed else "")
    )


def _of_one(found: Training) -> str:
    return (
        f"One worker: start {found.start:.0f} s, steps {found.steps:,.0f} s, evaluations {found.evaluations:,.0f} s, "
        f"checkpoints {found.checkpoints:.1f} s.\n"
        f"Spot: a checkpoint every {found.save_interval:.0f} s of steps; an interruption costs {found.lost:,.0f} s."
    )


def numbers(machine: Machine) -> str:
    """The machine's numbers, each with where it comes from."""
    found = machine.numbers()
    width = max(map(len, found))
    return "\n".join(
        [
            f"machine: {machine.about}; {machine.workers} worker(s) in each",
            *(f"  {key:{width}}  {number.value:<9.4g}  {number.source}" for key, number in found.items()),
        ]
    )
