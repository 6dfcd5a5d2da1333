"""What this machine has, and what training here would use."""

import importlib.metadata
import os
import platform
import shutil

import torch

from hrm_ray import __version__, machine

PACKAGES = ("torch", "ray", "pyarrow", "numpy", "optuna", "wandb", "flash-attn")


def report() -> str:
    """A table for people; never fails for something that is missing."""
    rows = [
        ("hrm-ray", __version__),
        ("python", platform.python_version()),
        *((name, _version(name)) for name in PACKAGES),
        ("CPU", f"{os.cpu_count()} cores, fast bfloat16 products: {_yes(machine.cpu_has_fast_bfloat16())}"),
        ("GPU", _gpus()),
        ("free disk here", f"{shutil.disk_usage('.').free / 2**30:.0f} GiB"),
        ("models compile with", machine.compiler(machine.resolve().device) or "nothing: no compiler here"),
        ("training uses", machine.resolve(num_tokens=81).describe()),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed" + (" (optional)" if package == "flash-attn" else "")


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{', '.join(names)} (CUDA {torch.version.cuda})"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
