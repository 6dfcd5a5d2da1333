"""Full attention with rotary positions by several kernels that compute the same, and which of them can run where.

    fused    rotation and attention of short sequences in one kernel (kernels/attention.py): GPUs of 9.0 and 10.x
    flash3   FlashAttention 3, the package `flash_attn_interface`: Hopper GPUs
    flash2   FlashAttention 2, the package `flash_attn`: GPUs from Ampere on
    sdpa     torch's own, which has flash kernels for GPUs and CPUs
    matmul   two batched products; on CPUs and for short sequences faster than the library's fused kernel

Packages are imported when they are asked for; one that cannot be imported is one that is not there.

Shapes: B batch, S tokens, N heads, K width of a head. No mask, scores scaled by K ** -0.5.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from hrm_ray.errors import TransientError, UserError, first_line
from hrm_ray.memory import is_out_of_memory
from hrm_ray.models.rotary import Rope, apply_rope, rope_tables

# From queries, keys and values as they come from one product, [B, S, 3, N, K], and rotary positions, to [B, S, N, K].
AttentionKernel = Callable[[Tensor, Rope], Tensor]
# Of queries, keys and values as [B, N, S, K] each.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

# Longest sequence for which two batched products beat the fused kernel on a CPU (docs/performance.md; measured in
# bfloat16 with 17 and 82 tokens, in float32 with 16, 36 and 82).
CPU_MATMUL_MAX_TOKENS = {torch.bfloat16: 128, torch.float32: 64}
PROBE_TOKENS = 8  # for which a kernel is tried where it is not known for how many it is
PROBE_TOLERANCE = 0.02  # of the norm, in bfloat16, whose last place is 1 / 256


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


@dataclass(frozen=True)
class Package:
    """A module that has a kernel for GPUs, in bfloat16.

    Attributes:
        module: what it is imported as.
        adapt: from the imported module to its kernel, which can be pickled, with a model.
        first, before: the compute capabilities of the GPUs that it is for: first <= capability < before.
        head_dims: the heads that it is for.
        max_tokens: the longest sequences.
        is_proven: whether a GPU has shown that it is worth taking unasked.
    """

    module: str
    adapt: Callable[[Any], AttentionKernel]
    first: tuple[int, int]
    before: tuple[int, int]
    head_dims: Sequence[int]
    max_tokens: int | None = None
    is_proven: bool = True

    def load(self) -> AttentionKernel:
        return self.adapt(importlib.import_module(self.module))


def _flash(module: Any) -> AttentionKernel:
    return partial(rotate_and_attend, attend=partial(flash_attention, attend=module.flash_attn_func))


FLASH_HEAD_DIMS = range(8, 257, 8)
PACKAGES = {
    "fused": Package(  # for other heads, longer sequences and on other GPUs it would run out of registers
        module="hrm_ray.kernels.attention",
        adapt=lambda module: module.fused_attention,
        first=(9, 0),
        before=(11, 0),
        head_dims=(32, 64),
        max_tokens=128,
        is_proven=False,
    ),
    "flash3": Package("flash_attn_interface", _flash, (9, 0), (10, 0), FLASH_HEAD_DIMS),
    "flash2": Package("flash_attn", _flash, (8, 0), (99, 0), FLASH_HEAD_DIMS),
}
OF_TORCH: dict[str, Attend] = {"sdpa": F.scaled_dot_product_attention, "matmul": matmul_attention}
KERNELS = (*PACKAGES, *OF_TORCH)


def kernel(name: str) -> AttentionKernel:
    """The kernel `name`, which must be able to run here (see `obstacle`)."""
    if name in PACKAGES:
        return PACKAGES[name].load()
    return partial(rotate_and_attend, attend=OF_TORCH[name])


def obstacle(
    name: str, device: torch.device, dtype: torch.dtype, *, num_tokens: int, head_dim: int
) -> str | None:
    """Why the kernel `name` cannot run; None if it can."""
    if name not in PACKAGES:
        return None if name in KERNELS else f"is unknown; known: {', '.join(KERNELS)}"
    package = PACKAGES[name]
    if device.type != "cuda":
        return "needs a GPU"
    if dtype != torch.bfloat16:
        return f"is for bfloat16, not {str(dtype).removeprefix('torch.')}"
    if head_dim not in package.head_dims:
        return f"is for heads of {_listed(package.head_dims)} numbers, not {head_dim}"
    if package.max_tokens is not None and num_tokens > package.max_tokens:
        return f"is for {package.max_tokens} tokens at most, not {num_tokens}"
    capability = torch.cuda.get_device_capability(device)
    if not package.first <= capability < package.before:
        return f"is not for GPUs of compute capability {'.'.join(map(str, capability))}"
    try:
        package.load()
    except Exception as error:  # of any kind: a library built for another torch has many ways to fail
        return f"cannot import {package.module}: {first_line(error)}"
    return _failure(name, device, num_tokens or PROBE_TOKENS, head_dim)


def _listed(numbers: Sequence[int]) -> str:
    few = len(numbers) <= 3
    return " or ".join(map(str, numbers)) if few else f"{numbers[0]}, {numbers[1]}, ... {numbers[-1]}"


@lru_cache
def _failure(name: str, device: torch.device, num_tokens: int, head_dim: int) -> str | None:
    """What is wrong with a call forwards and backwards; a package may have no kernels for this GPU, or wrong ones.

    Raises:
        TransientError: there is too little memory to tell.
    """
    random = torch.Generator().manual_seed(0)
    numbers = torch.randn(4, 2, num_tokens, 2, head_dim, generator=random).to(torch.bfloat16)
    rope = rope_tables(num_tokens, head_dim)

    def both(name: str) -> list[Tensor]:
        *qkv, gradient = numbers.to(device)
        leaf = torch.stack(qkv, dim=2).requires_grad_()
        out = kernel(name)(leaf, (rope[0].to(device), rope[1].to(device)))
        return [x.float() for x in (out, *torch.autograd.grad(out, leaf, gradient))]

    try:
        for ours, expected in zip(both(name), both("matmul"), strict=True):
            if not (ours - expected).norm() <= PROBE_TOLERANCE * expected.norm():
                return f"computes something else on {device}"
    except Exception as error:  # of any kind
        if is_out_of_memory(error):
            raise TransientError(
                f"not enough memory on {device} to test the attention kernel ({first_line(error)})"
            ) from error
        return f"fails on {device}: {first_line(error)}"
    return None


def preferred(device: torch.device, dtype: torch.dtype, num_tokens: int) -> Iterator[str]:
    """Kernels for sequences of `num_tokens`, best first; the last can run anywhere."""
    if device.type == "cuda":
        yield from (name for name, package in PACKAGES.items() if package.is_proven)
    elif num_tokens <= CPU_MATMUL_MAX_TOKENS.get(dtype, 0):
        yield "matmul"
    yield "sdpa"


def resolve_attention(
    wanted: str, device: torch.device, dtype: torch.dtype, *, num_tokens: int, head_dim: int
) -> str:
    """The kernel to use for `wanted`, a name or "auto", for sequences of up to `num_tokens`.

    Raises:
        UserError: it cannot run here.
        TransientError: there is too little memory to tell.
    """
    shape = {"num_tokens": num_tokens, "head_dim": head_dim}
    if wanted == "auto":
        names = preferred(device, dtype, num_tokens)
        return next(name for name in names if not obstacle(name, device, dtype, **shape))
    problem = obstacle(wanted, device, dtype, **shape)
    if problem:
        raise UserError(f"attention={wanted} {problem}; use attention=auto")
    return wanted
