"""AdamATan2: Adam whose division is an arctangent, so there is no epsilon and the step is bounded.

One front, several backends that compute the same; `backend="auto"` takes the fastest one present. State dicts
have torch's Adam layout (`step`, `exp_avg`, `exp_avg_sq`) and are interchangeable among backends.

Two forms exist, which differ in where the first moment's bias correction c1 = 1 - beta1^t stands
(c2 = 1 - beta2^t):

    inside   p -= lr * atan2(m / c1, sqrt(v / c2))      the paper, Everett et al. 2024, arXiv:2407.05872
    outside  p -= lr / c1 * atan2(m, sqrt(v / c2))      the package adam-atan2 0.0.3 that HRM trained with

Weight decay is decoupled and comes first: p *= 1 - lr * weight_decay.
"""

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


Tensors = list[Tensor]
# update(params, grads, exp_avgs, exp_avg_sqs, hyperparameters), in place
Backend = Callable[[Tensors, Tensors, Tensors, Tensors, Hyperparameters], None]


def reference(params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, h: Hyperparameters):
    """The equations, one tensor after another: what every backend is tested against."""
    m_scale, v_scale, step_size = h.scales
    for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        m.copy_(h.beta1 * m + (1 - h.beta1) * g)
        v.copy_(h.beta2 * v + (1 - h.beta2) * g * g)
        p.copy_(p * (1 - h.lr * h.weight_decay) - step_size * torch.atan2(m * m_scale, v.sqrt() * v_scale))


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
    torch._foreach_mul_(params, 1 - h.lr * h.weight_decay)
    torch._foreach_add_(params, denominators, alpha=-step_size)


BACKENDS: dict[str, Backend] = {"reference": reference, "foreach": foreach}


def resolve_backend(name: str) -> str:
    """The backend that `name` ("auto" or one of `BACKENDS`) stands for on this machine."""
    if name == "auto":
        return "foreach"
    if name not in BACKENDS:
        raise UserError(f"optimizer_backend={name}: unknown; known: auto, {', '.join(BACKENDS)}")
    return name


class AdamATan2(torch.optim.Optimizer):
    """See the module.

    Args:
        params: parameters or parameter groups; float32 or bfloat16, on any device.
        lr: learning rate; a group's `lr` may be set before every step.
        betas: decay of the first and second moment.
        weight_decay: decoupled, multiplied by `lr`.
        bias_correction: "outside" (the published training) or "inside" (the paper).
        backend: "auto" or a name from `BACKENDS`.
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
        self._update = BACKENDS[resolve_backend(backend)]
        self._bias_correction: BiasCorrection = bias_correction
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient. Not collective: reduce the gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                moments = torch.promote_types(p.dtype, torch.float32)
                if not self.state[p]:
                    self.state[p].update(
                        step=torch.tensor(0.0),
                        exp_avg=torch.zeros_like(p, dtype=moments),
                        exp_avg_sq=torch.zeros_like(p, dtype=moments),
                    )
                self.state[p]["step"] += 1
            states = [self.state[p] for p in params]
            self._update(
                params,
                [p.grad for p in params],
                [s["exp_avg"] for s in states],
                [s["exp_avg_sq"] for s in states],
                Hyperparameters(
                    step=int(states[0]["step"]),
                    lr=group["lr"],
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    weight_decay=group["weight_decay"],
                    bias_correction=self._bias_correction,
                ),
            )
        return loss
