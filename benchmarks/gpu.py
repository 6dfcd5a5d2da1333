"""Everything that only a GPU can tell, in one command without Ray: kernel tests, step times, a real training run.

    python -m benchmarks.gpu data=data/sudoku-4x4                 all of it, into the folder gpu-results
    python -m benchmarks.gpu data=data/sudoku-4x4 out=r only=tests,optimizer

Each part is a command of its own that may fail or take too long without ending the others; what it printed is in
OUT/PART.txt, and a line says how it ended; the exit code is 1 if one failed. The data set is made before, `hrm-ray
data build recipe=sudoku_4x4`. On a machine without a GPU the same commands run on the CPU, which shows that they work
and no more.
"""

import subprocess
import sys
import time
from pathlib import Path

from benchmarks import front
from hrm_ray.data.shards import open_dataset
from hrm_ray.errors import UserError

PUBLISHED = ("arch=hrm_v1", "local_batch_size=768")


def parts(data: str, out: Path) -> dict[str, tuple[str, ...]]:
    """Words after `python -m`, by the part's name; what matters most comes first."""
    train = (
        "hrm_ray.cli",
        "train",
        "experiment=sudoku_4x4",
        "scaling=local",
        f"data={data}",
        f"storage={out}/runs",
    )
    tests = (
        "tests/optim",
        "tests/models",
        "tests/training/test_cuda_graph.py",
        "tests/training/test_step.py",
    )
    return {
        "tests": ("pytest", "-rs", "-p", "no:cacheprovider", *tests),
        "optimizer": ("benchmarks.optimizer", "--json"),
        "step-published": ("benchmarks.step", *PUBLISHED, "--json"),
        "step-sudoku_4x4": ("benchmarks.step", "local_batch_size=256", "--json"),
        "attention": ("benchmarks.attention", "batch=768", "--json"),
        "train": (*train, "run_name=compiled"),
        "train-eager": (*train, "run_name=eager", "compile=false"),
        "train-recorded": (*train, "run_name=recorded", "cuda_graphs=true"),
    }


def measure(data: str, out: str, only: str, limit_s: int) -> dict:
    folder = Path(out)
    known = parts(str(Path(data).resolve()), folder.resolve())
    chosen = only.split(",") if only else list(known)
    for name in chosen:
        if name not in known:
            raise UserError(f"only={name}: choose from {', '.join(known)}")
        if (folder / f"{name}.txt").exists():
            raise UserError(f"out={out} holds {name} of before; pick another out")
    if any(name.startswith("train") for name in chosen):
        open_dataset(data)  # UserError before anything is measured
    folder.mkdir(parents=True, exist_ok=True)
    ends = {}
    for name in chosen:
        started = time.perf_counter()
        with (folder / f"{name}.txt").open("w") as log:
            try:
                done = subprocess.run(
                    [sys.executable, "-m", *known[name]],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    timeout=limit_s,
                )
                end = f"ended with {done.returncode}"
            except subprocess.TimeoutExpired:
                end = "took too long"
        said = (folder / f"{name}.txt").read_text().strip().splitlines()
        ends[name] = {"end": end, "seconds": round(time.perf_counter() - started, 1), "said": said[-1:]}
        print(
            f"{name}: {end} after {ends[name]['seconds']} s: {' '.join(said[-1:])}",
            file=sys.stderr,
            flush=True,
        )
    return {"benchmark": "gpu", "parts": ends}


def failures(result: dict) -> list[str]:
    return [name for name, part in result["parts"].items() if part["end"] != "ended with 0"]


def tell(result: dict) -> str:
    failed = failures(result)
    return f"on {result['gpu'] or 'no GPU'}: " + (f"failed: {', '.join(failed)}" if failed else "all ran")


def main() -> None:
    known = {"data": str, "out": "gpu-results", "only": "", "limit_s": 240}
    sys.exit(bool(failures(front.run(__doc__, measure, tell, known))))


if __name__ == "__main__":
    main()
