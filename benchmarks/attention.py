"""Milliseconds of attention by every kernel that can run here, forwards alone and with its backward pass.

    python -m benchmarks.attention --json                                       the published model's, 82 tokens
    python -m benchmarks.attention batch=128 heads=3 head_dim=32 tokens=16 threads=1

In turns in this process; medians, on a GPU of what the kernels take. `auto` is the one that training would take.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks import front
from benchmarks.clock import in_turns, medians_ms
from hrm_ray import machine
from hrm_ray.models.attention import KERNELS, AttentionKernel, kernel, obstacle


def measure(batch: int, heads: int, head_dim: int, tokens: int, rounds: int, dtype: str) -> dict:
    setup = machine.resolve(forward_dtype=dtype, num_tokens=tokens, head_dim=head_dim)
    names = [name for name in KERNELS if not obstacle(name, setup.device, setup.dtype, head_dim)]
    qkv = [
        torch.randn(batch, heads, tokens, head_dim, device=setup.device).to(setup.dtype).requires_grad_()
        for _ in range(3)
    ]
    gradient = torch.randn_like(qkv[0])
    calls: dict[str, Callable[[], object]] = {}
    for name in names:
        attend = kernel(name)
        calls[f"{name} forward"] = torch.no_grad()(partial(attend, *qkv))
        calls[f"{name} both"] = partial(_forward_and_backward, attend, qkv, gradient)
    ms = medians_ms(in_turns(calls, rounds, kernels_only=True))
    return {
        "benchmark": "attention",
        "shape": {"batch": batch, "heads": heads, "tokens": tokens, "head_dim": head_dim},
        "dtype": str(setup.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "auto": setup.attention,
        "ms": {name: {way: round(ms[f"{name} {way}"], 3) for way in ("forward", "both")} for name in names},
        "rounds": rounds,
    }


def _forward_and_backward(attend: AttentionKernel, qkv: list[Tensor], gradient: Tensor) -> None:
    torch.autograd.grad(attend(*qkv), qkv, gradient)


def tell(result: dict) -> str:
    lines = []
    for name, ms in result["ms"].items():
        chosen = "  <- auto" if name == result["auto"] else ""
        lines.append(f"{name:8} {ms['forward']:9.3f} ms forwards {ms['both']:9.3f} with backward{chosen}")
    return "\n".join(lines)


def main() -> None:
    shape = {"batch": 32, "heads": 8, "head_dim": 64, "tokens": 82}
    front.run(__doc__, measure, tell, shape | {"dtype": front.DTYPES, "rounds": 10, "threads": front.THREADS})


if __name__ == "__main__":
    main()
