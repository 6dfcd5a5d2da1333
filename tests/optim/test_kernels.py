"""The CUDA kernels: compiled for every architecture without a GPU, run on the CPU, and on a GPU where there is one."""

import ctypes
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from hrm_ray.optim import adam_atan2, fused_cuda, nvrtc
from hrm_ray.optim.adam_atan2 import Group, Slot
from hrm_ray.optim.sign_sgd import sparse_sign_sgd

ARCHS = ("sm_80", "sm_90", "sm_100")
KERNELS = (*fused_cuda.DTYPES.values(), "sign_sgd")
SHAPES = [(1,), (7,), (8,), (3, 5), (0, 4), (fused_cuda.CHUNK,), (2 * fused_cuda.CHUNK + 9,), (64, 33)]
needs_nvrtc = pytest.mark.skipif(sys.platform != "linux", reason="NVRTC comes with the tests on Linux only")
cuda_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


# compiling


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HRM_RAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@needs_nvrtc
@pytest.mark.parametrize("capacity", fused_cuda.CAPACITIES)
@pytest.mark.parametrize("arch", ARCHS)
def test_compiles_without_a_gpu(arch, capacity):
    code = nvrtc.compile_source(nvrtc.SOURCE.read_text(), arch, [f"MAX_TENSORS={capacity}"])
    assert code.startswith(b"\x7fELF")
    assert all(name.encode() in code for name in KERNELS)


@needs_nvrtc
def test_a_mistake_in_the_source_is_said_in_one_line():
    with pytest.raises(
        nvrtc.KernelError, match=r"NVRTC does not compile for sm_90: kernels\.cu\(2\): error: "
    ):
        nvrtc.compile_source("\nnonsense", "sm_90")


@needs_nvrtc
def test_an_unknown_architecture():
    with pytest.raises(nvrtc.KernelError, match="for sm_12345: nvrtc: error: invalid value"):
        nvrtc.compile_source("", "sm_12345")


@needs_nvrtc
def test_compiled_once_for_each_source_and_architecture(cache, monkeypatch):
    compiled = []
    monkeypatch.setattr(nvrtc, "compile_source", lambda *args: compiled.append(args) or b"code")
    for arch in ("sm_80", "sm_90", "sm_80"):
        assert nvrtc.cached_code("source", arch) == b"code"
    nvrtc.cached_code("other source", "sm_80")
    nvrtc.cached_code("source", "sm_80", ["A=1"])
    assert len(compiled) == len(list((cache / "kernels").iterdir())) == 4
    nvrtc.cached_code("source", "sm_80", fresh=True)
    assert len(compiled) == 5


@needs_nvrtc
def test_a_cache_that_cannot_be_written_costs_a_warning_only(cache, monkeypatch):
    cache.write_text("a file where the folder should be")
    monkeypatch.setattr(nvrtc, "compile_source", lambda *args: b"code")
    with pytest.warns(UserWarning, match="kernels are compiled anew at every start: .*cache"):
        assert nvrtc.cached_code("source", "sm_80") == b"code"


# running, here without a GPU

EMULATION = """
#include "{here}/cuda_on_cpu.h"
#define MAX_TENSORS {capacity}
#include "{source}"
"""


class Emulated:
    """`nvrtc.Kernel` on the CPU."""

    def __init__(self, library: ctypes.CDLL, name: str):
        self._function = library[f"launch_{name}"]

    def launch(self, grid, num_threads, *arguments):
        addresses = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        self._function(*grid, num_threads, addresses)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory) -> dict[int, ctypes.CDLL]:
    """The kernels for each capacity, compiled for this CPU."""
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler here")
    folder = tmp_path_factory.mktemp("kernels")
    libraries = {}
    for capacity in fused_cuda.CAPACITIES:
        program = EMULATION.format(here=Path(__file__).parent, source=nvrtc.SOURCE, capacity=capacity)
        program += "".join(f"LAUNCHER({name})\n" for name in KERNELS)
        (folder / "kernels.cpp").write_text(program)
        library = folder / f"{capacity}.so"
        words = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-o", library, folder / "kernels.cpp"]
        subprocess.run(words, check=True)
        libraries[capacity] = ctypes.CDLL(str(library))
    return libraries


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=cuda_only)])
def device(request, monkeypatch) -> torch.device:
    """Where tensors are to be: on the CPU, with the kernels emulated, or on the GPU."""
    if request.param == "cuda":
        return torch.device("cuda")
    libraries = request.getfixturevalue("libraries")
    monkeypatch.setattr(nvrtc, "kernel", lambda name, device, capacity: Emulated(libraries[capacity], name))
    return torch.device("cpu")


def slots_of(shapes, dtype, device, *, offset=0, num_steps=0) -> list[Slot]:
    """Random ones; `offset` numbers into a larger vector, which is not at a multiple of 16 bytes."""
    generator = torch.Generator().manual_seed(0)

    def tensor(shape, draw, dtype):
        size = torch.Size(shape).numel()
        return draw(size + offset, generator=generator).to(device, dtype)[offset:].view(shape)

    return [
        Slot(
            tensor(shape, torch.randn, dtype),
            tensor(shape, torch.randn, dtype),
            tensor(shape, torch.randn, torch.float32) * 0.1,
            tensor(shape, torch.rand, torch.float32),
            torch.tensor(float(num_steps), device=device),
        )
        for shape in shapes
    ]


