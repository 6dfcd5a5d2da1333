"""AdamATan2: Adam whose division is an arctangent, so there is no epsilon and the step is bounded.

One front, several backends that compute the same; `backend="auto"` takes the fastest one for each device and dtype.
State dicts have torch's Adam layout (`step`, `exp_avg`, `exp_avg_sq`) and are interchangeable among backends.

Two forms exist, which differ in where the first moment's bias correction c1 = 1 - beta1^t stands
(c2 = 1 - beta2^t):

    inside   p -= lr * atan2(m / c1, sqrt(v / c2))      the paper, Everett et al. 2024, arXiv:2407.05872
    outside  p -= lr / c1 * atan2(m, sqrt(v / c2))      the package adam-atan2 0.0.3 that HRM trained with

Weight decay is decoupled and comes first: p *= 1 - lr * weight_decay.
"""

import inspect
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from hrm_ray.config.optimizer import OptimizerConfig
from hrm_ray.config.schema import BiasCorrection, TrainConfig
from hrm_ray.errors import UserError, first_line


class Slot(NamedTuple):
    """A parameter and what belongs to it.

    `step` is the number of its updates so far, float32[]: on the parameter's device for the backend "cuda", which then
    never waits for it, on the CPU for the others.
    """

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor


@dataclass(frozen=True)
class Group:
    """What the parameters of a group have in common.

    Attributes:
        lr, weight_decay: numbers, or tensors of one.
        grad_scale: gradients are so many times too large (`torch.amp.GradScaler`).
        found_inf: if not 0, nothing is updated.
    """

    lr: float | Tensor
    beta1: float
    beta2: float
    weight_decay: float | Tensor
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
        torch._foreach_add_([slot.step for slot in slots], 1)
        at_step: dict[int, list[Slot]] = defaultdict(list)
        for slot in slots:
            at_step[int(slot.step)].append(slot)
        for step, members in at_step.items():
            params, grads, exp_avgs, exp_avg_sqs, _ = map(list, zip(*members, strict=True))
            grads = [grad.to(m.dtype) for grad, m in zip(grads, exp_avgs, strict=True)]
            if group.grad_scale is not None:
                grads = [grad / group.grad_scale.to(grad.device) for grad in grads]
            numbers = Hyperparameters(
                step=step,
                lr=float(group.lr),
                beta1=group.beta1,
                beta2=group.beta2,
                weight_decay=float(group.weight_decay),
                bias_correction=group.bias_correction,
            )
            update(params, grads, exp_avgs, exp_avg_sqs, numbers)

    return run


@on_host
def reference(params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, h: Hyperparameters):
    """The equations, one tensor after another: what every backend is tested against."""
    m_scale, v_scale, step_size = h.scales
    for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        m.copy_(h.beta1 * m + (1 - h.beta1) * g)
        v.copy_(h.beta2 * v + (1 - h.beta2) * g * g)
        p.copy_(p.to(m.dtype) * h.kept - step_size * torch.atan2(m * m_scale, v.sqrt() * v_scale))


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
    # Narrow parameters are rounded once, or small steps and decays would be lost one by one.
    wide = [p.to(m.dtype) for p, m in zip(params, exp_avgs, strict=True)]  # a wide one itself
    torch._foreach_mul_(wide, h.kept)
    torch._foreach_add_(wide, denominators, alpha=-step_size)
    for p, w in zip(params, wide, strict=True):
        if p is not w:
            p.copy_(w)


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


CUDA_DTYPES = (torch.float32, torch.bfloat16)
BACKENDS: dict[str, Backend] = {"reference": reference, "foreach": foreach, "fused": fused, "cuda": cuda}


