"""The Triton kernel of attention without a GPU: in Python, and compiled. On a GPU: test_attention.py.

Needs Triton, which comes with torch's CUDA builds; elsewhere `make test-triton` fetches it.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hrm_ray.models.attention import PACKAGES, kernel
from hrm_ray.models.rotary import rope_tables
from tests.models.test_attention import CPU, assert_exact

pytest.importorskip("triton")
FUSED = PACKAGES["fused"]
SHAPES = [(1, 32), (16, 32), (17, 64), (70, 32), (82, 64), (FUSED.max_tokens, 64)]


@pytest.mark.parametrize("rotates", [True, False])
@pytest.mark.parametrize(("num_tokens", "head_dim"), SHAPES)
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="by the next test")
def test_in_python(num_tokens, head_dim, rotates):
    """In float32: the products of bfloat16 of Triton's interpreter are wrong."""
    from hrm_ray.kernels.attention import fused_attention

    assert_exact(fused_attention, CPU, num_tokens, head_dim, torch.float32, rotates)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="by the next test")
def test_in_python_however_it_is_launched():
    """What is launched is what the benchmark of it measures."""
    from benchmarks.fused_attention import ROWS, WARPS, launches

    torch.manual_seed(0)
    qkv, rope = torch.randn(1, 82, 3, 2, 32), rope_tables(82, 32)
    calls, left_out = launches(qkv)
    assert len(calls) == 2 * len(ROWS) * len(WARPS) and not left_out
    for name, call in calls.items():
        written = call.args[-1].fill_(torch.nan)
        call()
        leaf = qkv.clone().requires_grad_()
        expected = kernel("matmul")(leaf, rope)
        if name.startswith("backward"):
            (expected,) = torch.autograd.grad(expected, leaf, call.args[-2])
        torch.testing.assert_close(written, expected)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is it")
def test_in_python_in_a_process_of_its_own():
    """Triton decides when it is imported."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        "test_in_python",
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("." * (2 * len(SHAPES) + 1))  # none is skipped


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("head_dim", FUSED.head_dims)
@pytest.mark.parametrize("num_tokens", [16, 82, FUSED.max_tokens])
def test_compiles_without_a_gpu(capability, head_dim, num_tokens, tmp_path):
    """On those for which it is, spilling few registers or none for the published model's 82 tokens."""
    for code in machine_code(capability, head_dim, num_tokens):
        assert code.startswith(b"\x7fELF")
        if num_tokens <= 82 and FUSED.first <= divmod(capability, 10) < FUSED.before:
            assert stack_bytes(code, tmp_path / "cubin") <= 128


def machine_code(capability, head_dim, num_tokens) -> Iterator[bytes]:
    """Forwards, then backwards."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from hrm_ray.kernels import attention

    for program, options in (
        (attention._forward, attention.FORWARD),
        (attention._backward, attention.BACKWARD),
    ):
        qkv = torch.empty(1, num_tokens, 3, 8, head_dim, device="meta")
        constants = attention.constants(qkv, rotates=True, **options)
        launch = {word: constants.pop(word) for word in ("num_warps", "num_stages")}
        kinds = {name: "*fp32" if name in ("cos", "sin") else "*bf16" for name in program.arg_names}
        kinds |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(program, kinds, constexprs=constants)
        yield compile(source, target=GPUTarget("cuda", capability, 32), options=launch).asm["cubin"]


def stack_bytes(code: bytes, scratch: Path) -> int:
    """What each thread has in memory, where registers are spilled to."""
    from triton import knobs

    scratch.write_bytes(code)
    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(scratch)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return max(int(size) for size in re.findall(r"STACK:(\d+)", said))
