"""The kernels of attention against exact arithmetic, and which of them is taken where."""

import pickle
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from hrm_ray.errors import UserError
from hrm_ray.models.attention import KERNELS, kernel, obstacle, preferred, resolve_attention
from hrm_ray.models.rotary import apply_rope, rope_tables

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
DEVICES = [CPU, *([GPU] if torch.cuda.is_available() else [])]
# Of the norm of the largest gradient: two units of bfloat16's last place, and eight of float32's, whose sums of up to
# 131 products round as often.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3}
SHAPES = [(1, 32), (16, 32), (17, 24), (82, 64), (128, 64), (131, 128)]  # tokens, width of a head


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
    problem = obstacle(name, device, dtype, head_dim=head_dim)
    if problem:
        pytest.skip(f"{name} {problem}")
    assert_exact(kernel(name), device, num_tokens, head_dim, dtype, rotates)


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_can_be_pickled(hopper, name):
    """With a model."""
    hopper(in_their_layout)
    qkv, rope = torch.randn(2, 5, 3, 3, 8), rope_tables(5, 8)
    assert torch.equal(pickle.loads(pickle.dumps(kernel(name)))(qkv, rope), kernel(name)(qkv, rope))


@pytest.fixture
def hopper(monkeypatch):
    """A machine that says it has a Hopper GPU, and the package's function that a test puts there."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def install(attend) -> None:
        monkeypatch.setitem(sys.modules, "flash_attn", attend and SimpleNamespace(flash_attn_func=attend))

    install(None)  # importing it is an error
    return install


def in_their_layout(q, k, v):
    """What the package's function computes: [B, S, N, K] in and out."""
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


@pytest.mark.parametrize("attend", [in_their_layout, lambda *qkv: (in_their_layout(*qkv), None)])
def test_the_package_is_called_in_its_layout(hopper, attend):
    hopper(attend)
    qkv = torch.randn(2, 5, 3, 3, 8)
    torch.testing.assert_close(kernel("flash2")(qkv, None), kernel("sdpa")(qkv, None))


def choose(device=GPU, dtype=torch.bfloat16, num_tokens=82, head_dim=64, wanted="auto"):
    return resolve_attention(wanted, device, dtype, num_tokens=num_tokens, head_dim=head_dim)


def test_the_best_that_is_there_is_taken(hopper, monkeypatch):
    assert choose() == "sdpa"
    hopper(in_their_layout)
    assert choose() == choose(wanted="flash2") == "flash2"
    assert choose(dtype=torch.float32) == choose(head_dim=12) == choose(head_dim=512) == "sdpa"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose() == "sdpa"
    assert choose(CPU) == "matmul"
    assert choose(CPU, dtype=torch.float32, num_tokens=16) == "matmul"
    assert choose(CPU, num_tokens=901) == choose(CPU, dtype=torch.float32) == "sdpa"
    assert choose(CPU, dtype=torch.float64, num_tokens=16) == "sdpa"


def test_the_last_choice_runs_anywhere():
    for device in (CPU, GPU):
        *_, last = preferred(device, torch.bfloat16, 82)
        assert obstacle(last, device, torch.float32, head_dim=7) is None


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"wanted": "flash2", "device": CPU}, "attention=flash2 needs a GPU; use attention=auto"),
        ({"wanted": "flash2", "dtype": torch.float32}, "attention=flash2 is for bfloat16, not float32"),
        (
            {"wanted": "flash2", "head_dim": 12},
            "attention=flash2 is for heads of 8, 16, ... 256 numbers, not 12",
        ),
        ({"wanted": "flash2"}, "attention=flash2 cannot import flash_attn: undefined symbol"),
        ({"wanted": "flash"}, "attention=flash is unknown; known: flash2, sdpa, matmul"),
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
