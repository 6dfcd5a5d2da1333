"""From a configuration to a model on its device."""

from typing import Protocol

import torch

from hrm_ray.config.arch import ArchConfig, architectures
from hrm_ray.config.halting import HALTINGS, HaltingConfig
from hrm_ray.errors import UserError
from hrm_ray.machine import Setup
from hrm_ray.models.act import ACT
from hrm_ray.models.recursive import RecursiveModel


class DataShape(Protocol):
    """What a model has to know of its data (a dataset's or a checkpoint's manifest)."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def seq_len(self) -> int: ...
    @property
    def num_puzzle_identifiers(self) -> int: ...


def build_model(arch: ArchConfig, data: DataShape, setup: Setup, halting: HaltingConfig | None = None) -> ACT:
    """A freshly initialised model, drawn from torch's global generator on the CPU and moved to its device.

    Args:
        halting: when its slots halt; None: as published.

    On torch's meta device nothing is drawn: it has shapes only.
    """
    architectures()  # so that all classes are known
    if type(arch) not in RecursiveModel.classes:
        raise UserError(f"arch.name={arch.name} has no model: no class says `config={type(arch).__name__}`")
    with torch.device("meta" if setup.device.type == "meta" else "cpu"):
        inner = RecursiveModel.classes[type(arch)](
            arch,
            vocab_size=data.vocab_size,
            seq_len=data.seq_len,
            num_puzzle_identifiers=data.num_puzzle_identifiers,
            dtype=setup.dtype,
            attention=setup.attention,
        )
    return ACT(inner, arch.halt_max_steps, (halting or HALTINGS.make()).build(arch)).to(setup.device)
