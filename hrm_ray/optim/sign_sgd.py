"""Sign-SGD with decoupled decay for the rows of an embedding that occur in a batch."""

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from hrm_ray.optim import fused_cuda
from hrm_ray.optim.adam_atan2 import resolve_backend


@torch.no_grad()
def sparse_sign_sgd(
    table: Tensor,
    identifiers: Tensor,
    gradients: Tensor,
    *,
    lr: float,
    weight_decay: float,
    backend: str = "auto",
) -> None:
    """Update in place the rows of `table` that occur in the global batch; the others stay untouched.

    row = row * (1 - lr * weight_decay) - lr * sign(sum of the row's gradients over the global batch).

    Args:
        table: [rows, size] float32, the same on every worker before and after.
        identifiers: [n] int, the rows looked up by the whole global batch, with repetitions.
        gradients: [n, size] float32. A row's are added up in the order of the batch.
        lr: learning rate.
        weight_decay: decoupled, multiplied by `lr`.
        backend: as of `AdamATan2`; where it is "cuda", one kernel does it all.

    Raises:
        ValueError: the shapes do not belong together.
    """
    if identifiers.ndim != 1 or gradients.shape != (len(identifiers), table.shape[1]):
        shapes = ", ".join(str(list(t.shape)) for t in (table, identifiers, gradients))
        raise ValueError(f"table, identifiers and gradients have the shapes {shapes}")
    is_fit = table.is_contiguous() and table.dtype == gradients.dtype == torch.float32
    is_fit = is_fit and table.device == identifiers.device == gradients.device
    if is_fit and table.device.type == "cuda" and resolve_backend(backend, table.device) == "cuda":
        fused_cuda.sparse_sign_sgd(table, identifiers, gradients.contiguous(), lr, weight_decay)
        increment_version(table)
        return
    rows, position, counts = identifiers.unique(return_inverse=True, return_counts=True)
    # Not index_add_, which on a GPU adds in an order that changes, and a sign near zero with it.
    in_turn = gradients[position.argsort(stable=True)]
    summed = torch.segment_reduce(in_turn, "sum", lengths=counts, unsafe=True)
    table[rows] = table[rows] * (1 - lr * weight_decay) - lr * summed.sign()
