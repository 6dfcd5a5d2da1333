"""The CUDA kernels: compiled for every architecture without a GPU, run on the CPU, and on a GPU where there is one."""

import ctypes
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from hrm_ray.errors import UserError
from hrm_ray.optim import adam_atan2, fused_cuda, nvrtc
from hrm_ray.optim.adam_atan2 import CUDA_DTYPES, AdamATan2, Group, Slot
from hrm_ray.optim.sign_sgd import sparse_sign_sgd

ARCHS = ("sm_80", "sm_90", "sm_100")
KERNELS = (*fused_cuda.KERNELS.values(), "sign_sgd")
SHAPES = [(1,), (7,), (8,), (3, 5), (0, 4), (fused_cuda.CHUNK,), (2 * fused_cuda.CHUNK + 9,), (64, 33)]
needs_nvrtc = pytest.mark.skipif(sys.platform != "linux", reason="NVRTC comes with the tests on Linux only")
cuda_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


# compiling

EMPTY = 'extern "C" __global__ void nothing() {}'


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
    nvrtc.cached_code("source", "sm_80", ("A=1",))
    assert len(compiled) == len(list((cache / "kernels").iterdir())) == 4


@needs_nvrtc
@pytest.mark.parametrize("damage", [lambda c: c[:-1], lambda c: b"", lambda c: c[:40] + b"X" + c[41:]])
def test_a_damaged_file_is_made_anew(cache, damage):
    code = nvrtc.cached_code(EMPTY, "sm_80")
    (path,) = (cache / "kernels").iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert nvrtc.cached_code(EMPTY, "sm_80") == code
    assert path.read_bytes() == whole


@needs_nvrtc
def test_a_cache_that_cannot_be_written_costs_a_warning_only(cache, monkeypatch):
    cache.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="kernels will be compiled again at every start: .*cache"):
        assert nvrtc.cached_code(EMPTY, "sm_80")


