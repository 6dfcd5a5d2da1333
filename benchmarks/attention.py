"""Milliseconds of attention by every kernel that can run here, forwards alone and with its backward pass.

    python -m benchmarks.attention --json                                       the published model's, 82 tokens
    python -m benchmarks.attention batch=128 heads=3 head_dim=32 tokens=16 threads=1

In turns in this process; medians. `auto` is the one that training would take.
"""

import argparse
import json
import os
import statistics
import time

import torch

from benchmarks.machine import facts
from hrm_ray import machine
from hrm_ray.models.attention import KERNELS, kernel, obstacle

DEFAULTS = {
    "batch": 32,
    "heads": 8,
    "head_dim": 64,
    "tokens": 82,
    "rounds": 10,
    "threads": os.cpu_count() or 1,
}


def measure(batch: int, heads: int, head_dim: int, tokens: int, rounds: int, dtype: torch.dtype) -> dict:
    setup = machine.resolve(
        forward_dtype=str(dtype).removeprefix("torch."), num_tokens=tokens, head_dim=head_dim
    )
    names = [name for name in KERNELS if not obstacle(name, setup.device, dtype, head_dim)]
    qkv = [
        torch.randn(batch, heads, tokens, head_dim, device=setup.device).to(dtype).requires_grad_()
        for _ in range(3)
    ]
    gradient = torch.randn_like(qkv[0])
    times: dict[tuple[str, str], list[float]] = {(n, w): [] for n in names for w in ("forward", "both")}

    def clock(what: tuple[str, str], started: float) -> None:
        if setup.device.type == "cuda":
            torch.cuda.synchronize()
        times[what].append(time.perf_counter() - started)

    for _ in range(rounds + 2):
        for name in names:
            attend = kernel(name)
            started = time.perf_counter()
            with torch.no_grad():
                attend(*qkv)
            clock((name, "forward"), started)
            started = time.perf_counter()
            torch.autograd.grad(attend(*qkv), qkv, gradient)
            clock((name, "both"), started)
    ms = {what: round(statistics.median(values[2:]) * 1e3, 3) for what, values in times.items()}  # 2 warm up
    return {
        "benchmark": "attention",
        "shape": {"batch": batch, "heads": heads, "tokens": tokens, "head_dim": head_dim},
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "auto": setup.attention,
        "ms": {name: {way: ms[name, way] for way in ("forward", "both")} for name in names},
        "rounds": rounds,
        **facts(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="key=value", help=f"dtype, {', '.join(DEFAULTS)}")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    options = dict(word.split("=", 1) for word in args.words)
    dtype = options.pop("dtype", str(machine.resolve().dtype).removeprefix("torch."))
    numbers = DEFAULTS | {key: int(value) for key, value in options.items()}
    torch.set_num_threads(numbers.pop("threads"))
    result = measure(**numbers, dtype=getattr(torch, dtype))
    if args.json:
        print(json.dumps(result))
        return
    for name, ms in result["ms"].items():
        chosen = "  <- auto" if name == result["auto"] else ""
        print(f"{name:8} {ms['forward']:9.3f} ms forwards {ms['both']:9.3f} with backward{chosen}")


if __name__ == "__main__":
    main()
