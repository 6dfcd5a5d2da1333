"""Milliseconds of a whole training step (forward, loss, backward, optimizers), ours against a plain one.

    python -m benchmarks.step --json                                        the small HRM of sudoku_4x4
    python -m benchmarks.step arch=quickstart local_batch_size=32 --json    the TRM with an MLP of the quickstart
    python -m benchmarks.step arch=small --json                             an HRM of width 128, 16 cells
    python -m benchmarks.step arch=sudoku_6x6 --json                        the same with 36 cells
    python -m benchmarks.step arch=hrm_v1 local_batch_size=32 --json        the published 27M model, 81 cells

The plain step stands in for the published code on the same machine, threads and model: weights cast at
every use, the library's fused attention, the loss in float64, the step ahead from the embedding to the logits, and an
optimizer of torch's multi-tensor operations (`foreach`), since the published one has no CPU code. It is eager;
`compile_plain=true` measures it compiled besides, as the published code is by default: whole, loss included, for fixed
shapes. What the process keeps of freed memory (`memory.keep_memory`) is switched on for the plain step too.
Ours is measured eager, compiled (not with `compile=false`), and on a GPU recorded as a CUDA graph besides;
`ms_per_example` is what a long run does unless told otherwise: compiled, not recorded. (Runs of minutes on a CPU are
not, see `machine.compiles`.) All are measured in turns in this process; the figures to trust are
the ratios and the medians. `share_of_products` is the share of the rate at which this machine does a large
matrix product, in turns with the steps, `share_of_peak` that of a known GPU's data sheet. The dtype is what training
takes on this machine, for the plain step the same; with `plain_dtype=bfloat16` that one takes what the published code
takes everywhere. `attention=NAME` changes that of our steps.

For CPUs: `keep_memory=false` takes kept memory from all steps. With `products=false` none multiplies matrices (the
results are uninitialised memory), so that only the time between the products remains; attention is then two products
in every step, since those inside the library's kernel cannot be left out.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import front
from benchmarks.clock import in_turns, medians_ms
from benchmarks.machine import a_product, peak_tflops
from hrm_ray import machine, memory
from hrm_ray.config.arch import ArchConfig, LossType
from hrm_ray.errors import UserError, first_line
from hrm_ray.halting.base import Control
from hrm_ray.models import act as act_module
from hrm_ray.models import attention as attention_module
from hrm_ray.models import layers, losses
from hrm_ray.models.act import ACT, Batch, Carry
from hrm_ray.models.compiled import compile_recursion, reason
from hrm_ray.models.hrm_v1 import HRMConfig
from hrm_ray.models.recursive import RecursiveModel
from hrm_ray.models.registry import build_model
from hrm_ray.models.trm import TRMConfig
from hrm_ray.optim.adam_atan2 import AdamATan2
from hrm_ray.optim.sign_sgd import sparse_sign_sgd
from hrm_ray.scale.work import Model
from hrm_ray.training.checkpoint import DatasetInfo
from hrm_ray.training.cuda_graph import Recordings, is_the_same

SMALL = {"hidden_size": 96, "num_heads": 3, "H_layers": 2, "L_layers": 2, "pos_encodings": "learned"}
SMALL |= {"puzzle_emb_ndim": 0, "halt_max_steps": 8, "loss": {"loss_type": "softmax_cross_entropy"}}
WIDER = SMALL | {"hidden_size": 128, "num_heads": 4}
MIXER = {
    "mlp_t": True,
    "pos_encodings": "none",
    "H_cycles": 2,
    "L_cycles": 2,
    "hidden_size": 128,
    "num_heads": 4,
}
MIXER |= {"expansion": 3} | {key: SMALL[key] for key in ("puzzle_emb_ndim", "halt_max_steps", "loss")}
ARCHS: dict[str, tuple[ArchConfig, int]] = {  # architecture, Sudoku size
    "sudoku_4x4": (HRMConfig(**SMALL), 4),
    "quickstart": (TRMConfig(**MIXER), 9),
    "small": (HRMConfig(**WIDER), 4),
    "sudoku_6x6": (HRMConfig(**WIDER), 6),
    "hrm_v1": (HRMConfig(), 9),
}


own_rms_norm, own_apply_rope, own_fused = layers.rms_norm, attention_module.apply_rope, layers._fused
own_cross_entropy = losses.cross_entropy


class PlainLinear(layers.Linear):
    """Casts its weight at every use."""

    def cast(self, dtype: torch.dtype) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias)


def plain_rms_norm(x: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.float32)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def plain_apply_rope(x_BNSK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """With sines that have their own signs."""
    x = x_BNSK.to(cos.dtype)
    half_1, half_2 = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-half_2, half_1), dim=-1) * sin).to(x_BNSK.dtype)


def plain_cross_entropy(
    logits: Tensor, labels: Tensor, loss_type: LossType, label_smoothing: float = 0.0
) -> Tensor:
    """In float64 for stablemax, as published; without label smoothing."""
    assert not label_smoothing
    if loss_type == "softmax_cross_entropy":
        return own_cross_entropy(logits, labels, loss_type)
    x = logits.to(torch.float64)
    s = torch.where(x < 0, 1 / (1 - x + 1e-30), x + 1)
    log_p = torch.log(s / s.sum(-1, keepdim=True))
    valid = labels != act_module.IGNORE
    picked = log_p.gather(-1, torch.where(valid, labels, 0)[..., None])[..., 0]
    return torch.where(valid, -picked, 0).float()


def make_setup(arch: ArchConfig, size: int, dtype: torch.dtype, attention: str) -> machine.Setup:
    """What of the machine a model of Sudoku `size` uses."""
    return machine.resolve(
        forward_dtype=str(dtype).removeprefix("torch."),
        attention=attention,
        num_tokens=arch.num_tokens(size * size),
        head_dim=arch.hidden_size // arch.num_heads,
    )


def dataset_info(size: int) -> DatasetInfo:
    """Of Sudoku `size`."""
    return DatasetInfo(
        task="sudoku",
        task_options={"size": size},
        vocab_size=size + 2,
        seq_len=size * size,
        num_puzzle_identifiers=1,
    )


def make_model(
    plain: bool, arch: ArchConfig, size: int, dtype: torch.dtype, attention: str | None = None
) -> tuple[ACT, machine.Setup]:
    """A model of Sudoku `size`, and what of the machine it uses; for `attention` see `make_step`."""
    torch.manual_seed(0)
    setup = make_setup(arch, size, dtype, attention or ("sdpa" if plain else "auto"))
    if plain:
        setup = replace(setup, optimizer_backend="foreach")
    model = build_model(arch, dataset_info(size), setup)
    if plain:
        for module in model.modules():
            if isinstance(module, layers.Linear):
                module.__class__ = PlainLinear
        if arch.pos_encodings == "rope":
            model.inner.rope_sin.chunk(2, dim=-1)[0].neg_()
    return model, setup


def make_step(
    kind: str, arch: ArchConfig, size: int, batch_size: int, dtype: torch.dtype, attention: str | None = None
) -> Callable[[], None]:
    """A function that trains one step.

    Args:
        kind: "plain", "plain, compiled", "eager", "compiled", "recorded" or "compiled, recorded".
        attention: in place of what such a step takes.
    """
    plain = "plain" in kind
    model, setup = make_model(plain, arch, size, dtype, attention)
    optimizer = AdamATan2(model.parameters(), backend=setup.optimizer_backend)
    tokens = torch.randint(1, size + 2, (batch_size, size * size), device=setup.device)
    batch = Batch(tokens.int(), tokens, torch.zeros(batch_size, dtype=torch.int32, device=setup.device))
    control = Control(torch.zeros(batch_size, dtype=torch.int32, device=setup.device))
    carry = model.initial_carry(batch)
    if plain:
        read_ahead_in_full(model.inner, batch)

    def forward(carry: Carry, batch: Batch, control: Control) -> tuple[Carry, Tensor]:
        out = model(carry, batch, control)
        return out.carry, losses.act_loss(out, arch.loss.loss_type)[0]

    if "compiled" in kind and not plain:
        with compiling("compile"):
            compile_recursion(model, lambda size: forward(carry, batch, control)[1], [batch_size])
    if kind == "plain, compiled":
        forward = torch.compile(forward, dynamic=False)

    def learn(carry: Carry, batch: Batch, control: Control) -> tuple[Carry, tuple[Tensor, Tensor] | None]:
        with Swapped(plain):
            carry, loss = forward(carry, batch, control)
            (loss / batch_size).backward()
        return carry, model.inner.puzzle_emb.take_gradients() if arch.puzzle_emb_ndim else None

    recordings = Recordings()
    gradients = [torch.zeros_like(parameter) for parameter in model.parameters()]
    if "recorded" in kind:
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        recordings.record(learn, carry, batch, control)
        if not is_the_same(recordings, learn, gradients, carry, batch, control):
            raise RuntimeError("replayed, the step differs")
        torch._foreach_zero_(gradients)

    def step() -> None:
        nonlocal carry
        carry, looked_up = recordings.replay(carry, batch, control) or learn(carry, batch, control)
        optimizer.step()
        if looked_up:
            table = model.inner.puzzle_emb.weights
            sparse_sign_sgd(table, *looked_up, lr=1e-2, weight_decay=0.1, backend=setup.optimizer_backend)
        if recordings:
            torch._foreach_zero_(gradients)
        else:
            optimizer.zero_grad()

    if kind == "plain, compiled":
        with compiling("compile_plain"):
            step()
    return step


@contextmanager
def compiling(key: str) -> Iterator[None]:
    """Inside, what a compiler says becomes a UserError about `key`."""
    try:
        yield
    except Exception as error:  # of any kind: a compiler has many ways to fail
        raise UserError(f"{key}=true fails: {reason(error)}; use {key}=false") from error


def read_ahead_in_full(inner: RecursiveModel, batch: Batch) -> None:
    """Let the step ahead embed the puzzle and make logits, which ours leaves out; it is what runs without gradients."""
    own_q_values = inner.q_values

    def q_values(z_H: Tensor) -> tuple[Tensor, Tensor]:
        if not torch.is_grad_enabled():
            inner.embed(batch.inputs, batch.puzzle_identifiers)
            inner.lm_head(z_H[:, inner.num_puzzle_tokens :])
        return own_q_values(z_H)

    inner.q_values = q_values  # type: ignore[method-assign]


class Swapped:
    """Inside, the plain norm, gate, rotation and loss stand in for ours."""

    def __init__(self, plain: bool):
        self._plain = plain

    def __enter__(self) -> None:
        if self._plain:
            layers.rms_norm, attention_module.apply_rope = plain_rms_norm, plain_apply_rope
            layers._fused = lambda: None
            losses.cross_entropy = plain_cross_entropy

    def __exit__(self, *_: object) -> None:
        layers.rms_norm, attention_module.apply_rope = own_rms_norm, own_apply_rope
        layers._fused = own_fused
        losses.cross_entropy = own_cross_entropy


@contextmanager
def without_products() -> Iterator[None]:
    """Inside, matrix products on the CPU leave their results unwritten."""

    def product(a: Tensor, b: Tensor) -> Tensor:
        return a.new_empty(*a.shape[:-1], b.shape[-1])

    def product_into(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        return out

    library = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once")  # that kernels are overridden
            for name in ("mm", "bmm"):
                library.impl(name, product, "CPU", allow_override=True)
                library.impl(f"{name}.out", product_into, "CPU", allow_override=True)
        yield
    finally:
        library._destroy()


def measure(
    arch: str,
    local_batch_size: int,
    rounds: int,
    dtype: str,
    plain_dtype: str,
    attention: str,
    compile: bool,
    compile_plain: bool,
    products: bool,
    keep_memory: bool,
) -> dict:
    on_cpu = not torch.cuda.is_available()
    for key, value in {"products": products, "keep_memory": keep_memory}.items():
        if not (value or on_cpu):
            raise UserError(
                f"{key}=false is for CPUs; CUDA_VISIBLE_DEVICES= before the command hides the GPU"
            )
    if not products and attention not in ("auto", "matmul"):
        raise UserError(f"attention={attention}: products=false takes two products; leave one of them out")
    is_kept = keep_memory and on_cpu and memory.keep_memory()
    config, size = ARCHS[arch]
    batch_size, precision = local_batch_size, front.dtype_of(dtype)
    plain_precision = precision if plain_dtype == "same" else front.dtype_of(plain_dtype)

    def attention_of(kind: str) -> str:
        if not products:
            return "matmul"
        return "sdpa" if "plain" in kind else attention

    multiply, operations = a_product(precision)
    calls: dict[str, Callable[[], object]] = {"product": multiply} if products else {}
    kinds = {"compiled": compile, "eager": True, "plain": True, "plain, compiled": compile_plain}
    for kind in (kind for kind, wanted in kinds.items() if wanted):
        taken = plain_precision if "plain" in kind else precision
        calls[kind] = make_step(kind, config, size, batch_size, taken, attention_of(kind))
    recorded, problem = ("compiled, recorded" if compile else "recorded"), None
    if torch.cuda.is_available():
        try:
            calls[recorded] = make_step(recorded, config, size, batch_size, precision, attention_of(recorded))
        except Exception as error:  # of any kind; the others are measured all the same
            problem = first_line(error)
    with nullcontext() if products else without_products():
        times = in_turns(calls, rounds)
    ms = medians_ms(times)
    of_examples = {kind: float(f"{ms[kind] / batch_size:.4g}") for kind in calls if kind != "product"}
    ours = "compiled" if compile else "eager"
    return {
        "benchmark": "step",
        "arch": arch,
        "local_batch_size": batch_size,
        "dtype": str(precision).removeprefix("torch."),
        "attention": make_setup(config, size, precision, attention_of(ours)).attention,
        "threads": torch.get_num_threads(),
        "ms_per_example": of_examples[ours],
        "compiled": compile,
        "eager_ms_per_example": of_examples["eager"],
        "recorded_ms_per_example": of_examples.get(recorded),
        "recording_failed": problem,
        "plain_ms_per_example": of_examples["plain"],
        "plain_compiled_ms_per_example": of_examples.get("plain, compiled"),
        "plain_dtype": str(plain_precision).removeprefix("torch."),
        "speedup_over_plain": round(ms["plain"] / ms[ours], 3),
        "products": products,
        "keep_memory": is_kept,
        **rates(
            Model.of(config, dataset_info(size)).training.flops * batch_size,
            ms[ours],
            operations,
            ms.get("product"),
            precision,
        ),
        "spread_ms": [float(f"{t * 1e3 / batch_size:.4g}") for t in (min(times[ours]), max(times[ours]))],
        "rounds": rounds,
    }


def rates(
    flops: float, ms: float, product_flops: float, product_ms: float | None, dtype: torch.dtype
) -> dict:
    """Those of a step beside those of a product; None for each if no product was timed."""
    names = ("tflops", "product_tflops", "share_of_products", "share_of_peak")
    if product_ms is None:
        return dict.fromkeys(names)
    rate, limit, peak = flops / ms / 1e9, product_flops / product_ms / 1e9, peak_tflops(dtype)
    share_of_peak = round(rate / peak, 3) if peak else None
    return dict(
        zip(names, (round(rate, 3), round(limit, 3), round(rate / limit, 3), share_of_peak), strict=True)
    )


def tell(result: dict) -> str:
    recorded, plain_compiled = result["recorded_ms_per_example"], result["plain_compiled_ms_per_example"]
    plain_dtype = f" ({result['plain_dtype']})" if result["plain_dtype"] != result["dtype"] else ""
    rate = "without products"
    if result["products"]:
        rate = f"{result['tflops']} TFLOP/s, {result['share_of_products']:.0%} of a product's"
    return (
        f"{result['arch']}, {result['dtype']}: {result['ms_per_example']} ms an example ({rate}), "
        f"eager {result['eager_ms_per_example']}, "
        f"{f'recorded {recorded}, ' if recorded else ''}plain{plain_dtype} {result['plain_ms_per_example']}: "
        f"{result['speedup_over_plain']}x{f', compiled {plain_compiled}' if plain_compiled else ''}"
    )


def main() -> None:
    known = {"arch": tuple(ARCHS), "local_batch_size": 128, "rounds": 8}
    known |= {"dtype": front.DTYPES, "plain_dtype": ("same", "float32", "bfloat16")}
    known |= {"attention": ("auto", *attention_module.KERNELS)}
    switches = {"compile": True, "compile_plain": False, "products": True, "keep_memory": True}
    front.run(__doc__, measure, tell, known | {"threads": front.THREADS, **switches})


if __name__ == "__main__":
    main()
