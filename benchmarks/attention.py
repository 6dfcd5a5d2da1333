"""Milliseconds of attention by every kernel that can run here, forwards alone and with its backward pass.

Rotation is a part of it, and what re-arranges queries, keys and values as they come from their product.

    python -m benchmarks.attention --json                                       the published model's, 82 tokens
    python -m benchmarks.attention batch=128 heads=3 head_dim=32 tokens=16 threads=1

In turns in this process, compiled unless `compile=false`; medians, on a GPU of what the kernels take. `auto` is the one
that training would take.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks import front
from benchmarks.clock import in_turns, medians_ms
from hrm_ray import machine
from hrm_ray.models.attention import KERNELS, AttentionKernel, kernel, obstacle
from hrm_ray.models.rotary import Rope, rope_tables


def measure(
    batch: int, heads: int, head_dim: int, tokens: int, rounds: int, dtype: str, compile: bool
) -> dict:
    setup = machine.resolve(forward_dtype=dtype, num_tokens=tokens, head_dim=head_dim)
    names = [name for name in KERNELS if not obstacle(name, setup.device, setup.dtype, head_dim=head_dim)]
    qkv = torch.randn(batch, tokens, 3, heads, head_dim, device=setup.device).to(setup.dtype).requires_grad_()
    rope = tuple(table.to(setup.device) for table in rope_tables(tokens, head_dim))
    gradient = torch.randn_like(qkv[:, :, 0])
    calls: dict[str, Callable[[], object]] = {}
    for name in names:
        attend = kernel(name)
        if compile:
            attend = torch.compile(attend, dynamic=False)
        calls[f"{name} forward"] = torch.no_grad()(partial(attend, qkv, rope))
        calls[f"{name} both"] = partial(_forward_and_backward, attend, qkv, rope, gradient)
    ms = medians_ms(in_turns(calls, rounds, kernels_only=True))
    return {
        "benchmark": "attention",
        "shape": {"batch": batch, "heads": heads, "tokens": tokens, "head_dim": head_dim},
        "dtype": str(setup.dtype).removeprefix("torch."),
        "compiled": compile,
        "threads": torch.get_num_threads(),
        "auto": setup.attention,
        "ms": {name: {way: round(ms[f"{name} {way}"], 3) for way in ("forward", "both")} for name in names},
        "rounds": rounds,
    }


def _forward_and_backward(attend: AttentionKernel, qkv: Tensor, rope: Rope, gradient: Tensor) -> None:
    torch.autograd.grad(attend(qkv, rope), qkv, gradient)


def tell(result: dict) -> str:
    lines = []
    for name, ms in result["ms"].items():
        chosen = "  <- auto" if name == result["auto"] else ""
        lines.append(f"{name:8} {ms['forward']:9.3f} ms forwards {ms['both']:9.3f} with backward{chosen}")
    return "\n".join(lines)


def main() -> None:
    shape = {"batch": 32, "heads": 8, "head_dim": 64, "tokens": 82}
    known = shape | {"dtype": front.DTYPES, "rounds": 10, "threads": front.THREADS, "compile": True}
    front.run(__doc__, measure, tell, known)


if __name__ == "__main__":
    main()
