"""Thinking along 16 paths, against 16 times along one: the time a path, by how puzzles end.

    python -m benchmarks.paths checkpoint=runs/sudoku_4x4 data=data/sudoku-4x4
    python -m benchmarks.paths checkpoint=runs/sudoku_4x4 data=data/sudoku-4x4 puzzles=1 paths=100 --json

One path and many take turns in this process; medians, and the ratio of a path of many to one path alone, which takes
all its ACT steps. Reading the puzzles is no part of it.
"""

import statistics

import numpy as np
import torch

import hrm_ray
from benchmarks import clock, front
from hrm_ray import memory
from hrm_ray.batch import make_batch
from hrm_ray.config.inference import Inference
from hrm_ray.data.shards import open_dataset
from hrm_ray.evaluation.evaluate import thinker_of

NOISE = 0.3
WAYS = {  # how many paths end
    "all steps": {},
    "halt=learned": {"halt": "learned"},
    "select=first_halt": {"select": "first_halt"},
    "select=valid": {"select": "valid"},
}


def measure(checkpoint: str, data: str, puzzles: int, paths: int, batch: int, rounds: int) -> dict:
    solver = hrm_ray.load(checkpoint)
    if solver.setup.device.type == "cpu":
        memory.keep_memory()
    dataset = open_dataset(data)
    ids = np.arange(min(puzzles, dataset.split("test").num_examples))
    asked = make_batch(dataset.split("test"), ids, dataset.manifest.ignore_label_id).to(solver.setup.device)

    def thinking(**use: object) -> object:
        thinker = thinker_of(
            solver.model, solver.task, Inference(noise=NOISE, **use), rows_at_once=batch, with_logits=False
        )
        return lambda: thinker.think(asked).last.tokens.cpu()

    calls = {"one path": thinking()} | {name: thinking(paths=paths, **use) for name, use in WAYS.items()}
    if not solver.task.checkable:
        del calls["select=valid"]
    times = clock.in_turns(calls, rounds)
    one = times.pop("one path")
    return {
        "benchmark": "paths",
        "puzzles": len(ids),
        "paths": paths,
        "batch": batch,
        "one_path_ms": round(statistics.median(one) * 1e3, 2),
        "ms": {name: round(statistics.median(values) * 1e3, 2) for name, values in times.items()},
        "of_one_path": {
            name: round(statistics.median(m / (paths * o) for m, o in zip(values, one, strict=True)), 3)
            for name, values in times.items()
        },
        "threads": torch.get_num_threads(),
        "setup": solver.setup.describe(),
        "rounds": rounds,
    }


def tell(result: dict) -> str:
    lines = [f"{result['puzzles']} puzzles along one path: {result['one_path_ms']} ms"]
    for name, ratio in result["of_one_path"].items():
        lines.append(
            f"along {result['paths']}, {name:18} {result['ms'][name]:10} ms, a path {ratio} of one alone"
        )
    return "\n".join(lines)


def main() -> None:
    numbers = {"puzzles": 16, "paths": 16, "batch": 256, "rounds": 9, "threads": front.THREADS}
    front.run(__doc__, measure, tell, {"checkpoint": str, "data": str, **numbers})


if __name__ == "__main__":
    main()
