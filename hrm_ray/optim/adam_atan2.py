"""AdamATan2: Adam whose division is an arctangent, so there is no epsilon and the step is bounded.

One front, several backends that compute the same; `backend="auto"` takes the fastest one for each device and dtype.
State dicts have torch's Adam layout (`step`, `exp_avg`, `exp_avg_sq`) and are interchangeable among backends.

Two forms exist, which differ in where the first moment's bias correction c1 = 1 - beta1^t stands
(c2 = 1 - beta2^t):

    inside   p -= lr * atan2(m / c1, sqrt(v / c2))      the paper, Everett et al. 2024, arXiv:2407.05872
    outside  p -= lr / c1 * atan2(m, sqrt(v / c2))      the package adam-atan2 0.0.3 that HRM trained with

Weight decay is decoupled and comes first: p *= 1 - lr * weight_decay.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from hrm_ray.errors import UserError

BiasCorrection = Literal["outside", "inside"]


class Slot(NamedTuple):
    """A parameter and what belongs to it; `step` is a float32 number, those before this update."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor


@dataclass(frozen=True)
class Group:
    """What the parameters of a group have in common.

    Attributes:
        lr: a number, or a tensor of one.
        grad_scale: gradients are so many times too large (`torch.amp.GradScaler`).
        found_inf: if not 0, nothing is updated.
    """

    lr: float | Tensor
    beta1: float
    beta2: float
    weight_decay: float
    bias_correction: BiasCorrection
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


Backend = Callable[[Sequence[Slot], Group], None]


@dataclass(frozen=True)
class Hyperparameters:
    """Numbers of one update, known to the host; `step` counts from 1."""

    step: int
    lr: float
    beta1: float
    beta2: float
    weight_decay: float
    bias_correction: BiasCorrection

    @property
    def scales(self) -> tuple[float, float, float]:
        """(factor of m inside atan2, factor of sqrt(v) inside atan2, factor of atan2)."""
        c1, root_c2 = 1 - self.beta1**self.step, (1 - self.beta2**self.step) ** 0.5
        if self.bias_correction == "inside":
            return 1 / c1, 1 / root_c2, self.lr
        return 1.0, 1 / root_c2, self.lr / c1

    @property
    def kept(self) -> float:
        """The share of a parameter that weight decay leaves."""
        return 1 - self.lr * self.weight_decay


Tensors = list[Tensor]


def on_host(update: Callable[[Tensors, Tensors, Tensors, Tensors, Hyperparameters], None]) -> Backend:
    """A backend that `update`s parameters, gradients and both moments in place, all at the same step."""

    def run(slots: Sequence[Slot], group: Group) -> None:
        if group.found_inf is not None and group.found_inf.item():
            return
        at_step: dict[int, list[Slot]] = defaultdict(list)
        for slot in slots:
            slot.step.add_(1)
            at_step[int(slot.step)].append(slot)
        for step, members in at_step.items():
            params, grads, exp_avgs, exp_avg_sqs, _ = map(list, zip(*members, strict=True))
            if group.grad_scale is not None:
                grads = [grad / group.grad_scale.to(grad.device) for grad in grads]
            numbers = (group.beta1, group.beta2, group.weight_decay, group.bias_correction)
            update(params, grads, exp_avgs, exp_avg_sqs, Hyperparameters(step, float(group.lr), *numbers))

    return run


@on_host
def reference(params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, h: Hyperparameters):
    """The equations, one tensor after another: what every backend is tested against."""
    m_scale, v_scale, step_size = h.scales
    for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        m.copy_(h.beta1 * m + (1 - h.beta1) * g)
        v.copy_(h.beta2 * v + (1 - h.beta2) * g * g)
        p.copy_(p * h.kept - step_size * torch.atan2(m * m_scale, v.sqrt() * v_scale))


@on_host
def foreach(params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, h: Hyperparameters):
    """All tensors of a group at once with torch's multi-tensor operations."""
    m_scale, v_scale, step_size = h.scales
    torch._foreach_lerp_(exp_avgs, grads, 1 - h.beta1)
    torch._foreach_mul_(exp_avg_sqs, h.beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - h.beta2)
    denominators = list(torch._foreach_sqrt(exp_avg_sqs))
    torch._foreach_mul_(denominators, v_scale / m_scale)  # atan2 depends on the ratio alone
    for denominator, m in zip(denominators, exp_avgs, strict=True):
        torch.atan2(m, denominator, out=denominator)
    torch._foreach_mul_(params, h.kept)
    torch._foreach_add_(params, denominators, alpha=-step_size)


@on_host
def fused(params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, h: Hyperparameters):
    """One pass over the memory, for float32 on the CPU; see `fused_cpu`."""
    from hrm_ray.optim import fused_cpu  # numba: a second to import

    fused_cpu.update(params, grads, exp_avgs, exp_avg_sqs, h)
    increment_version(params)  # torch does not see who writes to its memory


