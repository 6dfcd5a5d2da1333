"""The one device decision."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from hrm_ray import doctor, machine
from hrm_ray.errors import UserError


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
    with pytest.warns(UserWarning, match=r"trains on the CPU: Some GPU does not work with torch 2.*: "):
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
    with pytest.raises(UserError, match=r"cuda:0, Some GPU, has no free memory \(.*\); wait for who has it"):
        machine.resolve(device=device)
    said = doctor.report()
    assert "training uses        nothing: cuda:0, Some GPU, has no free memory" in said, said


def test_bfloat16_that_a_gpu_only_emulates_is_not_taken(gpu, monkeypatch):
    monkeypatch.setattr(machine, "_gpu_problem", lambda place: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    setup = machine.resolve()
    assert (setup.device, setup.dtype) == (torch.device("cuda", 0), torch.float32)


# 256 MiB, freed at once, twice. By numpy: torch aligns its memory, for which old versions of glibc leave gaps.
ALLOCATES_AGAIN = """
import resource, sys, threading, numpy
from hrm_ray import machine
says = machine.keep_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    numpy.ones(2**25)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def compare():
    first, again = faults(), faults()
    print(says, again < first / 10)
if sys.argv[1] == "first":
    compare()
else:
    thread = threading.Thread(target=compare)
    thread.start()
    thread.join()
"""


def what_is_kept(environment: dict[str, str], thread: str) -> list[str]:
    """Whether a process says that it keeps memory, and whether it does."""
    others = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", ALLOCATES_AGAIN, thread]
    done = subprocess.run(command, env=others | environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


on_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="nothing is done there")


@on_glibc
@pytest.mark.parametrize(
    ("tuned", "is_kept"),
    [
        ({}, True),
        ({"MALLOC_TRIM_THRESHOLD_": "1000000"}, False),
        ({"MALLOC_MMAP_MAX_": "9"}, False),
        ({"MALLOC_MMAP_THRESHOLD_": "65536"}, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1000000"}, False),
        ({"GLIBC_TUNABLES": "glibc.pthread.rseq=1"}, True),
    ],
)
def test_freed_memory_is_kept_unless_the_user_tunes_it(tuned, is_kept):
    assert what_is_kept(tuned, "first") == [str(is_kept)] * 2


@on_glibc
def test_another_thread_keeps_memory_with_one_arena_only():
    assert what_is_kept({}, "another") == ["True", "False"]
    assert what_is_kept(machine.ONE_ARENA, "another") == ["True", "True"]


def test_without_glibc_nothing_is_done(monkeypatch):
    asked = []
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: asked.append(name) or object())
    assert not machine.keep_memory()
    assert asked == [None]