@needs_nvrtc
def test_no_home_to_keep_them_in(monkeypatch):
    def homeless(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("HRM_RAY_CACHE", raising=False)
    monkeypatch.setattr(Path, "expanduser", homeless)
    with pytest.warns(UserWarning, match="again at every start: .* set HRM_RAY_CACHE"):
        assert nvrtc.cached_code(EMPTY, "sm_80")


# which backend


@pytest.fixture
def gpu(monkeypatch):
    """A machine that seems to have a GPU."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    for cached in (nvrtc.kernel, nvrtc._module, fused_cuda.why_not, adam_atan2.resolve_backend):
        cached.cache_clear()
    yield torch.device("cuda", 0)
    for cached in (nvrtc.kernel, nvrtc._module, fused_cuda.why_not, adam_atan2.resolve_backend):
        cached.cache_clear()


def old(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))


def rocm(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")


def no_bindings(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)


def failing(monkeypatch):
    def fails(*args):
        raise nvrtc.KernelError("NVRTC does not compile for sm_90: something")

    monkeypatch.setattr(nvrtc, "cached_code", fails)


@pytest.mark.parametrize(
    ("lack", "said"),
    [
        (old, "Some GPU is older than compute capability 7.5"),
        (rocm, "this is a ROCm build of torch"),
        (no_bindings, "NVRTC cannot be used .*; torch's CUDA packages bring cuda-bindings"),
        (failing, "NVRTC does not compile for sm_90: something"),
    ],
)
def test_without_the_kernels_auto_says_what_it_takes_and_why(gpu, monkeypatch, lack, said):
    lack(monkeypatch)
    with pytest.warns(UserWarning, match=f"runs as optimizer_backend=foreach, which is slower: {said}"):
        assert adam_atan2.resolve_backend("auto", gpu) == "foreach"
    with pytest.raises(UserError, match=f"optimizer_backend=cuda: {said}.*; use auto"):
        adam_atan2.resolve_backend("cuda", gpu)


def test_other_dtypes_and_devices():
    assert adam_atan2.resolve_backend("auto", torch.device("cuda", 0), torch.float64) == "foreach"
    assert adam_atan2.resolve_backend("auto", torch.device("meta")) == "foreach"
    with pytest.raises(UserError, match="is for float32 on the CPU, not float32 on cuda:0; use auto"):
        adam_atan2.resolve_backend("fused", torch.device("cuda", 0))


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
@pytest.mark.parametrize("dtype", CUDA_DTYPES)
def test_one_update_against_float64(device, dtype, bias_correction, num_steps, offset):
    slots = slots_of(SHAPES, dtype, device, offset=offset, num_steps=num_steps)
    settings = group(bias_correction=bias_correction)
    theirs = expected(slots, settings)
    fused_cuda.update(slots, settings)
    assert_equal(slots, theirs, dtype)
    assert all(slot.step == num_steps + 1 for slot in slots)


@pytest.mark.parametrize(("count", "launches"), [(64, [64]), (65, [65]), (513, [512, 1])])
def test_many_tensors(device, monkeypatch, count, launches):
    launched, launch = [], fused_cuda._launch
    monkeypatch.setattr(fused_cuda, "_launch", lambda *args: launched.append(len(args[2])) or launch(*args))
    slots = slots_of([(i % 5 + 1,) for i in range(count)], torch.float32, device)
    theirs = expected(slots, group())
    fused_cuda.update(slots, group())
    assert_equal(slots, theirs, torch.float32)
    assert launched == launches


@pytest.mark.parametrize("betas", [(0.0, 0.9), (0.9, 0.9999), (0.99, 0.999)])
@pytest.mark.parametrize("lr", [1, 3e-2, 1e-5])
def test_rates(device, betas, lr):
    """From 0 and without weight decay: nothing hides the update. (A moment that nearly cancels has lost digits.)"""
    slots = [s._replace(param=torch.zeros_like(s.param)) for s in slots_of(SHAPES, torch.float32, device)]
    settings = group(lr=lr, beta1=betas[0], beta2=betas[1], weight_decay=0)
    theirs = expected(slots, settings)
    fused_cuda.update(slots, settings)
    for slot, other in zip(slots, theirs, strict=True):
        torch.testing.assert_close(slot.param.double().cpu(), other.param, rtol=2e-6, atol=2e-8 * lr)
        torch.testing.assert_close(slot.exp_avg_sq.double().cpu(), other.exp_avg_sq, rtol=1e-6, atol=0)


def test_bfloat16_is_rounded_as_torch_does(device):
    """To the nearest, ties to even: weights that only decay, by a factor that float32 holds exactly."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    p = bits.view(torch.bfloat16).to(device)
    zeros = [torch.zeros_like(p, dtype=torch.float32) for _ in range(2)]
    slot = Slot(p.clone(), torch.zeros_like(p), *zeros, torch.tensor(0.0, device=device))
    fused_cuda.update([slot], group(lr=1.0, weight_decay=0.25))
    torch.testing.assert_close(slot.param, (p.float() * 0.75).bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("which", range(4))
def test_one_tensor_alone_is_misaligned(device, which):
    slots, shifted = slots_of([(100,)], torch.float32, device), torch.empty(101, device=device)[1:]
    shifted.copy_(slots[0][which])
    slots[0] = slots[0]._replace(**{Slot._fields[which]: shifted})
    theirs = expected(slots, group())
    fused_cuda.update(slots, group())
    assert_equal(slots, theirs, torch.float32)


def test_both_dtypes_and_a_gradient_that_is_not_contiguous(device):
    slots = slots_of([(6, 4)], torch.float32, device) + slots_of([(9,)], torch.bfloat16, device)
    slots[0] = slots[0]._replace(grad=torch.randn(4, 6, device=device).t())
    theirs = expected(slots, group())
    fused_cuda.update(slots, group())
    assert_equal(slots, theirs, torch.bfloat16)


def test_rates_and_step_are_read_where_they_are(device):
    """What a CUDA graph captured, it does again with what stands there then."""
    slots = slots_of([(40,)], torch.float32, device)
    lr, weight_decay = torch.tensor(1e-2, device=device), torch.tensor(0.1, device=device)
    theirs = expected(slots, group())
    adam_atan2.reference(theirs, group(lr=1e-3, weight_decay=0.5))
    update = partial(fused_cuda.update, slots, group(lr=lr, weight_decay=weight_decay))
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
    weight_decay.fill_(0.5)
    update()
    assert_equal(slots, theirs, torch.float32)


@cuda_only
def test_a_graph_does_not_keep_a_number():
    slots = slots_of([(40,)], torch.float32, torch.device("cuda"))
    fused_cuda.update(slots, group())
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(UserError, match="make them tensors on cuda"), torch.cuda.graph(graph):
        fused_cuda.update(slots, group())


def test_scaled_and_infinite_gradients(device):
    slots = slots_of(SHAPES, torch.float32, device)
    theirs = expected(slots, group())
    for slot in slots:
        slot.grad.mul_(128)
    scale, before = torch.tensor(128.0, device=device), [slot.param.clone() for slot in slots]
    fused_cuda.update(slots, group(grad_scale=scale, found_inf=torch.tensor(2.0, device=device)))
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


def test_no_row_looked_up(device):
    table = torch.ones(3, 4, device=device)
    nothing = torch.empty(0, dtype=torch.int32, device=device)
    fused_cuda.sparse_sign_sgd(table, nothing, torch.empty(0, 4, device=device), 1e-2, 0.1)
    assert torch.equal(table, torch.ones_like(table))


@cuda_only
@pytest.mark.parametrize("scaled", [False, True])
def test_through_the_front(scaled):
    """A parameter that is not contiguous, one without a gradient; both dtypes or a scaler; the state elsewhere."""
    start = [torch.randn(300, 41), torch.randn(7), torch.randn(9, 5).t(), torch.randn(3)]
    grads = [torch.randn_like(p) for p in start[:3]]

    def trained(device, backend, state=None):
        params = [torch.nn.Parameter(p.clone().to(device)) for p in start]
        if not scaled:  # a scaler of torch 2.11 cannot look at bfloat16 gradients on a GPU
            params[1] = torch.nn.Parameter(start[1].to(device, torch.bfloat16))
        optimizer = AdamATan2(params, lr=1e-2, backend=backend)
        if state is not None:
            optimizer.load_state_dict(state)
        scaler = torch.amp.GradScaler(torch.device(device).type, init_scale=256.0, enabled=scaled)
        scaler.scale(torch.zeros((), device=device))
        for _ in range(3):
            for p, g in zip(params, grads, strict=False):
                p.grad = (g * (256 if scaled else 1)).to(device, p.dtype)
            scaler.step(optimizer)
            scaler.update()
        return [p.detach().float().cpu() for p in params], optimizer.state_dict()

    ours, our_state = trained("cuda", "auto")
    theirs, their_state = trained("cpu", "reference")
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=2**-7, atol=1e-5)
    for there, state in (("cpu", our_state), ("cuda", their_state)):
        trained(there, "auto", state)
    assert adam_atan2.resolve_backend("auto", torch.device("cuda")) == "cuda"


@cuda_only
@pytest.mark.parametrize("backend", ["cuda", "foreach"])
def test_embeddings_through_the_front(backend):
    identifiers = torch.randint(9, (50,))
    gradients, table = torch.randint(-2, 3, (50, 300)).float(), torch.randn(9, 300)
    there = [t.cuda() for t in (table, identifiers, gradients)]
    sparse_sign_sgd(*there, lr=1e-2, weight_decay=0.1, backend=backend)
    sparse_sign_sgd(table, identifiers, gradients, lr=1e-2, weight_decay=0.1)
    torch.testing.assert_close(there[0].cpu(), table, rtol=1e-6, atol=1e-7)
