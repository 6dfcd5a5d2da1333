"""From a configuration to a model on its device."""

from typing import Protocol

import numpy as np
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
    def coordinates(self) -> np.ndarray | None:
        """Where the cells lie; see `hrm_ray.data.tasks.base.Task.coordinates`."""

    def answer_cells(self) -> int | None:
        """The last so many cells have all labels; see `hrm_ray.data.tasks.base.Task.answer_cells`."""


def coordinates_of(arch: ArchConfig, data: DataShape) -> np.ndarray | None:
    """Where the cells lie, if a model of `arch` has to know; else None.

    Raises:
        UserError: it has to, and nobody knows.
    """
    if arch.pos_encodings != "grid":
        return None
    coordinates = data.coordinates()
    if coordinates is None:
        raise UserError(
            f"arch.pos_encodings=grid: nothing says how the {data.seq_len} cells of these puzzles lie in rows; use "
            "arch.pos_encodings=learned"
        )
    return coordinates


def build_model(arch: ArchConfig, data: DataShape, setup: Setup, halting: HaltingConfig | None = None) -> ACT:
    """A freshly initialised model, drawn from torch's global generator on the CPU and moved to its device.

    On torch's meta device nothing is drawn: it has shapes only.

    Args:
        halting: when its slots halt; None: as published.

    Raises:
        UserError: there is no such model, or its positions need a grid that is not known.
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
            coordinates=coordinates_of(arch, data),
            answer_cells=data.answer_cells() if arch.skips_questions else None,
            dtype=setup.dtype,
            attention=setup.attention,
        )
    return ACT(inner, arch.halt_max_steps, (halting or HALTINGS.make()).build(arch)).to(setup.device)
