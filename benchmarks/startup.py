"""Seconds from a command to what one waits for: help, and the begin of training, without Ray and in two Ray workers.

The whole command takes one step, writes a checkpoint and evaluates one puzzle.

python -m benchmarks.startup --json
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import front
from hrm_ray.data.pipeline import build
from hrm_ray.data.recipe import load_recipe
from hrm_ray.ray_session import ray_session


def timed(*words: str) -> tuple[float, float]:
    """Run `hrm-ray` with `words`; when it began and ended, in seconds since the epoch."""
    started = time.time()
    subprocess.run([sys.executable, "-m", "hrm_ray.cli", *words], check=True, capture_output=True)
    return started, time.time()


def one_step(folder: str, mode: str, name: str) -> dict[str, float]:
    """Seconds to the begin of training in a new run, and to the end of the command after one step."""
    words = ["experiment=sudoku_4x4", f"data={folder}/data", f"storage={folder}/runs", f"run_name={name}"]
    words += [f"scaling={mode}", "max_steps=1", "num_eval_examples=1", "tensorboard=false"]
    started, ended = timed("train", *words)
    events = [json.loads(line) for line in (Path(folder) / "runs" / name / "events.jsonl").open()]
    begun = next(event["time"] for event in events if event["event"] == "started")
    return {f"{mode}: training begins": begun - started, f"{mode}: whole command": ended - started}


def measure(rounds: int) -> dict:
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        with ray_session():
            build(load_recipe("sudoku_4x4", {"num_train": 2000}), f"{folder}/data", show_progress=False)
        for i in range(rounds + 1):
            started, ended = timed("--help")
            seconds = {"help": ended - started}
            for mode in ("local", "ray"):
                seconds |= one_step(folder, mode, f"{mode}{i}")
            if i:  # the first fills the caches of files
                for what, value in seconds.items():
                    times.setdefault(what, []).append(value)
    return {
        "benchmark": "startup",
        "seconds": {what: round(statistics.median(values), 2) for what, values in times.items()},
        "slowest": {what: round(max(values), 2) for what, values in times.items()},
        "rounds": rounds,
    }


def tell(result: dict) -> str:
    return "\n".join(f"{what:22} {seconds:6.2f} s" for what, seconds in result["seconds"].items())


def main() -> None:
    front.run(__doc__, measure, tell, {"rounds": 3})


if __name__ == "__main__":
    main()
