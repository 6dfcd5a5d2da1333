"""What is between the matrix products of a block, on the CPU: one pass over the memory each, compiled by numba.

torch has no kernels for these. Its single operations read and write every activation many times, and keep more of them
for the gradient than is needed, which in small models takes longer than the products. Both kernels compute in float32
and round once at the end, as torch's compiler would do; compiled models do not come here.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numba import types
from numba.extending import overload, register_jitable
from torch import Tensor

from hrm_ray.machine_code import in_threads, njit

ONE, HALF, LOG2_E = np.float32(1), np.float32(0.5), np.float32(1.4426950408889634)
LEAST, MOST = np.float32(-126), np.float32(126)  # exponents that float32 has
ROUNDER = np.float32(1.5 * 2**23)  # adding it leaves a whole number in the last bits
# 2^r on -1/2 <= r <= 1/2: minimal relative error, 7e-8, fitted to Chebyshev points (Lawson).
E0, E1, E2, E3, E4, E5 = map(
    np.float32,
    (
        1.0000000716553012,
        0.6931469670628845,
        0.2402211972075149,
        0.055507132750658515,
        0.00967554150262148,
        0.0013276471959515403,
    ),
)
_0X7FFF, _1, _16, _23 = np.uint32(0x7FFF), np.uint32(1), np.uint32(16), np.int32(23)


def wide(value):
    """An element as float32: bfloat16 comes as its bits, uint16."""


@overload(wide, inline="always")
def _wide(value):
    if value == types.uint16:
        return lambda value: np.uint32(np.uint32(value) << _16).view(np.float32)
    return lambda value: value


def narrow(value, array):
    """float32 `value` as an element of `array`, rounded to nearest, ties to even; NaN stays one."""


@overload(narrow, inline="always")
def _narrow(value, array):
    if array.dtype == types.uint16:

        def bfloat16(value, array):
            bits = np.float32(value).view(np.uint32)
            is_odd = np.uint32(np.uint32(bits >> _16) & _1)
            return np.uint16(np.uint32(bits + _0X7FFF + is_odd) >> _16)

        return bfloat16
    return lambda value, array: value


@register_jitable(inline="always")
def sigmoid(x):
    """1 / (1 + exp(-x)), float32."""
    t = min(max(-x * LOG2_E, LEAST), MOST)
    whole = t + ROUNDER
    r = t - (whole - ROUNDER)
    p = ((((E5 * r + E4) * r + E3) * r + E2) * r + E1) * r + E0
    # numba widens what it adds and shifts.
    exponent = np.int32(np.float32(whole).view(np.int32) << _23)
    exp = np.int32(np.float32(p).view(np.int32) + exponent).view(np.float32)
    return ONE / (ONE + exp)


FLAGS: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract"}}


@njit(**FLAGS)
def _swiglu(gate_up, out):
    num_rows, width = out.shape
    for i in range(num_rows):
        for j in range(width):
            gate, up = wide(gate_up[i, j]), wide(gate_up[i, width + j])
            out[i, j] = narrow(gate * sigmoid(gate) * up, out)


@njit(**FLAGS)
def _swiglu_backward(gate_up, grad, out):
    num_rows, width = grad.shape
    for i in range(num_rows):
        for j in range(width):
            gate, up, g = wide(gate_up[i, j]), wide(gate_up[i, width + j]), wide(grad[i, j])
            s = sigmoid(gate)
            silu = gate * s
            out[i, j] = narrow(g * up * (s + silu * (ONE - s)), out)
            out[i, width + j] = narrow(g * silu, out)


REORDERED: dict[str, Any] = {
    "error_model": "numpy",
    "fastmath": {"contract", "reassoc"},
}  # for vectorised sums


@njit(**REORDERED)
def _add_rms_norm(x, y, out, rstd, eps):
    num_rows, width = out.shape
    for i in range(num_rows):
        squares = np.float32(0)
        for j in range(width):
            z = wide(x[i, j]) + wide(y[i, j])
            squares += z * z
        r = ONE / np.sqrt(squares / np.float32(width) + eps)
        rstd[i] = r
        for j in range(width):
            out[i, j] = narrow((wide(x[i, j]) + wide(y[i, j])) * r, out)


@njit(**REORDERED)
def _add_rms_norm_backward(normed, rstd, grad, out):
    num_rows, width = out.shape
    for i in range(num_rows):
        along = np.float32(0)
        for j in range(width):
            along += wide(grad[i, j]) * wide(normed[i, j])
        along /= np.float32(width)
        r = rstd[i]
        for j in range(width):
            out[i, j] = narrow((wide(grad[i, j]) - wide(normed[i, j]) * along) * r, out)


def _compile() -> None:
    """Now, so that nothing fails later."""
    for dtype in (np.float32, np.uint16):
        one, two, rstd = np.empty((0, 1), dtype), np.empty((0, 2), dtype), np.empty(0, np.float32)
        _swiglu(two, one)
        _swiglu_backward(two, one, two)
        _add_rms_norm(one, one, one, rstd, HALF)
        _add_rms_norm_backward(one, rstd, one, one)


_compile()
FEW = 2**15  # elements for which a second thread is not worth waking


def takes(x: Tensor) -> bool:
    """Whether the functions below can be used for `x`."""
    # Not where torch is to see or to record every operation, nor for tensors that only say what would be done.
    is_plain = type(x) in (Tensor, torch.nn.Parameter) and torch._C._len_torch_dispatch_stack() == 0
    return is_plain and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up.

    Args:
        gate_up: [..., 2 F], float32 or bfloat16 on the CPU: the gates, then what they let through.

    Returns:
        [..., F].
    """
    return _SwiGLU.apply(gate_up)


