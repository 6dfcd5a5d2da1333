"""What `hrm-ray vote` takes in time and memory when no two answers are alike, which is the most there can be to keep.

    python -m benchmarks.votes --json
    python -m benchmarks.votes tasks=120 copies=1000

Every task has one test pair of 30x30 cells and so many augmented copies; each row answers with a grid of its own. The
command runs in a process of its own, on one core: from the start of Python to pass@k and the submission.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import front
from hrm_ray.data.tasks.arc import FIRST_COLOUR, NUM_COLOURS, SIDE, Plan, format_name, place
from hrm_ray.errors import UserError


def make_files(folder: Path, num_tasks: int, num_copies: int) -> None:
    """A data set's two files, and the outputs."""
    rng = np.random.default_rng(0)
    names, puzzles = ["<blank>"], {}
    inputs = np.empty((num_tasks * num_copies, SIDE * SIDE), np.uint8)
    for task in range(num_tasks):
        question, answer = rng.integers(0, NUM_COLOURS, (2, SIDE, SIDE), np.uint8)
        puzzles[str(task)] = {"train": [], "test": [{"input": question.tolist(), "output": answer.tolist()}]}
        for copy in range(num_copies):
            plan = Plan(int(rng.integers(8)), (0, *(1 + rng.permutation(NUM_COLOURS - 1)).tolist()))
            inputs[len(names) - 1] = place(plan.apply(question) if copy else question)
            names.append(format_name(str(task), plan if copy else None))
    (folder / "identifiers.json").write_text(json.dumps(names))
    (folder / "test_puzzles.json").write_text(json.dumps(puzzles))
    np.savez(
        folder / "outputs.npz",
        inputs=inputs,
        preds=rng.integers(FIRST_COLOUR, FIRST_COLOUR + NUM_COLOURS, inputs.shape, np.uint8),
        puzzle_identifiers=np.arange(1, len(names), dtype=np.int32),
        q_halt_logits=rng.standard_normal(len(inputs), np.float32),
    )


def measure(tasks: int, copies: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own: what this one had held would count as the peak of those that it starts.
        making = multiprocessing.get_context("fork").Process(
            target=make_files, args=(Path(folder), tasks, copies)
        )
        making.start()
        making.join()
        words = [f"{folder}/outputs.npz", f"data={folder}", f"submission={folder}/submission.json", "--json"]
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "hrm_ray", "vote", *words],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
        )
        _, status, used = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - started
        if status:
            raise UserError(f"vote failed with exit code {os.waitstatus_to_exitcode(status)}")
    return {
        "benchmark": "votes",
        "tasks": tasks,
        "copies": copies,
        "rows": tasks * copies,
        "wall_s": round(wall_s, 2),
        "cpu_s": round(used.ru_utime + used.ru_stime, 2),
        "peak_rss_mb": round(used.ru_maxrss * 1024 / 1e6),
    }


def tell(result: dict) -> str:
    return "{rows:,} rows: {wall_s} s ({cpu_s} s of a core), at most {peak_rss_mb:,} MB".format(**result)


def main() -> None:
    front.run(__doc__, measure, tell, {"tasks": 400, "copies": 1000})


if __name__ == "__main__":
    main()
