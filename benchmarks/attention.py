"""Milliseconds of attention by every kernel that can run here, forwards alone and with its backward pass.

    python -m benchmarks.attention --json                                       the published model's, 82 tokens
    python -m benchmarks.attention batch=128 heads=3 head_dim=32 tokens=16 threads=1

In turns in this process; medians. `auto` is the one that training would take.
"""

import statistics
import time

import torch

from benchmarks import front
from benchmarks.machine import facts
from hrm_ray import machine
from hrm_ray.models.attention import KERNELS, kernel, obstacle


def measure(batch: int, heads: int, head_dim: int, tokens: int, rounds: int, dtype: str) -> dict:
    setup = machine.resolve(forward_dtype=dtype, num_tokens=tokens, head_dim=head_dim)
    names = [name for name in KERNELS if not obstacle(name, setup.device, setup.dtype, head_dim)]
    qkv = [
        torch.randn(batch, heads, tokens, head_dim, device=setup.device).to(setup.dtype).requires_grad_()
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
        "dtype": str(setup.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "auto": setup.attention,
        "ms": {name: {way: ms[name, way] for way in ("forward", "both")} for name in names},
        "rounds": rounds,
        **facts(),
    }


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
