"""CUDA kernels that need no compiler at install time: NVRTC, which comes with torch's CUDA packages, compiles them.

NVRTC is reached through NVIDIA's own Python bindings, which torch's CUDA packages bring too. Compiled code is kept in
`cache_dir()`, one file for each source, set of options (the architecture is one) and version of NVRTC.
"""

import ctypes
import hashlib
import os
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from hrm_ray.cache import cache_dir
from hrm_ray.errors import UserError, first_line

OLDEST = (7, 5)  # compute capability: what NVRTC of CUDA 13 still compiles for
SOURCE = Path(__file__).with_name("kernels.cu")
DIGEST_SIZE = hashlib.sha256().digest_size


class KernelError(Exception):
    """A kernel that cannot be had here; says why."""


def _nvrtc() -> Any:
    """NVIDIA's bindings of NVRTC."""
    packages = "torch's CUDA packages bring cuda-bindings and nvidia-cuda-nvrtc"
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        raise KernelError(f"NVRTC cannot be used ({first_line(error)}); {packages}") from None
    return nvrtc


def _checked(result: tuple[Any, ...]) -> Any:
    """The value of a call of the bindings; KernelError if it failed."""
    status, *values = result
    if status.value:
        raise KernelError(f"CUDA said {status.name}")
    return values[0] if values else None


def _options(arch: str, defines: Sequence[str]) -> list[bytes]:
    options = [f"--gpu-architecture={arch}", "--std=c++17", *(f"-D{define}" for define in defines)]
    return [option.encode() for option in options]


def compile_source(source: str, arch: str, defines: Sequence[str] = ()) -> bytes:
    """Machine code for `arch` ("sm_90"). Needs no GPU.

    Raises:
        KernelError: NVRTC is missing, or does not compile it; with the first line of what it says.
    """
    nvrtc, options = _nvrtc(), _options(arch, defines)
    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), b"kernels.cu", 0, None, None))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if status.value:
            log = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
            nvrtc.nvrtcGetProgramLog(program, log)
            said = log.decode(errors="replace").strip("\0\n").splitlines()
            raise KernelError(f"NVRTC does not compile for {arch}: {said[0] if said else status.name}")
        code = bytearray(_checked(nvrtc.nvrtcGetCUBINSize(program)))
        _checked(nvrtc.nvrtcGetCUBIN(program, code))
        return bytes(code)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def cached_code(source: str, arch: str, defines: Sequence[str] = ()) -> bytes:
    """`compile_source`, or what it returned at an earlier start.

    A file begins with the SHA-256 of the code, and is compiled again if it is damaged. A folder that cannot be written
    costs the compilation at every start, and one warning.
    """
    version = [int(number) for number in _nvrtc().nvrtcVersion()[1:]]
    key = hashlib.sha256(repr((source, _options(arch, defines), version)).encode()).hexdigest()[:32]
    with suppress(OSError, UserError):
        content = _path(key).read_bytes()
        digest, code = content[:DIGEST_SIZE], content[DIGEST_SIZE:]
        if hashlib.sha256(code).digest() == digest:
            return code
    code = compile_source(source, arch, defines)
    try:
        _write(_path(key), hashlib.sha256(code).digest() + code)
    except (OSError, UserError) as error:
        warnings.warn(f"kernels will be compiled again at every start: {error}", stacklevel=2)
    return code


def _path(key: str) -> Path:
    return cache_dir() / "kernels" / f"{key}.cubin"


def _write(path: Path, content: bytes) -> None:
    """Write the file atomically, even if other processes write it too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as aside:
            aside.write(content)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


class Kernel:
    """A function of a loaded module on one GPU."""

    def __init__(self, driver: Any, function: Any, device: torch.device):
        self._driver, self._function, self._device = driver, function, device

    def launch(self, grid: tuple[int, int], num_threads: int, *arguments: Any) -> None:
        """Put it on torch's current stream of its GPU.

        Args:
            grid: blocks in x and y.
            num_threads: of each block.
            arguments: ctypes values, in the kernel's order.
        """
        addresses = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        with torch.cuda.device(self._device):
            result = self._driver.cuLaunchKernel(
                self._function,
                *(*grid, 1),
                *(num_threads, 1, 1),
                0,
                torch.cuda.current_stream().cuda_stream,
                ctypes.addressof(addresses),
                0,
            )
        _checked(result)


@lru_cache
def kernel(name: str, device: torch.device, max_tensors: int) -> Kernel:
    """The kernel `name` of kernels.cu on a GPU, compiled if it never was.

    Raises:
        KernelError: it cannot be had; says why.
    """
    driver, module = _module(device, max_tensors)
    return Kernel(driver, _checked(driver.cuModuleGetFunction(module, name.encode())), device)


@lru_cache
def _module(device: torch.device, max_tensors: int) -> tuple[Any, Any]:
    """NVIDIA's bindings of the driver, and kernels.cu loaded on a GPU, for the life of this process."""
    if torch.version.hip:
        raise KernelError("this is a ROCm build of torch")
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < OLDEST:
        raise KernelError(f"{torch.cuda.get_device_name(device)} is older than compute capability 7.5")
    code = cached_code(SOURCE.read_text(), f"sm_{major}{minor}", [f"MAX_TENSORS={max_tensors}"])
    from cuda.bindings import driver

    with torch.cuda.device(device):
        torch.zeros(1, device=device)  # its launch makes this thread's context, into which modules are loaded
        return driver, _checked(driver.cuModuleLoadData(code))
