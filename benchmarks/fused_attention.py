"""Milliseconds of the fused kernel of attention by how it is launched: rows of queries at a time, and warps.

    python -m benchmarks.fused_attention --json                  the published model's, 768 puzzles of 82 tokens

For `FORWARD` and `BACKWARD` in hrm_ray/kernels/attention.py; launches that do not fit this GPU are left out. In turns
in this process, medians, beside a copy that moves as many bytes.
"""

from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor

from benchmarks import front
from benchmarks.clock import in_turns, medians_ms
from hrm_ray.errors import UserError, first_line
from hrm_ray.models.attention import PACKAGES
from hrm_ray.models.rotary import rope_tables

ROWS, WARPS = (16, 32, 64, 128), (4, 8)


def measure(batch: int, heads: int, head_dim: int, tokens: int, rounds: int) -> dict:
    if not torch.cuda.is_available():
        raise UserError("the fused kernel needs a GPU; benchmarks.attention measures what runs here")
    fused = PACKAGES["fused"]
    if head_dim not in fused.head_dims or tokens > (fused.max_tokens or tokens):
        raise UserError(
            f"head_dim={head_dim} tokens={tokens}: it is for heads of {fused.head_dims} and {fused.max_tokens} tokens"
        )
    qkv = torch.randn(batch, tokens, 3, heads, head_dim, device="cuda").bfloat16()
    calls, left_out = launches(qkv)
    out = qkv[:, :, 0].contiguous()
    # Forwards four numbers are moved for each of the output, backwards seven.
    source = torch.empty(7, *out.shape, dtype=out.dtype, device=out.device)
    for way, moved in (("forward", 2), ("backward", 3.5)):
        calls[f"copy {way}"] = source.flatten()[: int(moved * out.numel())].clone
    ms = medians_ms(in_turns(calls, rounds, kernels_only=True))
    return {
        "benchmark": "fused_attention",
        "shape": {"batch": batch, "heads": heads, "tokens": tokens, "head_dim": head_dim},
        "ms": {name: round(value, 4) for name, value in ms.items()},
        "left_out": left_out,
        "rounds": rounds,
    }


def launches(qkv: Tensor) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """Every way to launch both kernels that works here, by its name, and why others do not."""
    from hrm_ray.kernels import attention

    B, S, _, N, K = qkv.shape
    cos, sin = (table.to(qkv.device) for table in rope_tables(S, K))
    out = qkv.new_empty(B, S, N, K)
    arguments = {
        "forward": (attention._forward, (qkv, cos, sin, out)),
        "backward": (attention._backward, (qkv, cos, sin, torch.randn_like(out), torch.empty_like(qkv))),
    }
    calls: dict[str, Callable[[], object]] = {}
    left_out: dict[str, str] = {}
    for (way, (kernel, tensors)), rows, warps in product(arguments.items(), ROWS, WARPS):
        options = attention.constants(qkv, rotates=True, max_rows=rows, warps=warps)
        name = f"{way} rows={options['M']} warps={options['num_warps']}"  # fewer for short sequences
        if name in calls or name in left_out:
            continue
        call = partial(kernel[(B * N,)], *tensors, **options)
        try:
            call()
            calls[name] = call
        except Exception as error:  # of any kind: a compiler has many ways to fail
            left_out[name] = first_line(error)
    return calls, left_out


def tell(result: dict) -> str:
    lines = [f"{name:28} {ms:9.4f} ms" for name, ms in result["ms"].items()]
    return "\n".join([*lines, *(f"{name:28} {why}" for name, why in result["left_out"].items())])


def main() -> None:
    known = {"batch": 768, "heads": 8, "head_dim": 64, "tokens": 82, "rounds": 10}
    front.run(__doc__, measure, tell, known)


if __name__ == "__main__":
    main()
