"""The kernels of attention against exact arithmetic, and which of them is taken where."""

import pickle
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from hrm_ray.errors import TransientError, UserError
from hrm_ray.models import attention
from hrm_ray.models.attention import KERNELS, PACKAGES, kernel, obstacle, preferred, resolve_attention
from hrm_ray.models.rotary import apply_rope, rope_tables

FAILURE = attention._failure
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
DEVICES = [CPU, *([GPU] if torch.cuda.is_available() else [])]
# Of the norm of the largest gradient: two units of bfloat16's last place, and eight of float32's, whose sums of up to
# 131 products round as often.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3}
SHAPES = [(1, 32), (16, 32), (17, 24), (82, 64), (128, 64), (131, 128)]  # tokens, width of a head
FLASH = [name for name in PACKAGES if name.startswith("flash")]


def exact(qkv, rope, gradient):
    """Attention and its gradient, in float64."""
    qkv = qkv.detach().double().requires_grad_()
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    if rope is not None:
        q, k = (apply_rope(x, *(table.double() for table in rope)) for x in (q, k))
    scores = (q @ k.mT / q.shape[-1] ** 0.5).exp()
    out = (scores / scores.sum(-1, keepdim=True) @ v).transpose(1, 2)
    return out, *torch.autograd.grad(out, qkv, gradient.double())


def assert_exact(attend, device, num_tokens, head_dim, dtype, rotates):
    torch.manual_seed(0)
    qkv = torch.randn(2, num_tokens, 3, 3, head_dim).to(device, dtype).requires_grad_()
    gradient = torch.randn(2, num_tokens, 3, head_dim).to(device, dtype)
    rope = tuple(table.to(device) for table in rope_tables(num_tokens, head_dim)) if rotates else None
    out = attend(qkv, rope)
    assert out.dtype == dtype
    for ours, expected in zip(
        (out, *torch.autograd.grad(out, qkv, gradient)), exact(qkv, rope, gradient), strict=True
    ):
        assert ours.shape == expected.shape
        assert (ours - expected).norm() <= TOLERANCE[dtype] * expected.norm()


@pytest.mark.parametrize("rotates", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("num_tokens", "head_dim"), SHAPES)
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_every_kernel_that_is_here_is_exact_to_its_dtype(device, name, num_tokens, head_dim, dtype, rotates):
    problem = obstacle(name, device, dtype, num_tokens=num_tokens, head_dim=head_dim)
    if problem:
        pytest.skip(f"{name} {problem}")
    assert_exact(kernel(name), device, num_tokens, head_dim, dtype, rotates)


@pytest.mark.parametrize("name", ["sdpa", "matmul", "flash2"])
def test_kernels_can_be_pickled(hopper, name):
    """With a model."""
    hopper("flash_attn", in_their_layout)
    qkv, rope = torch.randn(2, 5, 3, 3, 8), rope_tables(5, 8)
    assert torch.equal(pickle.loads(pickle.dumps(kernel(name)))(qkv, rope), kernel(name)(qkv, rope))


@pytest.fixture
def hopper(monkeypatch):
    """A machine that says it has a Hopper GPU, and whatever packages a test puts there."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention, "_failure", lambda *kind: None)  # there is none to try them on

    def install(module: str, attend) -> None:
        held = attend and SimpleNamespace(flash_attn_func=attend, fused_attention=attend)
        monkeypatch.setitem(sys.modules, module, held)

    for package in PACKAGES.values():
        install(package.module, None)  # importing it is an error
    return install


def in_their_layout(q, k, v):
    """What the packages' function computes: [B, S, N, K] in and out."""
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


@pytest.mark.parametrize("name", FLASH)
@pytest.mark.parametrize("attend", [in_their_layout, lambda *qkv: (in_their_layout(*qkv), None)])
def test_packages_are_called_in_their_layout(hopper, name, attend):
    hopper(PACKAGES[name].module, attend)
    qkv = torch.randn(2, 5, 3, 3, 8)
    torch.testing.assert_close(kernel(name)(qkv, None), kernel("sdpa")(qkv, None))


