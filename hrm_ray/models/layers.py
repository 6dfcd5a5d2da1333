"""Building blocks of the recursive models: the post-norm transformer block and its parts.

What always holds: parameters are float32 masters; the products run in `dtype` (float32 or bfloat16) with copies
of the weights made once an ACT step (`cast_weights`), since a recursive model uses each weight many times. Parameter
names are those of the published checkpoints.

Shapes: B batch, S tokens (P puzzle tokens, then C cells), D width, N heads, K width of a head, F inner width.
Source: Wang et al. 2025 (arXiv:2506.21734) and its public code.
"""

import math
from collections.abc import Iterable
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrm_ray.models import attention
from hrm_ray.models.rotary import Rope

# Standard deviation of a standard normal truncated at two sigma: what JAX's truncated normal divides by.
TRUNCATED_STD = 0.87962566103423978


def trunc_normal_(tensor: Tensor, std: float) -> Tensor:
    """Fill `tensor` from a normal truncated at two sigma whose standard deviation *after* truncation is `std`."""
    sigma = std / TRUNCATED_STD
    return nn.init.trunc_normal_(tensor, std=sigma, a=-2 * sigma, b=2 * sigma)


class Linear(nn.Module):
    """Dense layer with a float32 master weight [out, in] and an optional bias."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(trunc_normal_(torch.empty(out_features, in_features), in_features**-0.5))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self._copies: tuple[Tensor, Tensor | None] | None = None

    def cast(self, dtype: torch.dtype) -> None:
        """Make the copies that `forward` uses; gradients reach the masters through them."""
        # First free the old ones: torch adds gradients up on the stream of the oldest pass of which something is left,
        # and a CUDA graph must not reach back to a stream from before it.
        self._copies = None
        with (
            torch.enable_grad()
        ):  # they are the same for passes with and without gradients, as are compiled programs
            bias = None if self.bias is None else self.bias.to(dtype)
            self._copies = None if dtype == self.weight.dtype else (self.weight.to(dtype), bias)

    def __getstate__(self) -> dict[str, Any]:
        """Without the copies, which are no leaves and could not be copied or pickled."""
        return self.__dict__ | {"_copies": None}

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self._copies or (self.weight, self.bias)
        return F.linear(x, weight, bias)


def cast_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Refresh the compute copies of every `Linear` in `module`. Call before a pass over weights that may be new."""
    for layer in module.modules():
        if isinstance(layer, Linear):
            layer.cast(dtype)


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation over the last axis, without weight, computed in float32."""
    return F.rms_norm(x, (x.shape[-1],), eps=eps)


@cache
def _fused() -> ModuleType | None:
    """`fused_cpu`, where it can be compiled."""
    try:
        from hrm_ray.models import fused_cpu  # numba: a second to import
    except Exception:  # of any kind; torch's operations do the same
        return None
    return fused_cpu


def _fused_for(x: Tensor) -> ModuleType | None:
    """`fused_cpu`, where it takes `x`."""
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return None
    fused = _fused()
    return fused if fused and fused.takes(x) else None


def add_norm(x: Tensor, y: Tensor, eps: float) -> Tensor:
    """`rms_norm` of x + y."""
    if fused := _fused_for(x):
        return fused.add_rms_norm(x, y, eps)
    return rms_norm(x + y, eps)


def gated(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, of the two halves of the last axis."""
    if fused := _fused_for(gate_up):
        return fused.swiglu(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class Attention(nn.Module):
    """Non-causal multi-head attention; q, k and v come from one matrix. `kernel` is one of `attention.KERNELS`."""

    def __init__(self, hidden_size: int, num_heads: int, kernel: str = "sdpa"):
        super().__init__()
        self.attend = attention.kernel(kernel)
        self.head_dim = hidden_size // num_heads
        self.qkv_proj = Linear(hidden_size, 3 * hidden_size)
        self.o_proj = Linear(hidden_size, hidden_size)

    def forward(self, x_BSD: Tensor, rope: Rope) -> Tensor:
        qkv_BS3NK = self.qkv_proj(x_BSD).unflatten(-1, (3, -1, self.head_dim))
        return self.o_proj(self.attend(qkv_BS3NK, rope).flatten(-2))


def swiglu_width(hidden_size: int, expansion: float) -> int:
    """Inner width of SwiGLU: two thirds of expansion x width, rounded up to a multiple of 256."""
    return math.ceil(round(expansion * hidden_size * 2 / 3) / 256) * 256


class SwiGLU(nn.Module):
    """Gated feed-forward layer; gate and up projection are one matrix."""

    def __init__(self, hidden_size: int, expansion: float):
        super().__init__()
        width = swiglu_width(hidden_size, expansion)
        self.gate_up_proj = Linear(hidden_size, 2 * width)
        self.down_proj = Linear(width, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gated(self.gate_up_proj(x)))


class Block(nn.Module):
    """Post-norm transformer block: x = rms(x + attention(x)); x = rms(x + swiglu(x))."""

    def __init__(
        self, hidden_size: int, num_heads: int, expansion: float, norm_eps: float, attention: str = "sdpa"
    ):
        super().__init__()
        self.norm_eps = norm_eps
        self.self_attn = Attention(hidden_size, num_heads, attention)
        self.mlp = SwiGLU(hidden_size, expansion)

    def forward(self, x_BSD: Tensor, rope: Rope) -> Tensor:
        x_BSD = add_norm(x_BSD, self.self_attn(x_BSD, rope), self.norm_eps)
        return add_norm(x_BSD, self.mlp(x_BSD), self.norm_eps)


class MixerBlock(nn.Module):
    """Post-norm block whose tokens are mixed by a SwiGLU over the sequence axis (`mlp_t`) instead of attention."""

    def __init__(self, num_tokens: int, hidden_size: int, expansion: float, norm_eps: float):
        super().__init__()
        self.norm_eps = norm_eps
        self.mlp_t = SwiGLU(num_tokens, expansion)
        self.mlp = SwiGLU(hidden_size, expansion)

    def forward(self, x_BSD: Tensor, rope: Rope) -> Tensor:
        x_BDS = x_BSD.transpose(1, 2).contiguous()  # once, for all that reads it
        x_BDS = add_norm(x_BDS, self.mlp_t(x_BDS), self.norm_eps)  # over the tokens, as published
        x_BSD = x_BDS.transpose(1, 2).contiguous()
        return add_norm(x_BSD, self.mlp(x_BSD), self.norm_eps)


class ReasoningModule(nn.Module):
    """A stack of blocks that first adds its input injection to its state (the H or L module)."""

    def __init__(self, layers: Iterable[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, state_BSD: Tensor, injection_BSD: Tensor | float, rope: Rope) -> Tensor:
        x_BSD = state_BSD + injection_BSD
        for layer in self.layers:
            x_BSD = layer(x_BSD, rope)
        return x_BSD


class TokenEmbedding(nn.Module):
    """Table [count, D] for tokens or learned positions."""

    def __init__(self, count: int, hidden_size: int):
        super().__init__()
        self.embedding_weight = nn.Parameter(
            trunc_normal_(torch.empty(count, hidden_size), hidden_size**-0.5)
        )

    def forward(self) -> Tensor:
        """The whole table: as positions, those of all tokens."""
        return self.embedding_weight


class GridEmbedding(nn.Module):
    """Positions in a grid: that of a token is the sum of a learned vector for each of its A coordinates.

    The table has the vectors of one coordinate after those of the other. Leading tokens lie beyond the grid: each has
    coordinates that no other token has. At first, sums are as large as the vectors of `TokenEmbedding`.

    Args:
        coordinates: of the cells, integers [C, A] from 0; see `hrm_ray.data.tasks.base.Task.coordinates`.
        num_leading: P, tokens before them.
    """

    def __init__(self, coordinates: np.ndarray, num_leading: int, hidden_size: int):
        super().__init__()
        sizes_A = coordinates.max(axis=0) + 1
        leading_PA = sizes_A + np.arange(num_leading)[:, None]
        counts_A = sizes_A + num_leading
        rows_SA = np.concatenate([leading_PA, coordinates]) + counts_A.cumsum() - counts_A
        self.rows_SA: Tensor
        self.register_buffer("rows_SA", torch.tensor(rows_SA), persistent=False)
        self.embedding_weight = nn.Parameter(
            trunc_normal_(
                torch.empty(int(counts_A.sum()), hidden_size), (len(counts_A) * hidden_size) ** -0.5
            )
        )

    def forward(self) -> Tensor:
        """Of all tokens, [S, D]."""
        return F.embedding(self.rows_SA, self.embedding_weight).sum(1)


class PuzzleEmbedding(nn.Module):
    """One trainable vector a puzzle identifier, zero at first, trained by sparse sign-SGD.

    The table is a buffer, so neither the dense optimizer nor DDP sees it. A training pass takes the rows it
    needs as a leaf that collects their gradient; `take_gradients` hands both to the sparse optimizer.
    """

    def __init__(self, num_identifiers: int, size: int):
        super().__init__()
        self.weights: Tensor
        self.register_buffer("weights", torch.zeros(num_identifiers, size))
        self._looked_up: list[tuple[Tensor, Tensor]] = []

    def forward(self, identifiers_B: Tensor) -> Tensor:
        rows = self.weights[identifiers_B]
        if self.training and torch.is_grad_enabled():
            rows = rows.detach().requires_grad_()
            self._looked_up.append((identifiers_B, rows))
        return rows

    def take_gradients(self) -> tuple[Tensor, Tensor]:
        """Identifiers [n] and gradients [n, size] of all rows looked up since the last call (then forgotten)."""
        identifiers = torch.cat([ids for ids, _ in self._looked_up])
        gradients = torch.cat(
            [torch.zeros_like(rows) if rows.grad is None else rows.grad for _, rows in self._looked_up]
        )
        self.forget()
        return identifiers, gradients

    def forget(self) -> None:
        """Discard what the passes since then have looked up."""
        self._looked_up.clear()