@lru_cache
def resolve_backend(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """The backend that `name` ("auto" or one of `BACKENDS`) stands for where parameters are of this kind.

    Where the fast one cannot be had, "auto" is "foreach"; a warning says so and why, once.

    Raises:
        UserError: there is none of that name, or it cannot take them.
    """
    if name not in ("auto", *BACKENDS):
        raise UserError(f"optimizer_backend={name}: unknown; known: auto, {', '.join(BACKENDS)}")
    if name in ("reference", "foreach"):
        return name
    fast, dtypes, why_not = (
        ("cuda", CUDA_DTYPES, _why_not_cuda)
        if device.type == "cuda"
        else ("fused", (torch.float32,), _why_not_fused)
    )
    if name not in ("auto", fast) or device.type not in ("cpu", "cuda") or dtype not in dtypes:
        if name == "auto":
            return "foreach"
        kind = f"{str(dtype).removeprefix('torch.')} on {device}"
        what = "float32 and bfloat16 on GPUs" if name == "cuda" else "float32 on the CPU"
        raise UserError(f"optimizer_backend={name} is for {what}, not {kind}; use auto")
    reason = why_not(device)
    if reason is None:
        return fast
    if name != "auto":
        raise UserError(f"optimizer_backend={name}: {reason}; use auto")
    warnings.warn(f"AdamATan2 runs as optimizer_backend=foreach, which is slower: {reason}", stacklevel=2)
    return "foreach"


def _why_not_cuda(device: torch.device) -> str | None:
    from hrm_ray.optim import fused_cuda

    return fused_cuda.why_not(device)


def _why_not_fused(device: torch.device) -> str | None:
    try:
        from hrm_ray.optim import fused_cpu  # noqa: F401
    except Exception as error:  # no numba, or whatever it raises where it cannot compile
        return first_line(error)
    return None


# Moments are as large and on the same device as their parameter, in float32 or wider.
STATE = ("step", "exp_avg", "exp_avg_sq")
# Keys of groups that show that the state is another optimizer's.
FOREIGN = {"eps", "momentum", "amsgrad", "dampening", "nesterov", "alpha", "rho", "etas"}


class _Unwrapped(torch.optim.Optimizer):
    """Without the wrappers that keep torch's compiler away: their first call imports it, which takes a second."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


class AdamATan2(_Unwrapped):
    """See the module.

    Args:
        params: parameters or parameter groups; real, of any floating dtype, on any device. Moments are float32.
        lr: learning rate, at least 0; a group's `lr` may be set before every step.
        betas: decay of the first and second moment, from 0 to below 1.
        weight_decay: decoupled, multiplied by `lr`; at least 0. For a CUDA graph it and `lr` have to be tensors on the
            GPU, float32[], which are read at every replay, and a step is taken before; after `load_state_dict` record
            the graph again.
        bias_correction: "outside" (the published training) or "inside" (the paper).
        backend: "auto" or a name from `BACKENDS`: "fused" is for float32 on the CPU, "cuda" for float32 and bfloat16 on
            a GPU; what is not plain and contiguous is left to "foreach".

    Raises:
        UserError: an unknown backend, numbers out of range; parameters, gradients or a state that are not for it.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float | Tensor = 0.1,
        *,
        bias_correction: BiasCorrection = "outside",
        backend: str = "auto",
    ):
        self._backend = backend
        numbers = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(params, numbers | {"bias_correction": bias_correction})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_backend": self._backend}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See torch; checks the numbers, and that the backend can take the parameters."""
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
            for p in self.param_groups[-1]["params"]:
                if not p.is_floating_point():
                    raise UserError(f"AdamATan2 moves real numbers, not {p.dtype}")
                self._backend_of(p)
        except UserError:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See torch; keeps moments in float32.

        Raises:
            UserError: the state of another optimizer, of other parameters, or of the other form of bias correction
                (the published package's, which does not say it, is "outside").
        """
        if not {"param_groups", "state"} <= state_dict.keys():
            raise UserError("not a state of AdamATan2: it lacks param_groups or state")
        published = {"bias_correction": "outside"}
        state_dict = state_dict | {
            "param_groups": [published | group for group in state_dict["param_groups"]]
        }
        sizes, ours = (
            [len(group["params"]) for group in groups]
            for groups in (state_dict["param_groups"], self.param_groups)
        )
        if sizes != ours:
            raise UserError(f"the state is of other parameters: groups of {sizes}, here they are of {ours}")
        for group, own in zip(state_dict["param_groups"], self.param_groups, strict=True):
            foreign = sorted(FOREIGN & group.keys()) or sorted(self.defaults.keys() - group.keys())
            if foreign:
                raise UserError(f"not a state of AdamATan2: its groups differ in {', '.join(foreign)}")
            _check_group(group)
            if group["bias_correction"] != own["bias_correction"]:
                forms = f"{group['bias_correction']}, here it is {own['bias_correction']}"
                raise UserError(f"the state was trained with bias_correction={forms}")
        for state in state_dict["state"].values():
            if set(state) != set(STATE):
                raise UserError(f"not a state of AdamATan2: it holds {', '.join(sorted(state)) or 'nothing'}")
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        given = [
            (p, state_dict["state"][i])
            for i, p in zip(saved, params, strict=True)
            if i in state_dict["state"]
        ]
        for p, state in given:
            for name in ("exp_avg", "exp_avg_sq"):
                if state[name].shape != p.shape:
                    shapes = f"{list(state[name].shape)} for {list(p.shape)}"
                    raise UserError(f"the state is of other parameters: {name} has the shape {shapes}")
        super().load_state_dict(
            state_dict
        )  # which casts moments to the parameters' dtype, and keeps their strides
        for p, state in given:
            self.state[p] = self._new_state(p)
            for name, tensor in self.state[p].items():
                tensor.copy_(torch.as_tensor(state[name]))

    def _new_state(self, p: Tensor) -> dict[str, Tensor]:
        moments = torch.promote_types(p.dtype, torch.float32)
        where = p.device if self._backend_of(p) == "cuda" else "cpu"
        return {
            "step": torch.zeros((), dtype=torch.float32, device=where),
            "exp_avg": torch.zeros_like(p, dtype=moments),
            "exp_avg_sq": torch.zeros_like(p, dtype=moments),
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient. Not collective: reduce the gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # All are looked at before the first one moves.
        by_backend: list[dict[str, list[Slot]]] = []
        for group in self.param_groups:
            slots: dict[str, list[Slot]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    backend = self._backend_of(p)
                    slots[backend].append(self._slot(p, p.grad, backend))
            by_backend.append(slots)
        for group, slots in zip(self.param_groups, by_backend, strict=True):
            shared = Group(
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                bias_correction=group["bias_correction"],
                # A GradScaler sets these where it steps, since `_step_supports_amp_scaling`.
                grad_scale=getattr(self, "grad_scale", None),
                found_inf=getattr(self, "found_inf", None),
            )
            for backend, members in slots.items():
                BACKENDS[backend](members, shared)
        return loss

    def _slot(self, p: Tensor, grad: Tensor, backend: str) -> Slot:
        """`p` with its state, which is made at the first step."""
        if grad.layout is not torch.strided:
            raise UserError(f"AdamATan2 takes dense gradients, that of a parameter {list(p.shape)} is sparse")
        if is_recorded(p.device) and (backend != "cuda" or not self.state[p]):
            need = "a step before it" if backend == "cuda" else "optimizer_backend=cuda"
            raise UserError(
                f"a CUDA graph of AdamATan2 needs {need}, for a parameter {list(p.shape)} {p.dtype}"
            )
        if not self.state[p]:
            self.state[p].update(self._new_state(p))
        state = self.state[p]
        for name in ("exp_avg", "exp_avg_sq"):  # kernels take it on trust
            _check_moment(p, state[name])
        state["step"] = state["step"].to(p.device if backend == "cuda" else "cpu")
        return Slot(p, grad, state["exp_avg"], state["exp_avg_sq"], state["step"])

    def _backend_of(self, p: Tensor) -> str:
        name = resolve_backend(self._backend, p.device, p.dtype)
        is_plain = p.is_contiguous() and type(p) in (Tensor, nn.Parameter)
        has_own_dtype = p.grad is None or p.grad.dtype == p.dtype
        return name if name == "reference" or (is_plain and has_own_dtype) else "foreach"


def is_recorded(device: torch.device) -> bool:
    """Whether what is launched on this device becomes part of a CUDA graph instead of running."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _check_moment(p: Tensor, moment: Tensor) -> None:
    """UserError if a moment is not like those that are made for `p`."""
    is_like = moment.device == p.device and moment.shape == p.shape
    is_like = is_like and moment.dtype == torch.promote_types(p.dtype, torch.float32)
    if not is_like or (p.is_contiguous() and not moment.is_contiguous()):
        kinds = [f"{list(t.shape)} {t.dtype} on {t.device}" for t in (p, moment)]
        raise UserError(
            f"a parameter is {kinds[0]}, its moments are {kinds[1]}; "
            "make the optimizer, or load its state, after the model is moved or changed"
        )


def _check_group(group: dict[str, Any]) -> None:
    """UserError if a number is out of range. Those on a GPU are not looked at, which would wait for it."""
    for name in ("lr", "weight_decay"):
        value = group[name]
        if not (isinstance(value, Tensor) and value.is_cuda) and not 0 <= value < math.inf:
            raise UserError(f"{name}={value} has to be at least 0")
    betas = group["betas"]
    if not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"betas={betas} have to be from 0 to below 1")
    if group["bias_correction"] not in ("outside", "inside"):
        raise UserError(f"bias_correction={group['bias_correction']}: unknown; known: outside, inside")


class AdamATan2Config(OptimizerConfig):
    """AdamATan2; `bias_correction` and `optimizer_backend` are keys of a run."""

    without_effect: ClassVar[frozenset[str]] = frozenset()

    name: Literal["adam_atan2"] = "adam_atan2"
    """The optimizer; optimizer=NAME chooses it."""

    def describe(self, backend: str, device: torch.device) -> str:
        return f"AdamATan2 {resolve_backend(backend, device)}"  # which is compiled, where it has to be

    def build(self, parameters: Mapping[str, nn.Parameter], config: TrainConfig, backend: str) -> AdamATan2:
        return AdamATan2(
            parameters.values(),
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            bias_correction=config.bias_correction,
            backend=backend,
        )
