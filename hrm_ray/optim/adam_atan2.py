"""AdamATan2: Adam whose division is an arctangent, so there is no epsilon and the step is bounded.

One front, several backends that compute the same; `backend="auto"` takes the fastest one for each device and dtype.
State dicts have torch's Adam layout (`step`, `exp_avg`, `exp_avg_sq`) and are interchangeable among backends.

Two forms exist, which differ in where the first moment's bias correction c1 = 1 - beta1^t stands
(c2 = 1 - beta2^t):

    inside   p -= lr * atan2(m / c1, sqrt(v / c2))      the paper, Everett et al. 2024, arXiv:2407.05872
    outside  p -= lr / c1 * atan2(m, sqrt(v / c2))      the package adam-atan2 0.0.3 that HRM trained with

Weight decay is decoupled and comes first: p *= 1 - lr * weight_decay.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hrm_ray.errors import UserError

BiasCorrection = Literal["outside", "inside"]


@dataclass(frozen=True)
class Hyperparameters:
    """Numbers of one update; `step` counts from 1."""

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
# update(params, grads, exp_avgs, exp_avg_sqs, hyperparameters), in place
Backend = Callable[[Tensors, Tensors, Tensors, Tensors, Hyperparameters], None]


def reference(params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, h: Hyperparameters):
    """The equations, one tensor after another: what every backend is tested against."""
    m_scale, v_scale, step_size = h.scales
    for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        m.copy_(h.beta1 * m + (1 - h.beta1) * g)
        v.copy_(h.beta2 * v + (1 - h.beta2) * g * g)
        p.copy_(p * h.kept - step_size * torch.atan2(m * m_scale, v.sqrt() * v_scale))


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


def fused(params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, h: Hyperparameters):
    """One pass over the memory, for float32 on the CPU; see `fused_cpu`."""
    from hrm_ray.optim import fused_cpu  # numba: a second to import

    fused_cpu.update(params, grads, exp_avgs, exp_avg_sqs, h)


BACKENDS: dict[str, Backend] = {"reference": reference, "foreach": foreach, "fused": fused}


def resolve_backend(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """The backend that `name` ("auto" or one of `BACKENDS`) stands for where parameters are of this kind.

    Raises:
        UserError: there is none of that name, or it cannot take them.
    """
    can_fuse = device.type == "cpu" and dtype == torch.float32
    if name == "auto":
        return "fused" if can_fuse else "foreach"
    if name not in BACKENDS:
        raise UserError(f"optimizer_backend={name}: unknown; known: auto, {', '.join(BACKENDS)}")
    if name == "fused" and not can_fuse:
        kind = str(dtype).removeprefix("torch.")
        raise UserError(
            f"optimizer_backend=fused is for float32 on the CPU, not {kind} on {device}; use auto"
        )
    return name


STATE = {"step", "exp_avg", "exp_avg_sq"}


class AdamATan2(torch.optim.Optimizer):
    """See the module.

    Args:
        params: parameters or parameter groups; real, of any floating dtype, on any device. Moments are float32.
        lr: learning rate; a group's `lr` may be set before every step.
        betas: decay of the first and second moment.
        weight_decay: decoupled, multiplied by `lr`.
        bias_correction: "outside" (the published training) or "inside" (the paper).
        backend: "auto" or a name from `BACKENDS`; "fused" is for float32 on the CPU (what is not contiguous there is
            left to "foreach").

    Raises:
        UserError: an unknown backend, parameters that it cannot take, gradients or a state that are not for it.
    """

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
            alike: dict[tuple[int, str], list[tuple[Tensor, Tensor, Tensor, Tensor]]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    step, *tensors = self._count(p, p.grad)
                    alike[step, self._backend_of(p)].append((p, p.grad, *tensors))
            for (step, backend), members in alike.items():
                params, grads, exp_avgs, exp_avg_sqs = map(list, zip(*members, strict=True))
                BACKENDS[backend](
                    params,
                    grads,
                    exp_avgs,
                    exp_avg_sqs,
                    Hyperparameters(
                        step=step,
                        lr=group["lr"],
                        beta1=group["betas"][0],
                        beta2=group["betas"][1],
                        weight_decay=group["weight_decay"],
                        bias_correction=self._bias_correction,
                    ),
                )
        return loss

    def _count(self, p: Tensor, grad: Tensor) -> tuple[int, Tensor, Tensor]:
        """The number of this step of `p`, from 1, and its moments, which are made at the first."""
        if grad.is_sparse:
            raise UserError(f"AdamATan2 takes dense gradients, that of a parameter {list(p.shape)} is sparse")
        state = self.state[p]
        if not state:
            moments = torch.promote_types(p.dtype, torch.float32)
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(p, dtype=moments)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=moments)
        state["step"] += 1
        return int(state["step"]), state["exp_avg"], state["exp_avg_sq"]

    def _backend_of(self, p: Tensor) -> str:
        if not p.is_contiguous() and self._backend in ("auto", "fused"):
            return "foreach"
        return resolve_backend(self._backend, p.device, p.dtype)