def expected(slots: list[Slot], group: Group) -> list[Slot]:
    """The same update by the equations in float64."""
    slots = [Slot(*(t.double().cpu() for t in slot)) for slot in slots]
    adam_atan2.reference(slots, group)
    return slots


def group(**values) -> Group:
    return Group(
        **{"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "bias_correction": "outside"}
        | values
    )


def assert_equal(ours: list[Slot], theirs: list[Slot], dtype) -> None:
    for slot, other in zip(ours, theirs, strict=True):
        rtol = 1e-6 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(slot.param.double().cpu(), other.param, rtol=rtol, atol=1e-6)
        torch.testing.assert_close(slot.exp_avg.double().cpu(), other.exp_avg, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(slot.exp_avg_sq.double().cpu(), other.exp_avg_sq, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("num_steps", [0, 1, 40, 52_082])
@pytest.mark.parametrize("bias_correction", ["outside", "inside"])
@pytest.mark.parametrize("dtype", list(fused_cuda.DTYPES))
def test_one_update_against_float64(device, dtype, bias_correction, num_steps, offset):
    slots = slots_of(SHAPES, dtype, device, offset=offset, num_steps=num_steps)
    settings = group(bias_correction=bias_correction)
    theirs = expected(slots, settings)
    fused_cuda.update(slots, settings)
    assert_equal(slots, theirs, dtype)
    assert all(slot.step == num_steps + 1 for slot in slots if slot.param.numel())


@pytest.mark.parametrize("count", [64, 65, 513])
def test_many_tensors(device, count):
    slots = slots_of([(i % 5,) for i in range(count)], torch.float32, device)
    theirs = expected(slots, group())
    fused_cuda.update(slots, group())
    assert_equal(slots, theirs, torch.float32)


def test_both_dtypes_and_a_gradient_that_is_not_contiguous(device):
    slots = slots_of([(6, 4)], torch.float32, device) + slots_of([(9,)], torch.bfloat16, device)
    slots[0] = slots[0]._replace(grad=torch.randn(4, 6, device=device).t())
    theirs = expected(slots, group())
    fused_cuda.update(slots, group())
    assert_equal(slots, theirs, torch.bfloat16)


def test_learning_rate_and_step_are_read_where_they_are(device):
    """What a CUDA graph captured, it does again with what stands there then."""
    slots, lr = slots_of([(40,)], torch.float32, device), torch.tensor(1e-2, device=device)
    theirs = expected(slots, group())
    adam_atan2.reference(theirs, group(lr=1e-3))
    update = partial(fused_cuda.update, slots, group(lr=lr))
    if device.type == "cuda":
        kept = [t.clone() for t in slots[0]]
        update()  # loads the kernel, which a capture must not
        torch._foreach_copy_(list(slots[0]), kept)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            update()
        update = graph.replay
    update()
    lr.fill_(1e-3)
    update()
    assert_equal(slots, theirs, torch.float32)


def test_scaled_and_infinite_gradients(device):
    slots = slots_of(SHAPES, torch.float32, device)
    theirs = expected(slots, group())
    for slot in slots:
        slot.grad.mul_(128)
    scale, before = torch.tensor(128.0, device=device), [slot.param.clone() for slot in slots]
    fused_cuda.update(slots, group(grad_scale=scale, found_inf=torch.tensor(1.0, device=device)))
    assert all(torch.equal(slot.param, p) and slot.step == 0 for slot, p in zip(slots, before, strict=True))
    fused_cuda.update(slots, group(grad_scale=scale, found_inf=torch.tensor(0.0, device=device)))
    assert_equal(slots, theirs, torch.float32)


@pytest.mark.parametrize(("num_rows", "num_looked_up"), [(1, 50), (9, 50), (1000, 50), (3, 1)])
@pytest.mark.parametrize("size", [1, 96, fused_cuda.THREADS + 5])
def test_sign_sgd(device, num_rows, num_looked_up, size):
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(num_rows, size, generator=generator)
    identifiers = torch.randint(num_rows, (num_looked_up,), generator=generator, dtype=torch.int32)
    # Whole numbers: their sum is exact in any order, and often 0.
    gradients = torch.randint(-2, 3, (num_looked_up, size), generator=generator).float()
    ours = table.to(device)
    fused_cuda.sparse_sign_sgd(ours, identifiers.to(device), gradients.to(device), 1e-2, 0.1)
    sparse_sign_sgd(table, identifiers, gradients, lr=1e-2, weight_decay=0.1)
    torch.testing.assert_close(ours.cpu(), table, rtol=1e-6, atol=1e-7)


@cuda_only
def test_the_front_takes_the_kernel():
    assert adam_atan2.resolve_backend("auto", torch.device("cuda")) == "cuda"
