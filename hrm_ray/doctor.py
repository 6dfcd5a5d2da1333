"""What this machine has, and what training here would use."""

import importlib.metadata
import os
import platform
import shutil

import torch

from hrm_ray import __version__, machine
from hrm_ray.errors import UserError
from hrm_ray.models.attention import KERNELS, obstacle

# The longest sequence of the shipped Sudoku experiments; the published model's has a puzzle token besides.
TOKENS = {"4x4": 16, "6x6": 36, "9x9": 82}
PACKAGES = ("torch", "ray", "pyarrow", "numpy", "optuna", "wandb", "flash-attn")


def report() -> str:
    """A table for people; never fails for something that is missing."""
    problem = None
    try:
        setup = machine.resolve(num_tokens=TOKENS["9x9"])
    except UserError as error:
        setup, problem = machine.resolve(num_tokens=TOKENS["9x9"], device="cpu"), str(error)
    rows = [
        ("hrm-ray", __version__),
        ("python", platform.python_version()),
        *((name, _version(name)) for name in PACKAGES),
        ("CPU", f"{os.cpu_count()} cores, fast bfloat16 products: {_yes(machine.cpu_has_fast_bfloat16())}"),
        ("GPU", _gpus()),
        ("free disk here", f"{shutil.disk_usage('.').free / 2**30:.0f} GiB"),
        ("attention", _attention(setup)),
        ("models compile with", machine.compiler(setup.device) or "nothing: no compiler here"),
        ("training uses", f"nothing: {problem}; on the CPU" if problem else setup.describe()),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed" + (" (optional)" if package == "flash-attn" else "")


def _attention(setup: machine.Setup) -> str:
    """Which kernel is used for which puzzles, and what keeps the others from running."""
    used: dict[str, list[str]] = {}
    for size, num_tokens in TOKENS.items():
        device = str(setup.device.type)
        used.setdefault(machine.resolve(device=device, num_tokens=num_tokens).attention, []).append(size)
    said = [f"{name} is used for {', '.join(sizes)}" for name, sizes in used.items()]
    said += [f"{name} {_why_not(name, setup)}" for name in KERNELS if name not in used]
    return "; ".join(said)


def _why_not(name: str, setup: machine.Setup) -> str:
    """For which puzzles a kernel that is not used could be."""
    problems = {
        size: obstacle(name, setup.device, setup.dtype, num_tokens=num_tokens, head_dim=64)
        for size, num_tokens in TOKENS.items()
    }
    can = [size for size, problem in problems.items() if problem is None]
    if not can:
        return str(problems["4x4"])
    return "can run" if len(can) == len(problems) else f"can run for {', '.join(can)}"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{', '.join(names)} (CUDA {torch.version.cuda})"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
