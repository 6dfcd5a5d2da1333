"""Full attention with rotary positions by several kernels that compute the same, and which of them can run where.

    flash2   FlashAttention 2, the package `flash_attn`, where it can be imported: GPUs from Ampere on
    sdpa     torch's own, which has flash kernels for GPUs and CPUs
    matmul   two batched products; on CPUs and for short sequences faster than the library's fused kernel

Shapes: B batch, S tokens, N heads, K width of a head. No mask, scores scaled by K ** -0.5.
"""

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from hrm_ray.errors import UserError, first_line
from hrm_ray.models.rotary import Rope, apply_rope

# From queries, keys and values as they come from one product, [B, S, 3, N, K], and rotary positions, to [B, S, N, K].
AttentionKernel = Callable[[Tensor, Rope], Tensor]
# Of queries, keys and values as [B, N, S, K] each.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

# Longest sequence for which two batched products beat the fused kernel on a CPU (docs/performance.md; measured in
# bfloat16 with 17 and 82 tokens, in float32 with 16, 36 and 82).
CPU_MATMUL_MAX_TOKENS = {torch.bfloat16: 128, torch.float32: 64}


def matmul_attention(q_BNSK: Tensor, k_BNSK: Tensor, v_BNSK: Tensor) -> Tensor:
    """Attention as two batched products."""
    scores = (q_BNSK * q_BNSK.shape[-1] ** -0.5) @ k_BNSK.transpose(-1, -2)
    # In float32 for accuracy, and because the CPU's bfloat16 softmax is three times slower.
    return scores.softmax(dim=-1, dtype=torch.float32).to(v_BNSK.dtype) @ v_BNSK


def flash_attention(q_BNSK: Tensor, k_BNSK: Tensor, v_BNSK: Tensor, *, attend: Callable[..., Any]) -> Tensor:
    """Attention by a package's `flash_attn_func`, which is `attend`; bfloat16 on a GPU."""
    out = attend(*(t.transpose(1, 2) for t in (q_BNSK, k_BNSK, v_BNSK)))
    out = out[0] if isinstance(out, tuple) else out  # some versions return the scores' sums too
    return out.transpose(1, 2)


def rotate_and_attend(qkv_BS3NK: Tensor, rope: Rope, *, attend: Attend) -> Tensor:
    """An `AttentionKernel`, once it has `attend`."""
    q, k, v = rearrange(qkv_BS3NK, "b s c n k -> c b n s k").unbind(0)
    if rope is not None:
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
    return attend(q, k, v).transpose(1, 2)


FLASH = "flash2"
FLASH_HEAD_DIMS = range(8, 257, 8)
OF_TORCH: dict[str, Attend] = {"sdpa": F.scaled_dot_product_attention, "matmul": matmul_attention}
KERNELS = (FLASH, *OF_TORCH)


def kernel(name: str) -> AttentionKernel:
    """The kernel `name`, which must be able to run here (see `obstacle`)."""
    if name == FLASH:
        attend = partial(flash_attention, attend=importlib.import_module("flash_attn").flash_attn_func)
        return partial(rotate_and_attend, attend=attend)
    return partial(rotate_and_attend, attend=OF_TORCH[name])


def obstacle(name: str, device: torch.device, dtype: torch.dtype, *, head_dim: int) -> str | None:
    """Why the kernel `name` cannot run; None if it can."""
    if name != FLASH:
        return None if name in KERNELS else f"is unknown; known: {', '.join(KERNELS)}"
    if device.type != "cuda":
        return "needs a GPU"
    if dtype != torch.bfloat16:
        return f"is for bfloat16, not {str(dtype).removeprefix('torch.')}"
    if head_dim not in FLASH_HEAD_DIMS:
        return f"is for heads of 8, 16, ... 256 numbers, not {head_dim}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "is for GPUs of compute capability 8.0 and later"
    try:
        kernel(name)
    except Exception as error:  # of any kind: a library built for another torch has many ways to fail
        return f"cannot import flash_attn: {first_line(error)}"
    return None


def preferred(device: torch.device, dtype: torch.dtype, num_tokens: int) -> Iterator[str]:
    """Kernels for sequences of `num_tokens`, best first; the last can run anywhere."""
    if device.type == "cuda":
        yield FLASH
    elif num_tokens <= CPU_MATMUL_MAX_TOKENS.get(dtype, 0):
        yield "matmul"
    yield "sdpa"


def resolve_attention(
    wanted: str, device: torch.device, dtype: torch.dtype, *, num_tokens: int, head_dim: int
) -> str:
    """The kernel to use for `wanted`, a name or "auto", for sequences of up to `num_tokens`.

    Raises:
        UserError: it cannot run here.
    """
    if wanted == "auto":
        names = preferred(device, dtype, num_tokens)
        return next(name for name in names if not obstacle(name, device, dtype, head_dim=head_dim))
    problem = obstacle(wanted, device, dtype, head_dim=head_dim)
    if problem:
        raise UserError(f"attention={wanted} {problem}; use attention=auto")
    return wanted