def cuda(slots: Sequence[Slot], group: Group) -> None:
    """One launch for all parameters; see `fused_cuda`."""
    from hrm_ray.optim import fused_cuda

    fused_cuda.update(slots, group)
    increment_version([slot.param for slot in slots])


BACKENDS: dict[str, Backend] = {"reference": reference, "foreach": foreach, "fused": fused, "cuda": cuda}


@lru_cache
def resolve_backend(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """The backend that `name` ("auto" or one of `BACKENDS`) stands for where parameters are of this kind.

    On a GPU whose kernels cannot be had, "auto" is "foreach"; the first time, a warning says why.

    Raises:
        UserError: there is none of that name, or it cannot take them.
    """
    if name not in ("auto", *BACKENDS):
        raise UserError(f"optimizer_backend={name}: unknown; known: auto, {', '.join(BACKENDS)}")
    kind = f"{str(dtype).removeprefix('torch.')} on {device}"
    if name in ("auto", "fused") and device.type == "cpu" and dtype == torch.float32:
        return "fused"
    if name == "fused":
        raise UserError(f"optimizer_backend=fused is for float32 on the CPU, not {kind}; use auto")
    if name in ("auto", "cuda") and device.type == "cuda":
        from hrm_ray.optim import fused_cuda

        why_not = fused_cuda.why_not(device) if dtype in fused_cuda.DTYPES else f"not for {kind}"
        if why_not is None:
            return "cuda"
        if name == "cuda":
            raise UserError(f"optimizer_backend=cuda: {why_not}; use auto")
        warnings.warn(f"AdamATan2 takes several launches an update: {why_not}", stacklevel=2)
    if name == "cuda":
        raise UserError(f"optimizer_backend=cuda is for GPUs, not {kind}; use auto")
    return "foreach" if name == "auto" else name


STATE = {"step", "exp_avg", "exp_avg_sq"}


class AdamATan2(torch.optim.Optimizer):
    """See the module.

    Args:
        params: parameters or parameter groups; real, of any floating dtype, on any device. Moments are float32.
        lr: learning rate; a group's `lr` may be set before every step.
        betas: decay of the first and second moment.
        weight_decay: decoupled, multiplied by `lr`.
        bias_correction: "outside" (the published training) or "inside" (the paper).
        backend: "auto" or a name from `BACKENDS`: "fused" is for float32 on the CPU, "cuda" for float32 and bfloat16 on
            a GPU; what is not contiguous is left to "foreach".

    Raises:
        UserError: an unknown backend, parameters that it cannot take, gradients or a state that are not for it.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        *,
        bias_correction: BiasCorrection = "outside",
        backend: str = "auto",
    ):
        self._backend = backend
        self._bias_correction: BiasCorrection = bias_correction
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See torch; checks that the backend can take the parameters."""
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            self._backend_of(p)
            if not p.is_floating_point():
                raise UserError(f"AdamATan2 moves real numbers, not {p.dtype}")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See torch; refuses the state of another optimizer."""
        foreign = {key for group in state_dict["param_groups"] for key in group} - {
            *self.param_groups[0],
            "initial_lr",  # of torch's schedulers
        }
        foreign |= {key for state in state_dict["state"].values() for key in STATE ^ state.keys()}
        if foreign:
            raise UserError(
                f"this is not the state of AdamATan2, but of another optimizer: {', '.join(sorted(foreign))} differ"
            )
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient. Not collective: reduce the gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            slots: dict[str, list[Slot]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    backend = self._backend_of(p)
                    slots[backend].append(self._slot(p, p.grad, backend))
            shared = Group(
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                bias_correction=self._bias_correction,
                # A GradScaler sets these where it steps, since `_step_supports_amp_scaling`.
                grad_scale=getattr(self, "grad_scale", None),
                found_inf=getattr(self, "found_inf", None),
            )
            for backend, members in slots.items():
                BACKENDS[backend](members, shared)
        return loss

    def _slot(self, p: Tensor, grad: Tensor, backend: str) -> Slot:
        """`p` with its state, which is made at the first step."""
        if grad.is_sparse:
            raise UserError(f"AdamATan2 takes dense gradients, that of a parameter {list(p.shape)} is sparse")
        state = self.state[p]
        if not state:
            moments = torch.promote_types(p.dtype, torch.float32)
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(p, dtype=moments)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=moments)
        state["step"] = state["step"].to(p.device if backend == "cuda" else "cpu")
        return Slot(p, grad, state["exp_avg"], state["exp_avg_sq"], state["step"])

    def _backend_of(self, p: Tensor) -> str:
        if not p.is_contiguous() and self._backend != "reference":
            return "foreach"
        return resolve_backend(self._backend, p.device, p.dtype)
