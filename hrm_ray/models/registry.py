"""From a configuration to a model on its device."""

from typing import Protocol

import torch

from hrm_ray.config.schema import HRMConfig
from hrm_ray.machine import Setup
from hrm_ray.models.act import ACT
from hrm_ray.models.hrm import HRM


class DataShape(Protocol):
    """What a model has to know of its data (a dataset's or a checkpoint's manifest)."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def seq_len(self) -> int: ...
    @property
    def num_puzzle_identifiers(self) -> int: ...


def build_model(arch: HRMConfig, data: DataShape, setup: Setup) -> ACT:
    """A freshly initialised model, drawn from torch's global generator on the CPU and moved to its device."""
    with torch.device("cpu"):
        inner = HRM(
            arch,
            vocab_size=data.vocab_size,
            seq_len=data.seq_len,
            num_puzzle_identifiers=data.num_puzzle_identifiers,
            dtype=setup.dtype,
            attention=setup.attention,
        )
    return ACT(inner, arch.halt_max_steps).to(setup.device)
