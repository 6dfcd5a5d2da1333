"""Full attention by several kernels that compute the same, and which of them can run where.

    flash3   FlashAttention 3, the package `flash_attn_interface`: Hopper GPUs
    flash2   FlashAttention 2, the package `flash_attn`: GPUs from Ampere on
    sdpa     torch's own, which has flash kernels for GPUs and CPUs
    matmul   two batched products; on CPUs and for short sequences faster than the fused kernel

The packages are imported when they are asked for, and a package that cannot be imported is one that is not there.

Shapes: B batch, N heads, S tokens, K width of a head. No mask, scores scaled by K ** -0.5.
"""

import importlib
from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from hrm_ray.errors import UserError, first_line

AttentionKernel = Callable[[Tensor, Tensor, Tensor], Tensor]

MAX_FLASH_HEAD_DIM = 256
# What a package is imported as, and the compute capabilities of the GPUs it is for, from the first to before the last.
FLASH_PACKAGES = {
    "flash3": ("flash_attn_interface", (9, 0), (10, 0)),
    "flash2": ("flash_attn", (8, 0), (99, 0)),
}
# Longest sequence for which two batched products beat the fused kernel on a CPU (docs/performance.md; measured in
# bfloat16 with 17 and 82 tokens, in float32 with 16, 36 and 82).
CPU_MATMUL_MAX_TOKENS = {torch.bfloat16: 128, torch.float32: 64}


def matmul_attention(q_BNSK: Tensor, k_BNSK: Tensor, v_BNSK: Tensor) -> Tensor:
    """Attention as two batched products."""
    scores = (q_BNSK * q_BNSK.shape[-1] ** -0.5) @ k_BNSK.transpose(-1, -2)
    # In float32 for accuracy, and because the CPU's bfloat16 softmax is three times slower.
    return scores.softmax(dim=-1, dtype=torch.float32).to(v_BNSK.dtype) @ v_BNSK


def flash_attention(package: str) -> AttentionKernel:
    """Attention by one of `FLASH_PACKAGES`; bfloat16 on a GPU."""
    attend = importlib.import_module(package).flash_attn_func

    def flash(q_BNSK: Tensor, k_BNSK: Tensor, v_BNSK: Tensor) -> Tensor:
        out = attend(*(t.transpose(1, 2) for t in (q_BNSK, k_BNSK, v_BNSK)))
        out = out[0] if isinstance(out, tuple) else out  # some versions return the scores' sums too
        return out.transpose(1, 2)

    return flash


def kernel(name: str) -> AttentionKernel:
    """The kernel `name`, which must be able to run here (see `obstacle`)."""
    if name in FLASH_PACKAGES:
        return flash_attention(FLASH_PACKAGES[name][0])
    return matmul_attention if name == "matmul" else F.scaled_dot_product_attention


KERNELS = (*FLASH_PACKAGES, "sdpa", "matmul")


def obstacle(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the kernel `name` cannot run; None if it can."""
    if name not in FLASH_PACKAGES:
        return None if name in KERNELS else f"is unknown; known: {', '.join(KERNELS)}"
    package, first, before = FLASH_PACKAGES[name]
    if device.type != "cuda":
        return "needs a GPU"
    if dtype != torch.bfloat16:
        return f"is for bfloat16, not {str(dtype).removeprefix('torch.')}"
    if head_dim > MAX_FLASH_HEAD_DIM or head_dim % 8:
        return f"is for heads of 8, 16, ... {MAX_FLASH_HEAD_DIM} numbers, not {head_dim}"
    capability = torch.cuda.get_device_capability(device)
    if not first <= capability < before:
        return f"is not for GPUs of compute capability {'.'.join(map(str, capability))}"
    try:
        importlib.import_module(package).flash_attn_func  # noqa: B018 - whether it is there
    except Exception as error:  # of any kind: a library built for another torch has many ways to fail
        return f"cannot import {package}: {first_line(error)}"
    return _failure(name, device, dtype, head_dim)


@lru_cache
def _failure(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """What a call forwards and backwards fails with; a package may have no kernels for this GPU."""
    try:
        qkv = [
            torch.ones(1, 1, 8, head_dim, device=device, dtype=dtype, requires_grad=True) for _ in range(3)
        ]
        (gradient, *_) = torch.autograd.grad(kernel(name)(*qkv).float().sum(), qkv)
        gradient.sum().item()  # waits for it
    except Exception as error:  # of any kind
        return f"fails on {device}: {first_line(error)}"
    return None


def preferred(device: torch.device, dtype: torch.dtype, num_tokens: int) -> Iterator[str]:
    """Kernels for sequences of `num_tokens`, best first; the last can run anywhere."""
    if device.type == "cuda":
        yield from FLASH_PACKAGES
    elif num_tokens <= CPU_MATMUL_MAX_TOKENS.get(dtype, 0):
        yield "matmul"
    yield "sdpa"


def resolve_attention(
    wanted: str, device: torch.device, dtype: torch.dtype, *, num_tokens: int, head_dim: int
) -> str:
    """The kernel to use for `wanted`, a name or "auto".

    Raises:
        UserError: it cannot run here.
    """
    if wanted == "auto":
        return next(
            k for k in preferred(device, dtype, num_tokens) if not obstacle(k, device, dtype, head_dim)
        )
    problem = obstacle(wanted, device, dtype, head_dim)
    if problem:
        raise UserError(f"attention={wanted} {problem}; use attention=auto")
    return wanted
