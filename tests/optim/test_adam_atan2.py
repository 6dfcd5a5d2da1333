"""Every backend against the equations in float64, and the two forms' first steps."""

import math

import pytest
import torch

from hrm_ray.errors import UserError
from hrm_ray.optim.adam_atan2 import BACKENDS, AdamATan2

SHAPES = [(1,), (7,), (3, 5), (64, 33), (0, 4)]


def float64_steps(params, grads_by_step, lr, betas, weight_decay, bias_correction):
    """The equations, scalar by scalar in their plainest form."""
    beta1, beta2 = betas
    params = [p.double() for p in params]
    m = [torch.zeros_like(p) for p in params]
    v = [torch.zeros_like(p) for p in params]
    for t, grads in enumerate(grads_by_step, start=1):
        c1, c2 = 1 - beta1**t, 1 - beta2**t
        for i, g in enumerate(grads):
            m[i] = beta1 * m[i] + (1 - beta1) * g.double()
            v[i] = beta2 * v[i] + (1 - beta2) * g.double() ** 2
            params[i] = params[i] * (1 - lr * weight_decay)
            if bias_correction == "outside":
                params[i] = params[i] - lr / c1 * torch.atan2(m[i], v[i].sqrt() / math.sqrt(c2))
            else:
                params[i] = params[i] - lr * torch.atan2(m[i] / c1, (v[i] / c2).sqrt())
    return params


@pytest.mark.parametrize("lr", [1e-4, 3e-2])
@pytest.mark.parametrize("weight_decay", [0.0, 1.0])
@pytest.mark.parametrize("bias_correction", ["outside", "inside"])
@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_against_float64(backend, bias_correction, weight_decay, lr):
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in SHAPES]
    scales = [
        1e-8,
        1.0,
        1e4,
        0.0,
        1.0,
    ]  # tiny, huge and vanishing gradients: there is no epsilon to hide behind
    steps = [
        [torch.randn(shape, generator=generator) * scale for shape, scale in zip(SHAPES, scales, strict=True)]
        for _ in range(8)
    ]
    params = [torch.nn.Parameter(p.clone()) for p in start]
    optimizer = AdamATan2(
        params,
        lr=lr,
        betas=(0.9, 0.95),
        weight_decay=weight_decay,
        bias_correction=bias_correction,
        backend=backend,
    )
    for grads in steps:
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
    expected = float64_steps(start, steps, lr, (0.9, 0.95), weight_decay, bias_correction)
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach().double(), e, rtol=1e-5, atol=1e-6 * max(1, lr * 100))


@pytest.mark.parametrize(("bias_correction", "moved"), [("outside", 0.997), ("inside", math.pi / 4)])
def test_first_step(bias_correction, moved):
    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.tensor([1.0, -1e-12, 1e12])
    AdamATan2([p], lr=1.0, weight_decay=0, bias_correction=bias_correction).step()
    torch.testing.assert_close(p.detach(), torch.tensor([-moved, moved, -moved]), atol=5e-4, rtol=0)


def test_state_moves_between_backends():
    def train(backend, steps, state=None, start=None):
        p = torch.nn.Parameter(torch.ones(50) if start is None else start)
        optimizer = AdamATan2([p], lr=1e-2, backend=backend)
        if state:
            optimizer.load_state_dict(state)
        for step in steps:
            p.grad = torch.sin(torch.arange(50.0) * step)
            optimizer.step()
        return p.detach().clone(), optimizer.state_dict()

    whole, _ = train("foreach", range(6))
    half, state = train("reference", range(3))
    other_half, _ = train("foreach", range(3, 6), state, half)
    torch.testing.assert_close(other_half, whole)


def test_unknown_backend():
    with pytest.raises(UserError, match="known: auto, reference, foreach"):
        AdamATan2([torch.nn.Parameter(torch.ones(1))], backend="cude")
