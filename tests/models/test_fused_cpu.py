"""The kernels between the products, against the same in torch and in float64."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hrm_ray.models import fused_cpu, layers
from tests.training.recorder import Recorder

EPS = 1e-5
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8}


def plain_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def plain_norm(xy: Tensor) -> Tensor:
    x, y = xy.unbind()
    return layers.rms_norm(x + y, EPS)


def fused_norm(xy: Tensor) -> Tensor:
    return fused_cpu.add_rms_norm(*xy.unbind(), EPS)


PAIRS = {"swiglu": (fused_cpu.swiglu, plain_swiglu), "norm": (fused_norm, plain_norm)}


def both(function, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """What the function gives, and the gradient of its argument."""
    x = x.detach().requires_grad_()
    out = function(x)
    return out.detach(), *torch.autograd.grad(out, x, grad.to(x.dtype))


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("shape", [(2, 7, 10), (2, 1, 256), (2, 0, 4), (2, 1300, 66)], ids=str)
def test_it_is_as_exact_as_its_type_allows(name, shape, dtype):
    fused, plain = PAIRS[name]
    torch.manual_seed(0)
    x = (4 * torch.randn(shape)).to(dtype)
    grad = torch.randn_like(plain(x.float())).to(dtype)
    for own, exact in zip(both(fused, x, grad), both(plain, x.double(), grad), strict=True):
        assert own.dtype == dtype and own.shape == exact.shape
        # Of a difference in which nearly all is cancelled, rounded terms leave more than a last bit.
        torch.testing.assert_close(own.double(), exact, rtol=ROUNDING[dtype], atol=4 * ROUNDING[dtype])


@pytest.mark.parametrize("name", PAIRS)
def test_any_number_of_threads_gives_the_same_bits(name, monkeypatch):
    fused, plain = PAIRS[name]
    x = torch.randn(2, 1301, 66).bfloat16()
    grad = torch.randn_like(plain(x))
    found = []
    for num_threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=num_threads: count)
        found.append(both(fused, x, grad))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_what_is_not_contiguous_is_read_rightly():
    x = torch.randn(6, 5, 8)
    assert torch.equal(fused_cpu.swiglu(x.transpose(0, 1)), fused_cpu.swiglu(x.transpose(0, 1).contiguous()))
    y = torch.randn(5, 6, 8).transpose(0, 1)
    assert torch.equal(fused_cpu.add_rms_norm(x, y, EPS), fused_cpu.add_rms_norm(x, y.contiguous(), EPS))
    grad = torch.ones(1).expand(6, 5, 4)
    assert torch.equal(both(fused_cpu.swiglu, x, grad)[1], both(fused_cpu.swiglu, x, grad.contiguous())[1])


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_extreme_numbers(dtype):
    gates = torch.tensor(
        [0.0, -0.0, 1e-30, 80, -80, 1e4, -1e4, 1e30, -1e30, torch.inf, torch.nan], dtype=dtype
    )
    out = fused_cpu.swiglu(torch.stack((gates, torch.full_like(gates, 2)), 1))[:, 0]
    torch.testing.assert_close(
        out, plain_swiglu(torch.stack((gates, torch.full_like(gates, 2)), 1))[:, 0], equal_nan=True
    )
    x = torch.zeros(3, 4, dtype=dtype)
    x[1, 2], x[2, 0] = torch.nan, 1e15
    own, plain = fused_cpu.add_rms_norm(x, x, EPS), layers.rms_norm(x + x, EPS)
    torch.testing.assert_close(own, plain, equal_nan=True)


def test_it_is_for_plain_tensors_on_the_cpu():
    assert fused_cpu.takes(torch.ones(1)) and fused_cpu.takes(torch.ones(1, dtype=torch.bfloat16))
    assert not fused_cpu.takes(torch.ones(1, dtype=torch.float64))
    assert not fused_cpu.takes(torch.ones(1, device="meta"))
    with torch._subclasses.FakeTensorMode():
        assert not fused_cpu.takes(torch.ones(1))
    plain = torch.ones(1)
    with Recorder():
        assert not fused_cpu.takes(plain)


def test_compiled_models_do_not_come_here(monkeypatch):
    def fused():
        raise AssertionError("called")

    monkeypatch.setattr(layers, "_fused", fused)
    x = torch.randn(3, 8)
    compiled = torch.compile(layers.gated, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), plain_swiglu(x))
    with pytest.raises(AssertionError, match="called"):
        layers.gated(x)


@pytest.fixture
def no_numba(monkeypatch):
    """The kernels cannot be imported, as where numba cannot compile."""
    monkeypatch.setitem(sys.modules, "hrm_ray.models.fused_cpu", None)
    monkeypatch.delattr("hrm_ray.models.fused_cpu", raising=False)
    layers._fused.cache_clear()
    yield
    layers._fused.cache_clear()


def test_without_numba_torch_does_it(no_numba):
    x, y = torch.randn(3, 8), torch.randn(3, 8)
    assert layers._fused() is None
    assert torch.equal(layers.gated(x), plain_swiglu(x))
    assert torch.equal(layers.add_norm(x, y, EPS), layers.rms_norm(x + y, EPS))
