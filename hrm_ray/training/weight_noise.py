"""Noise on all weights during a step, as in "Grokking" (Power et al. 2022, figure 2; openai/grok, `weight_noise`).

The weights are moved before the pass and moved back before the optimizer: the gradient by noisy weights is the gradient
by the weights themselves. The published code draws for each pass; here it is for each ACT step, of all its slots.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hrm_ray.draws import Purpose
from hrm_ray.models.noise import key_of, noise_of


@contextmanager
def noisy_weights(model: nn.Module, std: float, seed: int, supervision_step: int) -> Iterator[None]:
    """Inside, every parameter has Gaussian noise, which is a function of (seed, supervision step, parameter).

    Args:
        std: its standard deviation; 0: nothing is done.
    """
    if not std:
        yield
        return
    parameters: list[Tensor] = list(model.parameters())
    own = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for index, p in enumerate(parameters):
            key = key_of(seed, Purpose.WEIGHT_NOISE, supervision_step, index).view(1).to(p.device)
            p.add_(noise_of(std, p.dtype, p.device).draw(key, p.numel()).view_as(p))
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(parameters, own)
