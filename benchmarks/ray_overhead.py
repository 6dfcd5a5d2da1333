"""Does Ray Train cost anything per step? One worker against the bare loop, in turns, same threads.

    python -m benchmarks.ray_overhead --json

Each round trains the quickstart's model for a while in this process and then in a Ray Train worker; the ratio of
the medians of the reported `time/step_s` is the overhead. Turns, because machines are shared and noisy.
"""

import json
import os
import statistics
import tempfile
from pathlib import Path

import torch

from benchmarks import front
from hrm_ray.config.compose import train_config
from hrm_ray.config.schema import TrainConfig
from hrm_ray.data.pipeline import build
from hrm_ray.data.recipe import load_recipe
from hrm_ray.ray_session import ray_session
from hrm_ray.training import launch


def step_times(config: TrainConfig) -> list[float]:
    """Seconds a step of every report after the warm-up, in a new run."""
    launch.train(config, show_progress=False)
    lines = (Path(config.storage) / str(config.run_name) / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [
        r["time/step_s"] for r in records if "time/step_s" in r and r["global_step"] > front.WARM_UP_STEPS
    ]


def measure(rounds: int, steps: int) -> dict:
    front.need_steps(steps)
    cpus = os.cpu_count() or 1
    torch.set_num_threads(cpus)
    times: dict[str, list[float]] = {"local": [], "ray": []}
    with tempfile.TemporaryDirectory() as folder, ray_session():
        build(load_recipe("sudoku_4x4", {"num_train": 2000}), f"{folder}/data", show_progress=False)
        for i in range(rounds):
            for mode in ("local", "ray") if i % 2 else ("ray", "local"):
                words = [
                    "experiment=sudoku_4x4",
                    f"data={folder}/data",
                    f"storage={folder}/runs",
                    "log_interval=5",
                ]
                words += [
                    f"scaling={mode}",
                    "scaling.num_workers=1",
                    f"run_name={mode}{i}",
                    f"max_steps={steps}",
                ]
                words += ["tensorboard=false", "epochs=100", "eval_interval=null"]
                times[mode] += step_times(train_config(words))
    medians = {mode: statistics.median(values) for mode, values in times.items()}
    quartiles = {mode: statistics.quantiles(values, n=4)[::2] for mode, values in times.items()}
    return {
        "benchmark": "ray_overhead",
        "ms_per_step": {mode: round(value * 1e3, 2) for mode, value in medians.items()},
        "ms_quartiles": {mode: [round(q * 1e3, 2) for q in qs] for mode, qs in quartiles.items()},
        "ray_over_local": round(medians["ray"] / medians["local"], 4),
        "rounds": rounds,
        "steps": steps,
        "threads": cpus,
    }


def tell(result: dict) -> str:
    ms = result["ms_per_step"]
    return f"bare loop {ms['local']} ms, Ray Train {ms['ray']} ms a step: {result['ray_over_local'] - 1:+.1%}"


def main() -> None:
    front.run(__doc__, measure, tell, {"rounds": 4, "steps": 60})


if __name__ == "__main__":
    main()