def add_rms_norm(x: Tensor, y: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation of x + y over the last axis, without weight.

    Args:
        x, y: [..., D] of one shape and type, float32 or bfloat16 on the CPU.
    """
    return _AddRMSNorm.apply(x, y, eps)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        out = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
        _over_rows(_swiglu, _rows(gate_up), _rows(out))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        out = torch.empty_like(gate_up)
        _over_rows(_swiglu_backward, _rows(gate_up), _rows(grads[0].contiguous()), _rows(out))
        return out


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, eps: float) -> Tensor:
        x, y = x.contiguous(), y.contiguous()
        out, rstd = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
        normalise = lambda x, y, out, rstd: _add_rms_norm(x, y, out, rstd, np.float32(eps))  # noqa: E731
        _over_rows(normalise, _rows(x), _rows(y), _rows(out), rstd.view(-1).numpy())
        ctx.save_for_backward(out, rstd)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, rstd = ctx.saved_tensors
        out = torch.empty_like(normed)
        _over_rows(
            _add_rms_norm_backward,
            _rows(normed),
            rstd.view(-1).numpy(),
            _rows(grads[0].contiguous()),
            _rows(out),
        )
        return out, out, None


def _rows(x: Tensor) -> np.ndarray:
    """`x`, contiguous, as a matrix whose rows are its last axis; bfloat16 as its bits."""
    x = x.detach()
    numbers = x.view(torch.uint16) if x.dtype == torch.bfloat16 else x
    return numbers.numpy().reshape(-1, x.shape[-1])


def _over_rows(function: Callable[..., None], *arrays: np.ndarray) -> None:
    """Run `function` over all rows of `arrays`, by as many threads as torch uses; rows do not depend on each other."""
    num_threads = torch.get_num_threads() if arrays[0].size > FEW else 1
    if num_threads == 1:
        function(*arrays)
        return
    per_piece = -(-len(arrays[0]) // num_threads)
    pieces = (slice(start, start + per_piece) for start in range(0, len(arrays[0]), per_piece))
    in_threads((partial(function, *(array[piece] for array in arrays)) for piece in pieces), num_threads)
