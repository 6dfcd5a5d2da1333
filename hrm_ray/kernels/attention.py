"""Rotary positions and full attention of short sequences in one pass, forwards and backwards; Triton kernels.

A program does one head of one sequence. What lies between the matrix product before and the one after is read once and
written once; rotation, re-arrangement and attention apart move twice as much forwards and five times backwards. All
scores of a row are at hand at once, so nothing is kept for the backward pass but queries, keys and values as they came.
Nothing is added up by several programs: the results are the same every time.

Shapes: B batch, S tokens, N heads, K width of a head, H = K / 2; in the kernels M rows of queries at a time, and all
keys, their number rounded up to a power of two (COLUMNS).
Source: Dao et al. 2022 (arXiv:2205.14135), section 3, of which this is the case of a single block of keys.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from hrm_ray.models.rotary import Rope

LOG2_E = tl.constexpr(1.4426950408889634)
# Rows of queries at a time, and warps for more than 64 tokens. With 82 only the backward pass on sm_90 then spills
# registers, 80 or 120 bytes a thread by Triton's version (none with 16 rows and 8 warps). On sm_80, which is refused,
# it would be 10 kB.
FORWARD = {"max_rows": 64, "warps": 4}
BACKWARD = {"max_rows": 128, "warps": 8}


@triton.jit
def _load(start, rows, S: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr):
    """[rows, WIDTH], zeros from row S on."""
    at = rows[:, None] * STRIDE + tl.arange(0, WIDTH)[None, :]
    return tl.load(start + at, rows[:, None] < S, 0.0)


@triton.jit
def _store(start, rows, x, S: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr):
    at = rows[:, None] * STRIDE + tl.arange(0, WIDTH)[None, :]
    tl.store(start + at, x.to(start.dtype.element_ty), rows[:, None] < S)


@triton.jit
def _rotate(x_1, x_2, cos, sin, rows, sign, S: tl.constexpr, H: tl.constexpr):
    """Both halves of heads, by the tables of `rope_tables`; back where `sign` is -1."""
    c = _load(cos, rows, S, 2 * H, H)
    s = _load(sin + H, rows, S, 2 * H, H) * sign  # those of the second half have their own signs
    f_1, f_2 = x_1.to(tl.float32), x_2.to(tl.float32)
    return (f_1 * c - f_2 * s).to(x_1.dtype), (f_2 * c + f_1 * s).to(x_2.dtype)


@triton.jit
def _load_heads(
    start, cos, sin, rows, S: tl.constexpr, STRIDE: tl.constexpr, H: tl.constexpr, ROTATES: tl.constexpr
):
    """Queries or keys of a head, in halves, rotated."""
    x_1, x_2 = _load(start, rows, S, STRIDE, H), _load(start + H, rows, S, STRIDE, H)
    if ROTATES:
        x_1, x_2 = _rotate(x_1, x_2, cos, sin, rows, 1, S, H)
    return x_1, x_2


@triton.jit
def _softmax(q_1, q_2, k_1, k_2, columns, S: tl.constexpr, H: tl.constexpr):
    """Of the scores, [M, columns] in float32: what is to be divided by the second result, [M, 1]."""
    scores = tl.dot(q_2, tl.trans(k_2), tl.dot(q_1, tl.trans(k_1)))
    scores = tl.where(columns[None, :] < S, scores * (LOG2_E / tl.sqrt(2.0 * H)), float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return weights, tl.sum(weights, 1)[:, None]


@triton.jit
def _forward(
    qkv, cos, sin, out,
    S: tl.constexpr, N: tl.constexpr, H: tl.constexpr, ROTATES: tl.constexpr, COLUMNS: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = N * 2 * H
    place = tl.program_id(0).to(tl.int64)
    q = qkv + place // N * (S * 3 * D) + place % N * (2 * H)
    out += place // N * (S * D) + place % N * (2 * H)
    columns = tl.arange(0, COLUMNS)
    k_1, k_2 = _load_heads(q + D, cos, sin, columns, S, 3 * D, H, ROTATES)
    v = _load(q + 2 * D, columns, S, 3 * D, 2 * H)
    for first in range(0, S, M):
        rows = first + tl.arange(0, M)
        q_1, q_2 = _load_heads(q, cos, sin, rows, S, 3 * D, H, ROTATES)
        weights, total = _softmax(q_1, q_2, k_1, k_2, columns, S, H)
        _store(out, rows, tl.dot(weights.to(v.dtype), v) / total, S, D, 2 * H)


@triton.jit
def _backward(
    qkv, cos, sin, out_gradient, gradient,
    S: tl.constexpr, N: tl.constexpr, H: tl.constexpr, ROTATES: tl.constexpr, COLUMNS: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = N * 2 * H
    place = tl.program_id(0).to(tl.int64)
    q = qkv + place // N * (S * 3 * D) + place % N * (2 * H)
    gradient += place // N * (S * 3 * D) + place % N * (2 * H)
    out_gradient += place // N * (S * D) + place % N * (2 * H)
    columns = tl.arange(0, COLUMNS)
    k_1, k_2 = _load_heads(q + D, cos, sin, columns, S, 3 * D, H, ROTATES)
    v = _load(q + 2 * D, columns, S, 3 * D, 2 * H)
    dk_1, dk_2 = tl.zeros((COLUMNS, H), tl.float32), tl.zeros((COLUMNS, H), tl.float32)
    dv = tl.zeros((COLUMNS, 2 * H), tl.float32)
    for first in range(0, S, M):
        rows = first + tl.arange(0, M)
        q_1, q_2 = _load_heads(q, cos, sin, rows, S, 3 * D, H, ROTATES)
        do = _load(out_gradient, rows, S, D, 2 * H)
        weights, total = _softmax(q_1, q_2, k_1, k_2, columns, S, H)
        p = weights / total
        dp = tl.dot(do, tl.trans(v))
        ds = (p * (dp - tl.sum(p * dp, 1)[:, None]) / tl.sqrt(2.0 * H)).to(v.dtype)
        dv = tl.dot(tl.trans(p.to(v.dtype)), do, dv)
        dk_1, dk_2 = tl.dot(tl.trans(ds), q_1, dk_1), tl.dot(tl.trans(ds), q_2, dk_2)
        dq_1, dq_2 = tl.dot(ds, k_1), tl.dot(ds, k_2)
        if ROTATES:
            dq_1, dq_2 = _rotate(dq_1, dq_2, cos, sin, rows, -1, S, H)
        _store(gradient, rows, dq_1, S, 3 * D, H)
        _store(gradient + H, rows, dq_2, S, 3 * D, H)
    if ROTATES:
        dk_1, dk_2 = _rotate(dk_1, dk_2, cos, sin, columns, -1, S, H)
    _store(gradient + D, columns, dk_1, S, 3 * D, H)
    _store(gradient + D + H, columns, dk_2, S, 3 * D, H)
    _store(gradient + 2 * D, columns, dv, S, 3 * D, 2 * H)


def constants(qkv: Tensor, rotates: bool, max_rows: int, warps: int) -> dict[str, Any]:
    """What a kernel is compiled for: the shapes, how many rows it does at a time, and with how many warps."""
    _, S, _, N, K = qkv.shape
    columns = max(16, triton.next_power_of_2(S))  # a product takes 16 at least
    launch = {"M": min(max_rows, columns), "num_warps": warps if columns > 64 else 4, "num_stages": 1}
    return {"S": S, "N": N, "H": K // 2, "ROTATES": rotates, "COLUMNS": columns} | launch


@triton_op("hrm_ray::attend_fused", mutates_args=())
def _attend(qkv: Tensor, cos: Tensor, sin: Tensor, rotates: bool) -> Tensor:
    B, S, _, N, K = qkv.shape
    out = qkv.new_empty(B, S, N, K)
    wrap_triton(_forward)[(B * N,)](qkv, cos, sin, out, **constants(qkv, rotates, **FORWARD))
    return out


@triton_op("hrm_ray::attend_fused_backward", mutates_args=())
def _attend_backward(out_gradient: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, rotates: bool) -> Tensor:
    B, _, _, N, _ = qkv.shape
    gradient = torch.empty_like(qkv)
    wrap_triton(_backward)[(B * N,)](
        qkv, cos, sin, out_gradient, gradient, **constants(qkv, rotates, **BACKWARD)
    )
    return gradient


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: Tensor) -> None:
    *tensors, ctx.rotates = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, out_gradient: Tensor) -> tuple[Tensor | None, ...]:
    return _attend_backward(out_gradient.contiguous(), *ctx.saved_tensors, ctx.rotates), None, None, None


_attend.register_autograd(_differentiate, setup_context=_keep)


def fused_attention(qkv_BS3NK: Tensor, rope: Rope) -> Tensor:
    """An `AttentionKernel`; for which sequences and heads, see `PACKAGES` in models/attention.py.

    Args:
        qkv_BS3NK: bfloat16 on a GPU, in any strides; with a gradient or without.
        rope: tables in float32, or None.

    Returns:
        [B, S, N, K], contiguous.
    """
    qkv = qkv_BS3NK.contiguous()
    cos, sin = rope or (qkv, qkv)  # not read without rotation
    return _attend(qkv, cos, sin, rope is not None)
