"""What this machine has, and what training here would use."""

import importlib.metadata
import os
import platform
import shutil

import torch

from hrm_ray import __version__, machine
from hrm_ray.config.optimizer import OPTIMIZERS
from hrm_ray.errors import UserError
from hrm_ray.models.attention import KERNELS, obstacle, resolve_attention

# The longest sequence of the shipped Sudoku experiments; the published model's has a puzzle token besides.
TOKENS = {"4x4": 16, "6x6": 36, "9x9": 82}
PACKAGES = ("torch", "ray", "pyarrow", "numpy", "optuna", "wandb", "flash-attn")


def report() -> str:
    """A table for people; never fails for something that is missing."""
    try:
        uses = _uses("auto")
    except UserError as error:
        uses = [("problem", f"{error}; below is the CPU"), *_uses("cpu")]
    rows = [
        ("hrm-ray", __version__),
        ("python", platform.python_version()),
        *((name, _version(name)) for name in PACKAGES),
        ("CPU", f"{os.cpu_count()} cores, fast bfloat16 products: {_yes(machine.cpu_has_fast_bfloat16())}"),
        ("GPU", _gpus()),
        ("free disk here", f"{shutil.disk_usage('.').free / 2**30:.0f} GiB"),
        *uses,
    ]
    return "\n".join(line(*row) for row in rows)


def line(name: str, value: str) -> str:
    """Of a table."""
    return f"{name:20}  {value}"


def _uses(device: str) -> list[tuple[str, str]]:
    setup = machine.resolve(device=device, num_tokens=max(TOKENS.values()))
    return [
        ("attention", _attention(setup)),
        ("models compile with", machine.compiler(setup.device) or "nothing: no compiler here"),
        ("training uses", setup.describe(OPTIMIZERS.make().describe(setup.optimizer_backend, setup.device))),
    ]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed" + (" (optional)" if package == "flash-attn" else "")


def _attention(setup: machine.Setup) -> str:
    """Which kernel is used for which puzzles, and what keeps the others from running."""
    used: dict[str, list[str]] = {}
    for size, num_tokens in TOKENS.items():
        name = resolve_attention("auto", setup.device, setup.dtype, num_tokens=num_tokens, head_dim=64)
        used.setdefault(name, []).append(size)
    said = [f"{name} is used for {', '.join(sizes)}" for name, sizes in used.items()]
    for name in KERNELS:
        if name not in used:
            said.append(f"{name} {obstacle(name, setup.device, setup.dtype, head_dim=64) or 'can run'}")
    return "; ".join(said)


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{', '.join(names)} (CUDA {torch.version.cuda})"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
