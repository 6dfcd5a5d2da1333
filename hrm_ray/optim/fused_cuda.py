"""AdamATan2 and sign-SGD on a GPU: one launch of kernels.cu updates all tensors of a group.

Nothing waits for the GPU: the kernel itself reads the learning rate, the steps, the scale of the gradients and whether
one of them is infinite. With a learning rate on the GPU, an update can be captured in a CUDA graph.
"""

import ctypes
import math
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from hrm_ray.errors import UserError
from hrm_ray.optim import nvrtc
from hrm_ray.optim.adam_atan2 import CUDA_DTYPES, Group, Slot, is_recorded

# As in kernels.cu.
THREADS, CHUNK = 256, 4096
KERNELS = dict(zip(CUDA_DTYPES, ("adam_atan2_float32", "adam_atan2_bfloat16"), strict=True))
# How many tensors fit in a kernel's arguments: in 4 KB, which every driver takes, and in 32,764 bytes.
CAPACITIES = (64, 512)


class _Tensor(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("p", "g", "m", "v", "step")),
        *((name, ctypes.c_longlong) for name in ("size", "first_block")),
    )


class _Group(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("lr", "weight_decay", "grad_scale", "found_inf")),
        *((name, ctypes.c_float) for name in ("alpha1", "beta2", "alpha2", "log_beta1", "log_beta2")),
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
        for capacity in CAPACITIES:
            for name in (*KERNELS.values(), "sign_sgd"):
                nvrtc.kernel(name, device, capacity)
    except nvrtc.KernelError as error:
        return str(error)
    return None


def update(slots: Sequence[Slot], group: Group) -> None:
    """A backend of `adam_atan2`: parameters float32 or bfloat16, contiguous; gradients of their dtype."""
    alike: dict[tuple[torch.device, torch.dtype], list[Slot]] = defaultdict(list)
    for slot in slots:
        alike[slot.param.device, slot.param.dtype].append(slot)
    for (device, dtype), members in alike.items():
        numbers = (group.lr, group.weight_decay, group.grad_scale, group.found_inf)
        lr, weight_decay, grad_scale, found_inf = (_on(device, number) for number in numbers)
        steps = [slot.step for slot in members]
        torch._foreach_add_(steps, 1)
        if found_inf is not None:
            torch._foreach_sub_(steps, [(found_inf != 0).float()] * len(steps))
        shared = _Group(
            *(None if x is None else x.data_ptr() for x in (lr, weight_decay, grad_scale, found_inf)),
            1 - group.beta1,
            group.beta2,
            1 - group.beta2,
            *(math.log(beta) if beta else -math.inf for beta in (group.beta1, group.beta2)),
            group.bias_correction == "inside",
        )
        filled = [slot for slot in members if slot.param.numel()]
        for first in range(0, len(filled), CAPACITIES[-1]):
            _launch(KERNELS[dtype], device, filled[first : first + CAPACITIES[-1]], shared)


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
    table: Tensor,
    identifiers: Tensor,
    gradients: Tensor,
    lr: float | Tensor,
    weight_decay: float | Tensor,
) -> None:
    """See `sign_sgd.sparse_sign_sgd`; all on one GPU and contiguous, table and gradients float32.

    Gradients of a row are added up in the order of the batch. An identifier that is not in the table stops the GPU's
    context, as in torch's own kernels.
    """
    num_rows, size = table.shape
    if not gradients.numel():
        return
    rows, places = identifiers.long().sort(stable=True)
    rates = [_on(table.device, number) for number in (lr, weight_decay)]
    tensors = (table, rows, places, gradients, *rates)
    nvrtc.kernel("sign_sgd", table.device, CAPACITIES[0]).launch(
        (len(rows), -(-size // THREADS)),
        THREADS,
        *(ctypes.c_void_p(t.data_ptr()) for t in tensors if t is not None),
        ctypes.c_int(len(rows)),
        ctypes.c_longlong(num_rows),
        ctypes.c_int(size),
    )


def _on(device: torch.device, value: float | Tensor | None) -> Tensor | None:
    """A number as float32[] on the GPU; one that is there already is used as it is."""
    if value is None:
        return None
    if isinstance(value, Tensor) and value.device.type == device.type:
        return value.to(device, torch.float32)
    if is_recorded(device):
        raise UserError(f"a CUDA graph freezes lr and weight_decay at {value}; make them tensors on {device}")
    return torch.full((), float(value), dtype=torch.float32, device=device)
