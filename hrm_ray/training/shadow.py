"""A copy of a large table of which few rows change between two looks at it, as of the puzzle embedding."""

import numpy as np
import torch
from torch import Tensor

ROW_BYTES = 2**25  # of rows that are copied at once, with a copy in between


class Shadow:
    """The copy. What always holds: the rows that are not `stale` are those of the table.

    It takes no memory before it is asked for, and then only for the rows that have moved: a process that never asks
    has none.

    Args:
        table: floats [N, size], all zeros.

    Attributes:
        stale: bool [N], on the device of the table; to be set where rows of it change.
    """

    def __init__(self, table: Tensor):
        self.stale = torch.zeros(len(table), dtype=torch.bool, device=table.device)
        self._copy: Tensor | None = None

    @torch.no_grad()
    def follow(self, table: Tensor) -> Tensor:
        """Copy the stale rows; returns the whole copy, on the CPU, which the next call changes."""
        if self._copy is None:  # of the type at hand, since a model may have been converted
            # Not torch.zeros, which writes them; numpy leaves that to the system, until a row is written.
            self._copy = torch.from_numpy(np.zeros(table.shape, table[:0].cpu().numpy().dtype))
        at_once = max(1, ROW_BYTES // (table.shape[1] * table.itemsize))
        for rows in self.stale.nonzero()[:, 0].split(at_once):
            self._copy[rows.cpu()] = table[rows].cpu()
        self.stale.zero_()
        return self._copy
