"""Facts about the machine and the code that every benchmark's JSON carries, and the rate of its products."""

import os
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import hrm_ray


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
    """Operations a second of a matrix product [4096, 512] x [512, 3072]: what a model's layers can reach at best."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(4096, 512, device=device, dtype=dtype)
    b = torch.randn(512, 3072, device=device, dtype=dtype)
    times = []
    for _ in range(rounds + 2):
        started = time.perf_counter()
        torch.mm(a, b)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 2 * 4096 * 512 * 3072 / statistics.median(times[2:])
