"""Puzzles a second when a trained model is used: with all ACT steps, and when each puzzle stops by its own Q head.

    python -m benchmarks.evaluation checkpoint=runs/sudoku_4x4 data=data/sudoku-4x4 --json
    python -m benchmarks.evaluation checkpoint=runs/sudoku_4x4 data=data/sudoku-4x4 batch=64 votes=9 threads=1

In turns in this process; medians. Reading the puzzles is part of it, loading the checkpoint is not. Memory is kept on a
CPU, as by the commands; not with `keep_memory=false`.
"""

import statistics
import time

import torch

import hrm_ray
from benchmarks import front
from hrm_ray import memory
from hrm_ray.data.shards import open_dataset


def measure(checkpoint: str, data: str, batch: int, votes: int, rounds: int, keep_memory: bool) -> dict:
    solver = hrm_ray.load(checkpoint)
    is_kept = keep_memory and solver.setup.device.type == "cpu" and memory.keep_memory()
    rates: dict[str, list[float]] = {"max": [], "learned": []}
    metrics = {}
    for i in range(rounds + 1):
        for halt in rates:
            started = time.perf_counter()
            metrics[halt], _ = solver.evaluate(data, halt=halt, votes=votes, batch_size=batch)
            if i:  # the first is to warm up
                rates[halt].append(time.perf_counter() - started)
    num_puzzles = open_dataset(data).split("test").num_examples
    return {
        "benchmark": "evaluation",
        "num_puzzles": num_puzzles,
        "puzzles_per_s": {
            halt: round(num_puzzles / statistics.median(values)) for halt, values in rates.items()
        },
        "exact_accuracy": {halt: values["exact_accuracy"] for halt, values in metrics.items()},
        "mean_steps": {halt: values["steps"] for halt, values in metrics.items()},
        "batch": batch,
        "votes": votes,
        "threads": torch.get_num_threads(),
        "keep_memory": is_kept,
        "setup": solver.setup.describe(),
        "rounds": rounds,
    }


def tell(result: dict) -> str:
    lines = []
    for halt, rate in result["puzzles_per_s"].items():
        exact, steps = result["exact_accuracy"][halt], result["mean_steps"][halt]
        lines.append(
            f"halt={halt:8} {rate:8,} puzzles a second, {exact:.1%} exact, {steps:.2f} ACT steps each"
        )
    return "\n".join(lines)


def main() -> None:
    numbers = {"batch": 256, "votes": 1, "rounds": 5, "threads": front.THREADS}
    known = {"checkpoint": str, "data": str, **numbers, "keep_memory": True}
    front.run(__doc__, measure, tell, known)


if __name__ == "__main__":
    main()
