"""What this machine has, and what training here would use."""

import importlib.metadata
import os
import platform
import shutil

import torch

from hrm_ray import __version__, machine
from hrm_ray.models.attention import KERNELS, obstacle

PACKAGES = ("torch", "ray", "pyarrow", "numpy", "optuna", "wandb", "flash-attn")


def report() -> str:
    """A table for people; never fails for something that is missing."""
    setup = machine.resolve(num_tokens=81)
    rows = [
        ("hrm-ray", __version__),
        ("python", platform.python_version()),
        *((name, _version(name)) for name in PACKAGES),
        ("CPU", f"{os.cpu_count()} cores, fast bfloat16 products: {_yes(machine.cpu_has_fast_bfloat16())}"),
        ("GPU", _gpus()),
        ("free disk here", f"{shutil.disk_usage('.').free / 2**30:.0f} GiB"),
        ("attention", _attention(setup)),
        ("models compile with", machine.compiler(setup.device) or "nothing: no compiler here"),
        ("training uses", setup.describe()),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed" + (" (optional)" if package == "flash-attn" else "")


def _attention(setup: machine.Setup) -> str:
    """Every kernel, and what keeps it from running; first the one that is used for 9x9 puzzles."""
    others = [name for name in KERNELS if name != setup.attention]
    problems = {name: obstacle(name, setup.device, setup.dtype, 64) for name in others}
    said = [f"{name} {problem}" if problem else f"{name} can run" for name, problem in problems.items()]
    return f"{setup.attention} is used; {', '.join(said)}"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{', '.join(names)} (CUDA {torch.version.cuda})"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
