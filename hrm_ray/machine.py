"""The one place that decides what the machine at hand is used for: device, dtype, attention, optimizer backend.

Every choice is `auto` by default and can be overridden; an override that cannot work here is a clear error, never
a silent change. Needs torch alone.
"""

import importlib.util
import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from hrm_ray.errors import TransientError, UserError, first_line
from hrm_ray.memory import is_out_of_memory
from hrm_ray.models.attention import resolve_attention
from hrm_ray.optim.adam_atan2 import resolve_backend

# Work of a run, in operations by the rule of `compiles`, from which on compiling pays on a CPU: it takes up to a minute
# and then saves a sixth of the time, less where products are nearly all of it; this is four to eight minutes on two
# newer cores, up to fourteen on two older ones (docs/performance.md).
COMPILE_MIN_OPERATIONS = 3e13


@dataclass(frozen=True)
class Setup:
    """What will be used; every field resolved but `optimizer_backend`, which may be "auto"."""

    device: torch.device
    dtype: torch.dtype
    attention: str
    optimizer_backend: str
    compile: bool = False
    cuda_graphs: bool = False

    def describe(self, optimizer: str) -> str:
        """In a line for a person, with what `OptimizerConfig.describe` says."""
        dtype = str(self.dtype).removeprefix("torch.")
        compiled = ", compiled" if self.compile else ""
        recorded = ", CUDA graphs" if self.cuda_graphs else ""
        return f"{self.device}, {dtype}, attention {self.attention}, {optimizer}{compiled}{recorded}"


def cpu_has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32: by AMX, or by AVX-512 BF16 unless it is Intel's.

    Intel's runs at half the rate of float32, which shows where a virtual machine hides AMX (docs/performance.md).
    """
    cpu = torch.cpu.get_capabilities()
    is_intel = "Intel" in cpu.get("cpu_name", "")
    return cpu.get("amx_bf16", False) or (cpu.get("avx512_bf16", False) and not is_intel)


def compiler(device: torch.device) -> str | None:
    """What compiles models for `device`: the C++ compiler's name on a CPU, "triton" on a GPU; None: there is none."""
    if device.type == "cuda":
        return "triton" if importlib.util.find_spec("triton") else None
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        return get_cpp_compiler()
    except Exception:  # none, or one that cannot be started, or another torch that has no such function
        return None


def compiles(
    wanted: bool | Literal["auto"], device: torch.device, *, num_params: int, num_tokens: float
) -> bool:
    """Whether a run's model is to be compiled. A function of the run, not of its speed, so that it is resumed alike.

    Args:
        wanted: the configuration's `compile`.
        num_params, num_tokens: of the model, and those that it will be trained on; 6 operations for each pair.
    """
    if wanted != "auto":
        return wanted
    is_long = device.type != "cpu" or 6 * num_params * num_tokens >= COMPILE_MIN_OPERATIONS
    return is_long and compiler(device) is not None


def _place(device: str, local_rank: int) -> torch.device:
    """This worker's device; a GPU that does not work is left alone with a warning, if `device` is "auto".

    Raises:
        TransientError: the GPU has no free memory, also for "auto": a run on the CPU is not the one that was asked for.
        UserError: "cuda", and there is none that works.
    """
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            "device=cuda: torch sees no GPU here; use device=auto or install a CUDA build of torch"
        )
    place = torch.device("cuda", local_rank % torch.cuda.device_count())
    problem = _gpu_problem(place)
    if problem is None:
        return place
    if device == "cuda":
        raise UserError(f"device=cuda: {problem}; use device=cpu or another build of torch")
    warnings.warn(f"training on the CPU instead: {problem}", stacklevel=3)
    return torch.device("cpu")


@lru_cache
def _gpu_problem(place: torch.device) -> str | None:
    """Why a GPU cannot compute; None if it can. Such as one that is too old, for which this torch has no kernels.

    Raises:
        TransientError: it has no free memory.
    """
    try:
        torch.ones(1, device=place).add_(1).item()
    except (RuntimeError, AssertionError) as error:
        name = torch.cuda.get_device_name(place)
        if is_out_of_memory(error):
            raise TransientError(
                f"{place}, {name}, has no free memory ({first_line(error)}); wait until other programs release it, "
                "hide this GPU with CUDA_VISIBLE_DEVICES, or use device=cpu"
            ) from error
        return f"{name} does not work with torch {torch.__version__}: {first_line(error)}"
    return None


def resolve(
    *,
    device: str = "auto",
    forward_dtype: str = "auto",
    attention: str = "auto",
    optimizer_backend: str = "auto",
    num_tokens: int = 0,
    head_dim: int = 64,
    cuda_graphs: bool = False,
    local_rank: int = 0,
) -> Setup:
    """Decide. The arguments are the configuration keys of the same names.

    Args:
        num_tokens: longest sequence, puzzle tokens included.
        head_dim: width of a head of attention.
        cuda_graphs: whether they are wanted; whether they work is known only when the steps are recorded.
        local_rank: this worker's number on its node; picks its GPU.

    Raises:
        UserError: a device or kernel that is not here, or that cannot run here.
        TransientError: a GPU that another process has filled.
    """
    place = _place(device, local_rank)
    on_gpu = place.type == "cuda"
    if cuda_graphs and not on_gpu:
        raise UserError("cuda_graphs=true needs a GPU, and this runs on the CPU; leave it out")
    if forward_dtype == "auto":
        fast = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else cpu_has_fast_bfloat16()
        forward_dtype = "bfloat16" if fast else "float32"
    dtype = getattr(torch, forward_dtype)
    if optimizer_backend != "auto":
        resolve_backend(optimizer_backend, place)
    return Setup(
        device=place,
        dtype=dtype,
        attention=resolve_attention(attention, place, dtype, num_tokens=num_tokens, head_dim=head_dim),
        optimizer_backend=optimizer_backend,
    )


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; to a GPU from pinned memory, so that nobody waits for the copy."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
