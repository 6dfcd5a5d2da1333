"""The one device decision."""

import pytest
import torch

from hrm_ray import doctor, machine
from hrm_ray.errors import TransientError, UserError


def test_cpu_decisions(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "cpu_has_fast_bfloat16", lambda: True)
    short, long = machine.resolve(num_tokens=81), machine.resolve(num_tokens=901)
    assert (short.device.type, short.dtype, short.attention) == ("cpu", torch.bfloat16, "matmul")
    assert long.attention == "sdpa"
    monkeypatch.setattr(machine, "cpu_has_fast_bfloat16", lambda: False)
    plain = machine.resolve(num_tokens=81)
    assert (plain.dtype, plain.attention) == (torch.float32, "sdpa")
    assert machine.resolve(forward_dtype="bfloat16", attention="sdpa").attention == "sdpa"


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_tile": True, "amx_bf16": True}, True),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_tile": False, "amx_bf16": False}, False),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True, "amx_tile": False, "amx_bf16": False}, True),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": False, "amx_tile": False, "amx_bf16": False}, False),
        ({"architecture": "arm64", "bf16": True}, False),  # unmeasured
    ],
)
def test_which_cpus_multiply_bfloat16_fast(monkeypatch, capabilities, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert machine.cpu_has_fast_bfloat16() is fast


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"device": "cuda"}, "device=cuda: torch sees no GPU here"),
        ({"attention": "flash2"}, "attention=flash2 needs a GPU"),
        (
            {"optimizer_backend": "cuda"},
            "optimizer_backend=cuda is for float32 and bfloat16 on GPUs, not float32 on cpu",
        ),
        (
            {"optimizer_backend": "c"},
            "optimizer_backend=c: unknown; known: auto, reference, foreach, fused, cuda",
        ),
    ],
)
def test_an_override_that_cannot_work_is_an_error(monkeypatch, choice, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=said):
        machine.resolve(**choice)


@pytest.fixture
def gpu(monkeypatch):
    """A machine that says it has a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(machine, "cpu_has_fast_bfloat16", lambda: True)


def test_a_gpu_that_cannot_compute(gpu, monkeypatch):
    """The one here is made up, so torch fails on it as it would where it has no kernels for one."""
    machine._gpu_problem.cache_clear()
    with pytest.warns(
        UserWarning, match=r"training on the CPU instead: Some GPU does not work with torch 2.*: "
    ):
        assert machine.resolve().device.type == "cpu"
    with pytest.raises(
        UserError, match=r"device=cuda: Some GPU does not work with torch .*; use device=cpu or"
    ):
        machine.resolve(device="cuda")
    machine._gpu_problem.cache_clear()


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_gpu_whose_memory_another_process_has(gpu, monkeypatch, device):
    def no_room(*shape, **where):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")

    monkeypatch.setattr(torch, "ones", no_room)
    machine._gpu_problem.cache_clear()
    with pytest.raises(
        TransientError, match=r"cuda:0, Some GPU, has no free memory \(.*\); wait until other programs"
    ):
        machine.resolve(device=device)
    machine._gpu_problem.cache_clear()
    rows = dict(line.split("  ", 1) for line in doctor.report().splitlines())
    assert rows["problem"].strip().startswith("cuda:0, Some GPU, has no free memory")
    assert rows["problem"].endswith("or use device=cpu; below is the CPU")
    assert rows["training uses"].strip().startswith("cpu, bfloat16")
    assert "flash2 needs a GPU" in rows["attention"]


def test_doctor_where_a_gpu_has_too_little_memory_to_try_kernels(gpu, monkeypatch):
    def no_room(name, device, *kind, **shape):
        if device.type == "cuda":
            raise TransientError("there is too little memory on cuda:0")

    monkeypatch.setattr(machine, "_gpu_problem", lambda place: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(doctor, "obstacle", no_room)
    said = doctor.report()
    assert "too little memory on cuda:0; below is the CPU" in said and "flash2 can run" in said


def test_bfloat16_that_a_gpu_only_emulates_is_not_taken(gpu, monkeypatch):
    monkeypatch.setattr(machine, "_gpu_problem", lambda place: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    setup = machine.resolve()
    assert (setup.device, setup.dtype) == (torch.device("cuda", 0), torch.float32)
