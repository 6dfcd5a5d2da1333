"""The Triton kernel of attention without a GPU: in Python, and compiled. On a GPU: test_attention.py.

Needs Triton, which comes with torch's CUDA builds.
"""

import os
import subprocess
import sys

import pytest
import torch

from hrm_ray.models.attention import FUSED_HEAD_DIMS, MAX_FUSED_TOKENS
from tests.models.test_attention import CPU, assert_exact

pytest.importorskip("triton")
SHAPES = [(1, 32), (16, 32), (17, 64), (70, 32), (82, 64), (MAX_FUSED_TOKENS, 64)]


@pytest.mark.parametrize("rotates", [True, False])
@pytest.mark.parametrize(("num_tokens", "head_dim"), SHAPES)
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="by the next test")
def test_in_python(num_tokens, head_dim, rotates):
    """In float32: the products of bfloat16 of Triton's interpreter are wrong."""
    from hrm_ray.kernels.attention import fused_attention

    assert_exact(fused_attention, CPU, num_tokens, head_dim, torch.float32, rotates)


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
    assert done.stdout.startswith("." * 2 * len(SHAPES))  # none is skipped


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("head_dim", FUSED_HEAD_DIMS)
@pytest.mark.parametrize("num_tokens", [16, 82, MAX_FUSED_TOKENS])
def test_compiles_without_a_gpu(capability, head_dim, num_tokens):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from hrm_ray.kernels import attention

    for kernel, options in (
        (attention._forward, attention.FORWARD),
        (attention._backward, attention.BACKWARD),
    ):
        qkv = torch.empty(1, num_tokens, 3, 8, head_dim, device="meta")
        constants = attention.constants(qkv, rotates=True, **options)
        launch = {word: constants.pop(word) for word in ("num_warps", "num_stages")}
        kinds = {name: "*fp32" if name in ("cos", "sin") else "*bf16" for name in kernel.arg_names}
        kinds |= dict.fromkeys(constants, "constexpr")
        code = compile(
            ASTSource(kernel, kinds, constexprs=constants),
            target=GPUTarget("cuda", capability, 32),
            options=launch,
        ).asm["cubin"]
        assert code.startswith(b"\x7fELF")
