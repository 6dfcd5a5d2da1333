"""Milliseconds of a whole training step (forward, loss, backward, optimizers), ours against a plain one.

    python -m benchmarks.step --json                                        the small HRM of the quickstart
    python -m benchmarks.step arch=small --json                             one of width 128, 16 cells
    python -m benchmarks.step arch=sudoku_6x6 --json                        that of the 6x6 experiment
    python -m benchmarks.step arch=hrm_v1 local_batch_size=32 --json        the published 27M model, 81 cells

The plain step stands in for the published code, not compiled, on the same machine, threads and model: weights cast at
every use, the library's fused attention, the loss in float64, the step ahead from the embedding to the logits, and an
optimizer of torch's multi-tensor operations (`foreach`), since the published one has no CPU code. What the process
keeps of freed memory (`machine.keep_memory`) is a gain of ours that the plain step has too. Ours is measured eager,
compiled (not with `compile=false`), and on a GPU recorded as a CUDA graph besides; `ms_per_example` is what training
does unless told otherwise: compiled, not recorded. All are measured in turns in this process; the figures to trust are
the ratios and the medians. `share_of_products` is the share of the rate at which this machine does a large
matrix product, in turns with the steps, `share_of_peak` that of a known GPU's data sheet. The dtype is what training
takes on this machine, for the plain step too; with `plain_dtype=bfloat16` that one takes what the published code takes
everywhere.

For CPUs: `keep_memory=false` takes kept memory from all steps. With `products=false` none multiplies matrices (the
results are what lies in memory), which leaves the time of what is between the products.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import front
from benchmarks.clock import in_turns, medians_ms
from benchmarks.machine import a_product, peak_tflops
from hrm_ray import machine
from hrm_ray.errors import UserError, first_line
from hrm_ray.models import act as act_module
from hrm_ray.models import layers, losses
from hrm_ray.models.act import Batch, Carry
from hrm_ray.models.compiled import compile_recursion
from hrm_ray.models.halting import Control
from hrm_ray.models.hrm_v1 import HRMConfig
from hrm_ray.models.recursive import RecursiveModel
from hrm_ray.models.registry import build_model
from hrm_ray.optim.adam_atan2 import AdamATan2
from hrm_ray.optim.sign_sgd import sparse_sign_sgd
from hrm_ray.training.checkpoint import DatasetInfo
from hrm_ray.training.cuda_graph import Recordings, is_the_same

SMALL = {"hidden_size": 96, "num_heads": 3, "H_layers": 2, "L_layers": 2, "pos_encodings": "learned"}
SMALL |= {"puzzle_emb_ndim": 0, "halt_max_steps": 8, "loss": {"loss_type": "softmax_cross_entropy"}}
WIDER = SMALL | {"hidden_size": 128, "num_heads": 4}
ARCHS = {  # architecture, Sudoku size
    "quickstart": (HRMConfig(**SMALL), 4),
    "small": (HRMConfig(**WIDER), 4),
    "sudoku_6x6": (HRMConfig(**WIDER), 6),
    "hrm_v1": (HRMConfig(), 9),
}


own_rms_norm, own_apply_rope, own_cross_entropy = layers.rms_norm, layers.apply_rope, losses.cross_entropy


class PlainLinear(layers.Linear):
    """Casts its weight at every use."""

    def cast(self, dtype: torch.dtype) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias)


def plain_rms_norm(x: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + layers.RMS_EPS)).to(x.dtype)


def plain_apply_rope(x_BNSK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """With sines that have their own signs."""
    x = x_BNSK.to(cos.dtype)
    half_1, half_2 = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-half_2, half_1), dim=-1) * sin).to(x_BNSK.dtype)


def plain_cross_entropy(logits: Tensor, labels: Tensor, loss_type: losses.LossType) -> Tensor:
    """In float64 for stablemax, as published."""
    if loss_type == "softmax_cross_entropy":
        return own_cross_entropy(logits, labels, loss_type)
    x = logits.to(torch.float64)
    s = torch.where(x < 0, 1 / (1 - x + 1e-30), x + 1)
    log_p = torch.log(s / s.sum(-1, keepdim=True))
    valid = labels != act_module.IGNORE
    picked = log_p.gather(-1, torch.where(valid, labels, 0)[..., None])[..., 0]
    return torch.where(valid, -picked, 0).float()


def make_step(
    kind: str, arch: HRMConfig, size: int, batch_size: int, dtype: torch.dtype
) -> Callable[[], None]:
    """A function that trains one step; kind is "plain", "eager", "compiled", or "recorded" or "compiled, recorded"."""
    torch.manual_seed(0)
    seq_len, vocab_size = size * size, size + 2
    auto = machine.resolve(
        forward_dtype=str(dtype).removeprefix("torch."),
        num_tokens=arch.num_tokens(seq_len),
        head_dim=arch.hidden_size // arch.num_heads,
    )
    plain = kind == "plain"
    setup = machine.Setup(
        device=auto.device,
        dtype=dtype,
        attention="sdpa" if plain else auto.attention,
        optimizer_backend="foreach" if plain else auto.optimizer_backend,
    )
    info = DatasetInfo(
        task="sudoku",
        task_options={"size": size},
        vocab_size=vocab_size,
        seq_len=seq_len,
        num_puzzle_identifiers=1,
    )
    model = build_model(arch, info, setup)
    if plain:
        for module in model.modules():
            if isinstance(module, layers.Linear):
                module.__class__ = PlainLinear
        if arch.pos_encodings == "rope":
            model.inner.rope_sin.chunk(2, dim=-1)[0].neg_()
    optimizer = AdamATan2(model.parameters(), backend=setup.optimizer_backend)
    tokens = torch.randint(1, vocab_size, (batch_size, seq_len), device=setup.device)
    batch = Batch(tokens.int(), tokens, torch.zeros(batch_size, dtype=torch.int32, device=setup.device))
    control = Control(min_halt_steps=torch.zeros(batch_size, dtype=torch.int32, device=setup.device))
    carry = model.initial_carry(batch)
    if plain:
        read_ahead_in_full(model.inner, batch)
    if "compiled" in kind:
        compile_recursion(model, carry, batch, control, [batch_size])

    def learn(carry: Carry, batch: Batch, control: Control) -> tuple[Carry, tuple[Tensor, Tensor] | None]:
        with Swapped(plain):
            out = model(carry, batch, control)
            loss, _ = losses.act_loss(out, arch.loss.loss_type)
            (loss / batch_size).backward()
        return out.carry, model.inner.puzzle_emb.take_gradients() if arch.puzzle_emb_ndim else None

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

    return step


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
    """Inside, the plain norm, rotation and loss stand in for ours."""

    def __init__(self, plain: bool):
        self._plain = plain

    def __enter__(self) -> None:
        if self._plain:
            layers.rms_norm, layers.apply_rope = plain_rms_norm, plain_apply_rope
            losses.cross_entropy = plain_cross_entropy

    def __exit__(self, *_: object) -> None:
        layers.rms_norm, layers.apply_rope = own_rms_norm, own_apply_rope
        losses.cross_entropy = own_cross_entropy


def flops_per_example(arch: HRMConfig, seq_len: int) -> float:
    """Multiply-adds x 2 of the matrix products of one training step; attention's own products included."""
    D, S = arch.hidden_size, seq_len + -(-arch.puzzle_emb_ndim // arch.hidden_size)
    F_ = layers.swiglu_width(D, arch.expansion)
    block = 2 * S * (4 * D * D + 3 * D * F_) + 4 * S * S * D
    updates_L = arch.H_cycles * arch.L_cycles * arch.L_layers
    updates_H = arch.H_cycles * arch.H_layers
    forward = block * (updates_L + updates_H)
    backward = 2 * block * (arch.L_layers + arch.H_layers)
    return 2 * forward + backward  # the second forward pass is the target of q_continue


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
    compile: bool,
    products: bool,
    keep_memory: bool,
) -> dict:
    on_cpu = not torch.cuda.is_available()
    if not (products or on_cpu):
        raise UserError("products=false is for CPUs; CUDA_VISIBLE_DEVICES= before the command hides the GPU")
    if keep_memory and on_cpu:
        machine.keep_memory()
    config, size = ARCHS[arch]
    batch_size, precision = local_batch_size, front.dtype_of(dtype)
    plain_precision = precision if plain_dtype == "auto" else front.dtype_of(plain_dtype)
    kinds = [*(["compiled"] if compile else []), "eager"]
    steps = {kind: make_step(kind, config, size, batch_size, precision) for kind in kinds}
    steps["plain"] = make_step("plain", config, size, batch_size, plain_precision)
    recorded, problem = ("compiled, recorded" if compile else "recorded"), None
    if torch.cuda.is_available():
        try:
            steps[recorded] = make_step(recorded, config, size, batch_size, precision)
        except Exception as error:  # of any kind; the others are measured all the same
            problem = first_line(error)
    multiply, operations = a_product(precision)
    with nullcontext() if products else without_products():
        times = in_turns({**steps, "product": multiply}, rounds)
    ms = medians_ms(times)
    medians = {kind: ms[kind] / batch_size for kind in steps}
    ours = medians[kinds[0]]
    rate, limit = flops_per_example(config, size * size) / ours * 1e3, operations / ms["product"] * 1e3
    peak = peak_tflops(precision)
    rates = {
        "tflops": round(rate / 1e12, 3),
        "product_tflops": round(limit / 1e12, 3),
        "share_of_products": round(rate / limit, 3),
        "share_of_peak": round(rate / 1e12 / peak, 3) if peak else None,
    }
    return {
        "benchmark": "step",
        "arch": arch,
        "local_batch_size": batch_size,
        "dtype": str(precision).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "ms_per_example": round(ours, 3),
        "compiled": compile,
        "eager_ms_per_example": round(medians["eager"], 3),
        "recorded_ms_per_example": round(medians[recorded], 3) if recorded in medians else None,
        "recording_failed": problem,
        "plain_ms_per_example": round(medians["plain"], 3),
        "plain_dtype": str(plain_precision).removeprefix("torch."),
        "speedup_over_plain": round(medians["plain"] / ours, 3),
        "products": products,
        "keep_memory": keep_memory,
        **(rates if products else dict.fromkeys(rates)),
        "spread_ms": [round(t * 1e3 / batch_size, 3) for t in (min(times[kinds[0]]), max(times[kinds[0]]))],
        "rounds": rounds,
    }


def tell(result: dict) -> str:
    recorded = result["recorded_ms_per_example"]
    plain_dtype = f" ({result['plain_dtype']})" if result["plain_dtype"] != result["dtype"] else ""
    rate = "without products"
    if result["products"]:
        rate = f"{result['tflops']} TFLOP/s, {result['share_of_products']:.0%} of a product's"
    return (
        f"{result['arch']}, {result['dtype']}: {result['ms_per_example']} ms an example ({rate}), "
        f"eager {result['eager_ms_per_example']}, "
        f"{f'recorded {recorded}, ' if recorded else ''}plain{plain_dtype} {result['plain_ms_per_example']}: "
        f"{result['speedup_over_plain']}x"
    )


def main() -> None:
    known = {"arch": tuple(ARCHS), "local_batch_size": 128, "rounds": 8}
    known |= {"dtype": front.DTYPES, "plain_dtype": front.DTYPES}
    switches = {"compile": True, "products": True, "keep_memory": True}
    front.run(__doc__, measure, tell, known | {"threads": front.THREADS, **switches})


if __name__ == "__main__":
    main()
