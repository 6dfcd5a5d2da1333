"""The one device decision."""

import pytest
import torch

from hrm_ray import machine
from hrm_ray.errors import UserError


def test_cpu_decisions(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "cpu_has_fast_bfloat16", lambda: True)
    short, long = machine.resolve(num_tokens=81), machine.resolve(num_tokens=901)
    assert (short.device.type, short.dtype, short.attention) == ("cpu", torch.bfloat16, "matmul")
    assert long.attention == "sdpa"
    monkeypatch.setattr(machine, "cpu_has_fast_bfloat16", lambda: False)
    plain = machine.resolve(num_tokens=81)
    assert (plain.dtype, plain.attention) == (torch.float32, "sdpa")
    assert machine.resolve(forward_dtype="bfloat16", attention="sdpa").attention == "sdpa"


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"device": "cuda"}, "device=cuda: torch sees no GPU here"),
        ({"attention": "flash2"}, "attention=flash2 needs a GPU"),
        (
            {"optimizer_backend": "cuda"},
            "optimizer_backend=cuda is for float32 and bfloat16 on GPUs, not float32 on cpu",
        ),
        (
            {"optimizer_backend": "c"},
            "optimizer_backend=c: unknown; known: auto, reference, foreach, fused, cuda",
        ),
    ],
)
def test_an_override_that_cannot_work_is_an_error(monkeypatch, choice, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=said):
        machine.resolve(**choice)
