"""CUDA kernels that need no compiler at install time: NVRTC, which comes with torch's CUDA packages, compiles them.

NVRTC is reached through NVIDIA's own Python bindings, which torch's CUDA packages bring too. Compiled code is kept in
`cache_dir()`, one file for each source, architecture, set of options and version of NVRTC.
"""

import ctypes
import hashlib
import tempfile
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from hrm_ray.cache import cache_dir

OLDEST = (7, 5)  # compute capability: what NVRTC of CUDA 13 still compiles for
SOURCE = Path(__file__).with_name("kernels.cu")


class KernelError(Exception):
    """A kernel that cannot be had here; says why."""


def _nvrtc() -> Any:
    """NVIDIA's bindings of NVRTC."""
    try:
        from cuda.bindings import nvrtc
    except ImportError:
        raise KernelError(
            "the package cuda-bindings is not installed; it comes with torch's CUDA packages"
        ) from None
    try:
        nvrtc.nvrtcVersion()
    except RuntimeError:
        raise KernelError(
            "NVRTC is not installed; the package nvidia-cuda-nvrtc comes with torch's CUDA packages"
        ) from None
    return nvrtc


def _checked(module: Any, result: tuple[Any, ...]) -> Any:
    """The value of a call of the bindings; KernelError if it failed."""
    status, *values = result
    if status.value:
        raise KernelError(f"CUDA said {status.name}")
    return values[0] if values else None


def compile_source(source: str, arch: str, defines: Sequence[str] = ()) -> bytes:
    """Machine code for `arch` ("sm_90"). Needs no GPU.

    Raises:
        KernelError: NVRTC is missing, or does not compile it; with the first line of what it says.
    """
    nvrtc = _nvrtc()
    options = [f"--gpu-architecture={arch}", "--std=c++17", *(f"-D{define}" for define in defines)]
    encoded = [option.encode() for option in options]
    program = _checked(nvrtc, nvrtc.nvrtcCreateProgram(source.encode(), b"kernels.cu", 0, None, None))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
        if status.value:
            log = bytearray(_checked(nvrtc, nvrtc.nvrtcGetProgramLogSize(program)))
            nvrtc.nvrtcGetProgramLog(program, log)
            said = log.decode(errors="replace").strip("\0\n").splitlines()
            raise KernelError(f"NVRTC does not compile for {arch}: {said[0] if said else status.name}")
        code = bytearray(_checked(nvrtc, nvrtc.nvrtcGetCUBINSize(program)))
        _checked(nvrtc, nvrtc.nvrtcGetCUBIN(program, code))
        return bytes(code)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def cached_code(source: str, arch: str, defines: Sequence[str] = (), *, fresh: bool = False) -> bytes:
    """`compile_source`, from the cache unless it is to be `fresh`.

    A folder that cannot be written costs the compilation at every start, and one warning.
    """
    _, *version = _nvrtc().nvrtcVersion()
    key = hashlib.sha256(repr((source, arch, defines, version)).encode()).hexdigest()
    path = cache_dir() / "kernels" / f"{key[:32]}.cubin"
    if not fresh:
        try:
            return path.read_bytes()
        except OSError:
            pass
    code = compile_source(source, arch, defines)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as aside:
            aside.write(code)
        Path(aside.name).replace(path)  # whole or not there, whoever else writes it
    except OSError as error:
        warnings.warn(f"kernels are compiled anew at every start: {error}", stacklevel=2)
    return code


class Kernel:
    """A function of a loaded module on one GPU."""

    def __init__(self, driver: Any, module: Any, name: str, device: torch.device):
        self._driver, self._device = driver, device
        self._function = _checked(driver, driver.cuModuleGetFunction(module, name.encode()))

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
        _checked(self._driver, result)


@lru_cache
def kernel(name: str, device: torch.device, max_tensors: int) -> Kernel:
    """The kernel `name` of kernels.cu on a GPU, compiled if it never was.

    Raises:
        KernelError: it cannot be had; says why.
    """
    if torch.version.hip:
        raise KernelError("this is a ROCm build of torch")
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        raise KernelError(f"{torch.cuda.get_device_name(device)} is older than compute capability 7.5")
    _nvrtc()
    from cuda.bindings import driver

    def load(*, fresh: bool) -> Any:
        arch = "sm_{}{}".format(*capability)
        code = cached_code(SOURCE.read_text(), arch, (f"MAX_TENSORS={max_tensors}",), fresh=fresh)
        return _checked(driver, driver.cuModuleLoadData(code))

    with torch.cuda.device(device):
        torch.empty(1, device=device)  # makes the context in which modules are loaded
        try:
            module = load(fresh=False)
        except KernelError:  # perhaps what was kept is damaged
            module = load(fresh=True)
        return Kernel(driver, module, name, device)
