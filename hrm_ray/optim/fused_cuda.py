"""AdamATan2 and sign-SGD on a GPU: all tensors of a group in one launch of kernels.cu.

Nothing waits for the GPU: the kernel itself reads learning rate, step, scale of the gradients and whether one of
them is infinite. With a learning rate that is a tensor on the GPU, an update can be captured in a CUDA graph.
"""

import ctypes
import math
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from hrm_ray.optim import nvrtc
from hrm_ray.optim.adam_atan2 import Group, Slot

# As in kernels.cu.
THREADS, CHUNK = 256, 4096
DTYPES = {torch.float32: "adam_atan2_float32", torch.bfloat16: "adam_atan2_bfloat16"}
# How many tensors fit in a kernel's arguments (32,764 bytes); smaller ones get smaller arguments.
CAPACITIES = (64, 512)


class _Tensor(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("p", "g", "m", "v", "step")),
        *((name, ctypes.c_longlong) for name in ("size", "first_block")),
    )


class _Group(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("lr", "grad_scale", "found_inf")),
        *((n, ctypes.c_float) for n in ("beta1", "beta2", "log_beta1", "log_beta2", "weight_decay")),
        ("inside", ctypes.c_int),
    )


@lru_cache
def _tensors(capacity: int) -> type[ctypes.Structure]:
    fields = (("at", _Tensor * capacity), ("count", ctypes.c_int))
    return type("_Tensors", (ctypes.Structure,), {"_fields_": fields})


@lru_cache
def why_not(device: torch.device) -> str | None:
    """Why the kernels cannot be had on this GPU; None if they can. Compiles them at the first time."""
    try:
        for name in DTYPES.values():
            nvrtc.kernel(name, device, CAPACITIES[0])
    except nvrtc.KernelError as error:
        return str(error)
    return None


def update(slots: Sequence[Slot], group: Group) -> None:
    """A backend of `adam_atan2`: parameters float32 or bfloat16, contiguous, their steps on the same GPU."""
    alike: dict[tuple[torch.device, torch.dtype], list[Slot]] = defaultdict(list)
    for slot in slots:
        if slot.param.numel():
            alike[slot.param.device, slot.param.dtype].append(slot)
    for (device, dtype), members in alike.items():
        lr, grad_scale, found_inf = (_on(device, x) for x in (group.lr, group.grad_scale, group.found_inf))
        steps = [slot.step for slot in members]
        torch._foreach_add_(steps, 1)
        if found_inf is not None:
            torch._foreach_sub_(steps, [found_inf] * len(steps))
        shared = _Group(
            *(None if x is None else x.data_ptr() for x in (lr, grad_scale, found_inf)),
            group.beta1,
            group.beta2,
            *(math.log(beta) if beta else -math.inf for beta in (group.beta1, group.beta2)),
            group.weight_decay,
            group.bias_correction == "inside",
        )
        for first in range(0, len(members), CAPACITIES[-1]):
            _launch(DTYPES[dtype], device, members[first : first + CAPACITIES[-1]], shared)


def _launch(name: str, device: torch.device, slots: Sequence[Slot], shared: _Group) -> None:
    capacity = next(c for c in CAPACITIES if c >= len(slots))
    tensors = _tensors(capacity)()
    tensors.count = len(slots)
    num_blocks = 0
    grads = [slot.grad.contiguous() for slot in slots]
    for entry, slot, grad in zip(tensors.at, slots, grads, strict=False):
        p, _, m, v, step = slot
        entry.p, entry.g, entry.m, entry.v, entry.step = (t.data_ptr() for t in (p, grad, m, v, step))
        entry.size, entry.first_block = p.numel(), num_blocks
        num_blocks += -(-p.numel() // CHUNK)
    nvrtc.kernel(name, device, capacity).launch((num_blocks, 1), THREADS, tensors, shared)


def sparse_sign_sgd(
    table: Tensor, identifiers: Tensor, gradients: Tensor, lr: float | Tensor, weight_decay: float
) -> None:
    """See `sign_sgd.sparse_sign_sgd`. Gradients of a row are added up in the order of the batch."""
    size = table.shape[1]
    rows, places = identifiers.long().sort(stable=True)
    gradients = gradients.contiguous()
    lr_there = _on(table.device, lr)
    assert lr_there is not None and table.is_contiguous() and gradients.dtype == table.dtype == torch.float32
    nvrtc.kernel("sign_sgd", table.device, CAPACITIES[0]).launch(
        (len(rows), -(-size // THREADS)),
        THREADS,
        *(ctypes.c_void_p(t.data_ptr()) for t in (table, rows, places, gradients, lr_there)),
        ctypes.c_float(weight_decay),
        ctypes.c_int(len(rows)),
        ctypes.c_int(size),
    )


def _on(device: torch.device, value: float | Tensor | None) -> Tensor | None:
    """A float32 number on the GPU; what is there already is not copied."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        return value.to(device, torch.float32, non_blocking=True)
    return torch.full((), value, device=device)
