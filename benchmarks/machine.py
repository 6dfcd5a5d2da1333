"""Facts about the machine and the code that every benchmark's JSON carries, and the rate of its products."""

import os
import platform
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import hrm_ray

# Dense bfloat16 TFLOP/s by the makers' data sheets, of whole GPUs: others of a family, and slices, have less.
PEAK_TFLOPS = {
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H200": 989,
    "NVIDIA B200": 2250,
}


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def facts() -> dict[str, Any]:
    """Commit (with "-dirty" if files differ from it), versions, hardware; load at the time of the call."""
    return {
        "commit": _commit(),
        "hrm_ray": hrm_ray.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average": os.getloadavg()[0],
    }


def _commit() -> str | None:
    """None where git does not know."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    with suppress(OSError):
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
        return done.stdout.strip() or None
    return None


def a_product(dtype: torch.dtype) -> tuple[Callable[[], object], int]:
    """Matrix products of a model's layer, [rows, 512] x [512, 3072]: what a step can reach at best.

    4,096 rows on a CPU; on a GPU as many as the tokens of 768 puzzles, which fewer would not fill, and ten times over,
    which hides the launching.

    Returns:
        what does them, and its number of operations.
    """
    device, rows, times = ("cuda", 768 * 82, 10) if torch.cuda.is_available() else ("cpu", 4096, 1)
    a = torch.randn(rows, 512, device=device, dtype=dtype)
    b = torch.randn(512, 3072, device=device, dtype=dtype)

    def multiply() -> None:
        for _ in range(times):
            torch.mm(a, b)

    return multiply, times * 2 * rows * 512 * 3072


def peak_tflops(dtype: torch.dtype) -> float | None:
    """Of the GPU by its data sheet; None: not a known one, or not bfloat16."""
    if dtype != torch.bfloat16 or not torch.cuda.is_available():
        return None
    return PEAK_TFLOPS.get(torch.cuda.get_device_name())
