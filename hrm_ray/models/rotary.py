"""Rotary positions (Su et al. 2021, arXiv:2104.09864) in the layout of half rotation.

Shapes: B batch, N heads, S tokens, K width of a head.
"""

import torch
from torch import Tensor

from hrm_ray.config.arch import ROPE_THETA

Rope = tuple[Tensor, Tensor] | None  # what `rope_tables` gives, or no rotation


def rope_tables(num_tokens: int, head_dim: int, theta: float = ROPE_THETA) -> tuple[Tensor, Tensor]:
    """What rotary positions multiply with, [S, K] each (Su et al. 2021, arXiv:2104.09864, equation 34).

    The layout is that of half rotation: number i of a head is rotated with number i + K / 2. The first table holds the
    cosines, the second the sines, negative in the first half.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles_SK = torch.outer(torch.arange(num_tokens, dtype=torch.float32), frequencies).repeat(1, 2)
    sin_1, sin_2 = angles_SK.sin().chunk(2, dim=-1)
    return angles_SK.cos(), torch.cat((-sin_1, sin_2), dim=-1)


def apply_rope(x_BNSK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys by `rope_tables`; computed in their dtype (float32), returned in that of `x`."""
    x = x_BNSK.to(cos.dtype)  # once, so that the gradients of both terms are added before they are rounded
    # The halves change places by a flip: the compiler makes vector code of it, and none of two parts put together.
    other_half = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return (x * cos + other_half * sin).to(x_BNSK.dtype)