def choose(device=GPU, dtype=torch.bfloat16, num_tokens=82, head_dim=64, wanted="auto"):
    return resolve_attention(wanted, device, dtype, num_tokens=num_tokens, head_dim=head_dim)


def test_the_best_that_is_there_is_taken(hopper, monkeypatch):
    assert choose() == "sdpa"
    hopper("flash_attn", in_their_layout)
    assert choose() == "flash2"
    hopper("flash_attn_interface", in_their_layout)
    assert choose() == "flash3"
    hopper("hrm_ray.kernels.attention", in_their_layout)
    assert choose() == "flash3"
    assert choose(wanted="fused") == choose(wanted="fused", num_tokens=128, head_dim=32) == "fused"
    assert choose(wanted="flash2") == "flash2"
    assert choose(dtype=torch.float32) == choose(head_dim=12) == choose(head_dim=512) == "sdpa"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert choose() == "flash2"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose() == "sdpa"
    assert choose(CPU) == "matmul"
    assert choose(CPU, dtype=torch.float32, num_tokens=16) == "matmul"
    assert choose(CPU, num_tokens=901) == choose(CPU, dtype=torch.float32) == "sdpa"
    assert choose(CPU, dtype=torch.float64, num_tokens=16) == "sdpa"


def test_a_package_without_kernels_for_this_gpu_is_not_taken(hopper, monkeypatch):
    def attend(*qkv):
        raise RuntimeError("no kernel image is available")

    def no_room(*qkv):
        raise torch.OutOfMemoryError("CUDA out of memory")

    hopper("flash_attn", attend)
    monkeypatch.setattr(attention, "_failure", FAILURE)
    FAILURE.cache_clear()
    on_cpu = partial(FAILURE, "flash2", CPU, 8)
    assert on_cpu(64) == "fails on cpu: no kernel image is available"
    hopper("flash_attn", in_their_layout)
    assert on_cpu(32) is None  # forwards and backwards
    hopper("flash_attn", lambda q, k, v: in_their_layout(q, k, v) * 1.1)
    assert on_cpu(128) == "computes something else on cpu"
    hopper("flash_attn", no_room)
    with pytest.raises(TransientError, match="not enough memory on cpu to test the attention kernel"):
        on_cpu(16)
    hopper("flash_attn", in_their_layout)
    assert on_cpu(16) is None  # that was not remembered
    monkeypatch.setattr(attention, "_failure", lambda *kind: on_cpu(64))
    assert choose() == "sdpa"
    with pytest.raises(UserError, match="attention=flash2 fails on cpu: no kernel image is available; use"):
        choose(wanted="flash2")
    FAILURE.cache_clear()


def test_the_last_choice_runs_anywhere():
    for device in (CPU, GPU):
        *_, last = preferred(device, torch.bfloat16, 82)
        assert obstacle(last, device, torch.float32, num_tokens=82, head_dim=7) is None


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"wanted": "flash2", "device": CPU}, "attention=flash2 needs a GPU; use attention=auto"),
        ({"wanted": "flash3", "dtype": torch.float32}, "attention=flash3 is for bfloat16, not float32"),
        (
            {"wanted": "flash2", "head_dim": 12},
            "attention=flash2 is for heads of 8, 16, ... 256 numbers, not 12",
        ),
        ({"wanted": "flash2"}, "attention=flash2 cannot import flash_attn: undefined symbol"),
        ({"wanted": "flash3"}, "attention=flash3 cannot import flash_attn_interface: import of"),
        ({"wanted": "fused", "head_dim": 48}, "attention=fused is for heads of 32 or 64 numbers, not 48"),
        ({"wanted": "fused", "num_tokens": 901}, "attention=fused is for 128 tokens at most, not 901"),
        ({"wanted": "flash"}, "attention=flash is unknown; known: fused, flash3, flash2, sdpa, matmul"),
    ],
)
def test_what_cannot_run_is_said(hopper, monkeypatch, tmp_path, choice, said):
    monkeypatch.delitem(sys.modules, "flash_attn")
    (tmp_path / "flash_attn.py").write_text(
        "raise ImportError('undefined symbol: _ZN3c10')"
    )  # another torch's
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=said):
        choose(**choice)
