"""Facts about the machine and the code that every benchmark's JSON carries, and the rate of its products."""

import os
import platform
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import torch

import hrm_ray
from benchmarks.clock import in_turns, medians_ms

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
    """Commit, versions, hardware, load at the start."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    return {
        "commit": commit,
        "hrm_ray": hrm_ray.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average": os.getloadavg()[0],
    }


def product_rate(dtype: torch.dtype, rounds: int = 10) -> float:
    """Operations a second of a matrix product of a model's layer, [rows, 512] x [512, 3072]: what it can reach at best.

    4,096 rows on a CPU, as many as the tokens of 768 puzzles on a GPU, which fewer would not fill.
    """
    device, rows = ("cuda", 768 * 82) if torch.cuda.is_available() else ("cpu", 4096)
    a = torch.randn(rows, 512, device=device, dtype=dtype)
    b = torch.randn(512, 3072, device=device, dtype=dtype)
    ms = medians_ms(in_turns({"product": partial(torch.mm, a, b)}, rounds, kernels_only=True))
    return 2 * rows * 512 * 3072 / ms["product"] * 1e3


def peak_tflops(dtype: torch.dtype) -> float | None:
    """Of the GPU by its data sheet; None: not a known one, or not bfloat16."""
    if dtype != torch.bfloat16 or not torch.cuda.is_available():
        return None
    return PEAK_TFLOPS.get(torch.cuda.get_device_name())
