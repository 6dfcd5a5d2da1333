"""Milliseconds of one update of the published 27M model's parameters, by every backend of AdamATan2 and by others.

    python -m benchmarks.optimizer --json
    python -m benchmarks.optimizer rounds=20 threads=1

Beside ours: torch's fused AdamW, which also has to move 28 bytes a parameter, the package adam-atan2-pytorch if it is
installed, and two ways to read and write as many bytes: a copy, and in place, which on a CPU is faster since a copy
also reads what it writes over. The faster is the machine's limit. All in turns in this process; medians; on a GPU of
what the kernels take.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import partial

import torch
from torch import nn

from benchmarks import front
from benchmarks.clock import in_turns, medians_ms
from hrm_ray import machine
from hrm_ray.errors import UserError
from hrm_ray.models.hrm_v1 import HRMConfig
from hrm_ray.models.registry import build_model
from hrm_ray.optim.adam_atan2 import BACKENDS, AdamATan2, resolve_backend
from hrm_ray.training.checkpoint import DatasetInfo

BYTES_A_PARAMETER = 28  # parameter, gradient and two moments read, all but the gradient written; float32


def parameters() -> list[nn.Parameter]:
    """Those of the published HRM for 9x9 Sudoku, with gradients."""
    info = DatasetInfo(
        task="sudoku", task_options={"size": 9}, vocab_size=11, seq_len=81, num_puzzle_identifiers=1
    )
    setup = machine.resolve()
    model = build_model(HRMConfig(), info, setup)
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    return list(model.parameters())


def contestants() -> dict[str, Callable[[], object]]:
    """What is measured, by name."""
    device = machine.resolve().device
    steps: dict[str, Callable[[], object]] = {}
    for backend in BACKENDS:
        with suppress(UserError):  # not for this machine
            steps[backend] = AdamATan2(parameters(), backend=backend).step
    steps["torch AdamW, fused"] = torch.optim.AdamW(parameters(), fused=True).step
    try:
        from adam_atan2_pytorch import AdamAtan2  # type: ignore[import-not-found]

        steps["adam-atan2-pytorch"] = AdamAtan2(parameters()).step
    except ImportError:
        pass
    # Each of its bytes is read and written.
    source = torch.randn(sum(p.numel() for p in parameters()) * BYTES_A_PARAMETER // 8, device=device)
    steps["copy"] = partial(torch.empty_like(source).copy_, source)
    steps["in place"] = partial(source.mul_, 1.0)
    return steps


def measure(rounds: int) -> dict:
    ms = medians_ms(in_turns(contestants(), rounds, kernels_only=True))
    ours = resolve_backend("auto", machine.resolve().device)
    num_params = sum(p.numel() for p in parameters())
    return {
        "benchmark": "optimizer",
        "num_params": num_params,
        "threads": torch.get_num_threads(),
        "ours": ours,
        "ms": {name: round(value, 4) for name, value in ms.items()},
        "gigabytes_per_s": round(num_params * BYTES_A_PARAMETER / ms[ours] / 1e6, 1),
        "share_of_copy_rate": round(ms["copy"] / ms[ours], 3),
        "share_of_memory_rate": round(min(ms["copy"], ms["in place"]) / ms[ours], 3),
        "rounds": rounds,
    }


def tell(result: dict) -> str:
    ours = result["ms"][result["ours"]]
    rows = sorted(result["ms"].items(), key=lambda item: item[1])
    lines = [f"{name:20} {ms:8.3f} ms  {ms / ours:6.2f}" for name, ms in rows]
    return "\n".join([*lines, f"{result['ours']}: {result['share_of_memory_rate']:.0%} of the memory's rate"])


def main() -> None:
    front.run(__doc__, measure, tell, {"rounds": 10, "threads": front.THREADS})


if __name__ == "__main__":
    main()
