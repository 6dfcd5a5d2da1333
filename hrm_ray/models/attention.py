"""Full attention with rotary positions by several kernels that compute the same, and which of them can run where.

    fused    rotation and attention of short sequences in one pass, of ours (kernels/attention.py): GPUs of 9.0 and 10.x
    flash3   FlashAttention 3, the package `flash_attn_interface`: Hopper GPUs
    flash2   FlashAttention 2, the package `flash_attn`: GPUs from Ampere on
    sdpa     torch's own, which has flash kernels for GPUs and CPUs
    matmul   two batched products; on CPUs and for short sequences faster than the library's fused kernel

The packages are imported when they are asked for, and a package that cannot be imported is one that is not there.

Shapes: B batch, S tokens, N heads, K width of a head. No mask, scores scaled by K ** -0.5.
"""

import importlib
from collections.abc import Callable, Iterator
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from hrm_ray.errors import UserError, first_line
from hrm_ray.models.rotary import Rope, apply_rope, rope_tables

# From queries, keys and values as they come from one product, [B, S, 3, N, K], and rotary positions, to [B, S, N, K].
AttentionKernel = Callable[[Tensor, Rope], Tensor]

MAX_FLASH_HEAD_DIM = 256
# The longest sequences and the heads that the fused kernel is for, beyond which it would run out of registers.
MAX_FUSED_TOKENS, FUSED_HEAD_DIMS = 128, (32, 64)
# What a package is imported as, and the compute capabilities of the GPUs it is for, from the first to before the last.
PACKAGES = {
    "fused": ("hrm_ray.kernels.attention", (9, 0), (11, 0)),  # others have too few registers for it
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


def flash_attention(package: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention by a package's `flash_attn_func`; bfloat16 on a GPU."""
    attend = importlib.import_module(package).flash_attn_func

    def flash(q_BNSK: Tensor, k_BNSK: Tensor, v_BNSK: Tensor) -> Tensor:
        out = attend(*(t.transpose(1, 2) for t in (q_BNSK, k_BNSK, v_BNSK)))
        out = out[0] if isinstance(out, tuple) else out  # some versions return the scores' sums too
        return out.transpose(1, 2)

    return flash


def rotate_and_attend(
    qkv_BS3NK: Tensor, rope: Rope, *, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """An `AttentionKernel`, once it has `attend`, which takes queries, keys and values as [B, N, S, K] each."""
    q, k, v = rearrange(qkv_BS3NK, "b s c n k -> c b n s k").unbind(0)
    if rope is not None:
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
    return attend(q, k, v).transpose(1, 2)


def kernel(name: str) -> AttentionKernel:
    """The kernel `name`, which must be able to run here (see `obstacle`)."""
    if name == "fused":
        return importlib.import_module(PACKAGES[name][0]).fused_attention
    if name in PACKAGES:
        return partial(rotate_and_attend, attend=flash_attention(PACKAGES[name][0]))
    # A partial, not a function made here, so that a model can be pickled.
    attend = matmul_attention if name == "matmul" else F.scaled_dot_product_attention
    return partial(rotate_and_attend, attend=attend)


KERNELS = (*PACKAGES, "sdpa", "matmul")


def obstacle(
    name: str, device: torch.device, dtype: torch.dtype, *, num_tokens: int, head_dim: int
) -> str | None:
    """Why the kernel `name` cannot run; None if it can."""
    if name not in PACKAGES:
        return None if name in KERNELS else f"is unknown; known: {', '.join(KERNELS)}"
    package, first, before = PACKAGES[name]
    if device.type != "cuda":
        return "needs a GPU"
    if dtype != torch.bfloat16:
        return f"is for bfloat16, not {str(dtype).removeprefix('torch.')}"
    if name == "fused" and head_dim not in FUSED_HEAD_DIMS:
        return f"is for heads of {' or '.join(map(str, FUSED_HEAD_DIMS))} numbers, not {head_dim}"
    if name == "fused" and num_tokens > MAX_FUSED_TOKENS:
        return f"is for {MAX_FUSED_TOKENS} tokens at most, not {num_tokens}"
    if head_dim > MAX_FLASH_HEAD_DIM or head_dim % 8:
        return f"is for heads of 8, 16, ... {MAX_FLASH_HEAD_DIM} numbers, not {head_dim}"
    capability = torch.cuda.get_device_capability(device)
    if not first <= capability < before:
        return f"is not for GPUs of compute capability {'.'.join(map(str, capability))}"
    try:
        importlib.import_module(package)
    except Exception as error:  # of any kind: a library built for another torch has many ways to fail
        return f"cannot import {package}: {first_line(error)}"
    return _failure(name, device, dtype, max(1, num_tokens) if name == "fused" else 8, head_dim)


@lru_cache
def _failure(
    name: str, device: torch.device, dtype: torch.dtype, num_tokens: int, head_dim: int
) -> str | None:
    """What a call forwards and backwards fails with; a package may have no kernels for this GPU."""
    try:
        qkv = torch.ones(1, num_tokens, 3, 1, head_dim, device=device, dtype=dtype, requires_grad=True)
        cos, sin = rope_tables(num_tokens, head_dim)
        out = kernel(name)(qkv, (cos.to(device), sin.to(device)))
        (gradient,) = torch.autograd.grad(out.float().sum(), qkv)
        gradient.sum().item()  # waits for it
    except Exception as error:  # of any kind
        return f"fails on {device}: {first_line(error)}"
    return None


def preferred(device: torch.device, dtype: torch.dtype, num_tokens: int) -> Iterator[str]:
    """Kernels for sequences of `num_tokens`, best first; the last can run anywhere."""
    if device.type == "cuda":
        yield from (name for name in PACKAGES if name != "fused")  # which no GPU has run yet
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
    shape = {"num_tokens": num_tokens, "head_dim": head_dim}
    if wanted == "auto":
        names = preferred(device, dtype, num_tokens)
        return next(name for name in names if not obstacle(name, device, dtype, **shape))
    problem = obstacle(wanted, device, dtype, **shape)
    if problem:
        raise UserError(f"attention={wanted} {problem}; use attention=auto")
    return wanted
