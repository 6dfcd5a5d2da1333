"""AdamATan2 on the CPU in one pass over the memory, compiled by numba.

torch has no fused kernel for it, and its single operations read and write every number a dozen times. Here each is
read and written once (28 bytes a parameter) and many at a time: LLVM vectorises the loop, and the arctangent is a
polynomial so that it can.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from hrm_ray.machine_code import in_threads, njit
from hrm_ray.optim.adam_atan2 import Hyperparameters, Tensors

# Numbers that one call updates: the same whatever the number of threads, so that every one comes out alike.
CHUNK = 2**18

ZERO, ONE, HALF_PI = np.float32(0), np.float32(1), np.float32(math.pi / 2)
# atan(r) / r on 0 <= r <= 1 as a polynomial in r^2: minimal relative error, 2e-8, fitted to Chebyshev points (Lawson).
A0, A1, A2, A3, A4, A5, A6, A7, A8 = map(
    np.float32,
    (
        1.0,
        -0.3333307343200839,
        0.19992620614306966,
        -0.14203652174731407,
        0.10640959776032291,
        -0.07504343313556108,
        0.042692045238896754,
        -0.016068929838686605,
        0.002849960479062296,
    ),
)


def _equations(p, g, m, v, alpha1, beta2, alpha2, m_scale, v_scale, step_size, kept):
    """All arrays float32[n], all numbers float32; p, m and v in place. alpha is 1 - beta."""
    for i in range(p.size):
        m_i = m[i] + alpha1 * (g[i] - m[i])
        v_i = beta2 * v[i] + alpha2 * g[i] * g[i]
        m[i], v[i] = m_i, v_i
        y, x = m_i * m_scale, math.sqrt(v_i) * v_scale
        # Either atan(y / x), or a right angle of the sign of y less atan(x / y).
        is_steep = abs(y) > x
        low, high = (-x, y) if is_steep else (y, x)
        # Equal are 0 and 0, where atan2 is 0, but also infinite ones, which have no quotient. NaN goes through.
        r = low / high if abs(y) != x else math.copysign(ONE if x > ZERO else ZERO, y)
        s = r * r
        a = A8 * s + A7
        a = a * s + A6
        a = a * s + A5
        a = a * s + A4
        a = a * s + A3
        a = a * s + A2
        a = a * s + A1
        a = (a * s + A0) * r + math.copysign(HALF_PI if is_steep else ZERO, y)
        p[i] = p[i] * kept - step_size * a


def _compiled() -> Callable[..., None]:
    """`_equations` as machine code.

    Raises:
        Exception: whatever numba raises where it cannot compile.
    """
    function = njit(error_model="numpy", fastmath={"contract"})(_equations)
    function(*[np.empty(0, np.float32)] * 4, *[ZERO] * 7)
    return function


_update = _compiled()


def update(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, h: Hyperparameters
) -> None:
    """One update in place, by as many threads as torch uses.

    Args:
        params, exp_avgs, exp_avg_sqs: float32 on the CPU, contiguous.
        grads: float32 on the CPU.
    """
    numbers = [np.float32(x) for x in (1 - h.beta1, h.beta2, 1 - h.beta2, *h.scales, h.kept)]
    # Now, so that nothing has moved if one cannot be read.
    grads = [g.resolve_neg().contiguous() for g in grads]
    # Cut while others compute: together it takes as long as a twentieth of the published model's update.
    chunks = _chunks(params, grads, exp_avgs, exp_avg_sqs)
    num_threads = torch.get_num_threads() if sum(p.numel() for p in params) > CHUNK else 1
    in_threads((partial(_update, *chunk, *numbers) for chunk in chunks), num_threads)


def _chunks(*lists: Tensors) -> Iterator[tuple[np.ndarray, ...]]:
    """The same part of a parameter, its gradient and its moments, part after part."""
    for tensors in zip(*lists, strict=True):
        flat = [_flat(tensor) for tensor in tensors]
        for start in range(0, flat[0].size, CHUNK):
            yield tuple(array[start : start + CHUNK] for array in flat)


def _flat(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy().reshape(-1)  # no copy, since it is contiguous
