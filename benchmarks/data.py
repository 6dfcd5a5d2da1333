"""How fast puzzles are augmented, and what building the published 1,000 x 1,001 set takes.

    python -m benchmarks.data --json                                    augmentation alone
    python -m benchmarks.data source=FOLDER --json                      and builds from FOLDER/{train,test}.csv
    python -m benchmarks.data repeats=9                                 of the augmentation; builds: half as many

Augmentation: one core, no input or output; a puzzle is a question with its answer. The build is the command
`hrm-ray data build recipe=sudoku_9x9` in a process of its own, from the start of Python to verified shards, Ray's
start and end included. Its memory is sampled over all processes it starts: `pss` counts a page that several share
once, so it is what the machine gives; `rss`, which counts such pages once a process, says more than is used.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil

from benchmarks import front
from hrm_ray.data.tasks.sudoku import Sudoku
from hrm_ray.errors import UserError

NUM_PUZZLES, NUM_AUG = 200, 1000
SAMPLE_EVERY_S = 0.2

_BUILD = """
import sys
from hrm_ray.data.pipeline import build
from hrm_ray.data.recipe import load_recipe
build(load_recipe("sudoku_9x9", {"source": sys.argv[1]}), sys.argv[2], overwrite=True, show_progress=False)
"""


def augmentation(repeats: int) -> dict:
    """Augmented puzzles a second, of 9x9, compiled beforehand."""
    task = Sudoku(9)
    questions, answers = task.generate(0, 0, NUM_PUZZLES, 28, 1000)
    groups = np.arange(NUM_PUZZLES)
    task.augment(questions, answers, groups, 1, 0)
    rates = []
    for seed in range(repeats):
        started = time.process_time()
        task.augment(questions, answers, groups, NUM_AUG, seed)
        rates.append(NUM_PUZZLES * NUM_AUG / (time.process_time() - started))
    return {"puzzles_per_s": statistics.median(rates), "slowest": min(rates), "fastest": max(rates)}


def building(source: str, repeats: int) -> dict:
    """Seconds and peak memory of whole builds; the first, which may have to compile, is a warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        runs = [
            _watched([sys.executable, "-c", _BUILD, source, f"{folder}/data"]) for _ in range(repeats + 1)
        ]
    cold, *warm = runs
    return {
        "num_train": 1000 * 1001,
        "wall_s": statistics.median(run["wall_s"] for run in warm),
        "wall_s_all": [run["wall_s"] for run in warm],
        "wall_s_first": cold["wall_s"],
        **{
            key: max(run[key] for run in runs) for key in ("peak_pss_mb", "peak_rss_mb", "peak_rss_driver_mb")
        },
    }


def _watched(command: list[str]) -> dict:
    """Run a command; its wall time and the peaks of its processes' summed memory."""
    peaks: Counter[str] = Counter()
    started = time.perf_counter()
    process = subprocess.Popen(command)
    tree = psutil.Process(process.pid)
    while process.poll() is None:
        now: Counter[str] = Counter()
        for member in [tree, *tree.children(recursive=True)] if tree.is_running() else []:
            try:
                memory = member.memory_full_info()
            except psutil.Error:  # it has just ended
                continue
            now["peak_pss_mb"] += memory.pss / 1e6
            now["peak_rss_mb"] += memory.rss / 1e6
            if member == tree:
                now["peak_rss_driver_mb"] += memory.rss / 1e6
        peaks |= now  # the larger of each
        time.sleep(SAMPLE_EVERY_S)
    if process.returncode:
        raise UserError(f"the build failed with exit code {process.returncode}")
    return {"wall_s": time.perf_counter() - started, **peaks}


def measure(source: str, repeats: int) -> dict:
    for name in ("train.csv", "test.csv"):
        if source and not (Path(source) / name).exists():
            raise UserError(f"source={source}: there is no {name} in it")
    result = {"benchmark": "data", "augmentation_9x9": augmentation(repeats)}
    if source:
        result["build_1000x1001"] = building(source, max(1, repeats // 2))
    return result


def tell(result: dict) -> str:
    parts = [name for name in ("augmentation_9x9", "build_1000x1001") if name in result]
    return "\n".join(
        "\n".join([name, *(f"  {key}: {value}" for key, value in result[name].items())]) for name in parts
    )


def main() -> None:
    front.run(__doc__, measure, tell, {"source": "", "repeats": 5})


if __name__ == "__main__":
    main()
