"""Winner takes all: a slot thinks along K paths, and learns along the one whose loss is lowest.

The paths of a slot share the state of the answer, z_H, which is the winner's after each ACT step; each keeps its own
working state z_L. First all paths take the step without gradients; then the winner takes it again, with them. So it
needs little more memory than one path, and costs K passes without gradients more than it.

Source: "Speed is Confidence", arXiv:2601.19085, and its public code jvdillon/sic. Where this departs from it:

- Starts are random and drawn by key (`arch.init_std`), of z_H and of z_L, where there are K learned vectors for z_L. So
  a model in use may start from anywhere, along one path or many; there it takes the first vector.
- There all paths take the step with gradients, of which those of the losers are zero: the same, but for the cost.
- There paths that have become alike are left out, which makes the shape of a batch depend on its values.
"""

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from hrm_ray.config.arch import LossType
from hrm_ray.halting.base import Control
from hrm_ray.models.act import ACT, Batch, Carry
from hrm_ray.models.losses import cross_entropy
from hrm_ray.models.noise import key_of
from hrm_ray.models.recursive import State


def along(carry: Carry, num_paths: int) -> Carry:
    """`carry` with a z_L for each of the paths of a slot: [B, K, S, D]."""
    z_H, z_L = carry.state
    return carry._replace(state=State(z_H, z_L[:, None].expand(-1, num_paths, -1, -1)))


@torch.no_grad()
def winners(
    model: ACT, carry: Carry, batch: Batch, control: Control, loss_type: LossType
) -> tuple[Carry, Control, Tensor]:
    """Let every path of every slot take an ACT step.

    Args:
        carry: as of `along`.
        batch, control: of the step.

    Returns:
        the carry and the control with which the winner of each slot took it, and z_L after it, of all paths.
    """
    z_H, z_L = carry.state
    B, K = z_L.shape[:2]
    assert control.keys is not None
    keys_BK = key_of(control.keys[:, None], torch.arange(K, device=z_L.device))

    def each(rows: Tensor) -> Tensor:
        """A row for every path."""
        return rows[:, None].expand(B, K, *rows.shape[1:]).flatten(0, 1)

    steps, halted, own, offered = tree_map(each, (carry.steps, carry.halted, carry.batch, batch))
    tried = Carry(State(each(z_H), z_L.flatten(0, 1)), steps, halted, own)
    tried, _, prediction = model.advance(tried, offered, control._replace(keys=keys_BK.flatten()))
    losses = cross_entropy(prediction.logits, tried.batch.labels, loss_type).sum(-1)
    best = torch.arange(B, device=z_L.device), losses.view(B, K).argmin(1)
    won = carry._replace(state=State(z_H, z_L[best])), control._replace(keys=keys_BK[best])
    return *won, tried.state.z_L.view_as(z_L)
