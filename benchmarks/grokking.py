"""Milliseconds of a training step of the decoder on equations modulo 97, against the published model.

    python -m benchmarks.grokking threads=1 --json
    python -m benchmarks.grokking threads=1 models=4 rounds=20

Beside ours, in float32 and bfloat16: the model as openai/grok has it (heads apart, all tokens computed up to the end,
the closing token learned too), in plain torch; and `models` decoders with seeds of their own as one, their weights
stacked (torch.func), of which the time of each counts. Batches of 512, two layers of width 128, AdamW; in turns,
medians.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from benchmarks import front
from benchmarks.clock import in_turns, medians_ms
from hrm_ray import machine
from hrm_ray.config.arch import arch_class
from hrm_ray.config.schema import TrainConfig
from hrm_ray.halting.base import Moment
from hrm_ray.models.act import IGNORE, Batch
from hrm_ray.models.decoder import Sinusoids
from hrm_ray.models.registry import build_model
from hrm_ray.training.step import LossModule

BATCH, P, D, HEADS = 512, 97, 128, 4
EOS, EQUALS, OPERATOR, NUMBERS = range(4)


class Equations:
    """What a model has to know of `<eos> a - b =`, which asks for one number."""

    vocab_size, seq_len, num_puzzle_identifiers = NUMBERS + P, 5, 1

    def coordinates(self) -> None:
        return None

    def answer_cells(self) -> int:
        return 1


def equations() -> Tensor:
    """A batch of rows `<eos> a - b = c <eos>`."""
    a, b = torch.randint(0, P, (2, BATCH), generator=torch.Generator().manual_seed(0))
    columns = (torch.full_like(a, EOS), a + NUMBERS, torch.full_like(a, OPERATOR), b + NUMBERS)
    closing = (torch.full_like(a, EQUALS), (a - b) % P + NUMBERS, torch.full_like(a, EOS))
    return torch.stack([*columns, *closing], 1)


class Head(nn.Module):
    """One head of attention, with its own matrices."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(D, D // HEADS, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(1, 2) / math.sqrt(D // HEADS)
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        return scores.masked_fill(later, -torch.inf).softmax(-1) @ self.v(x)


class PublishedBlock(nn.Module):
    """A layer as published."""

    def __init__(self):
        super().__init__()
        self.heads, self.o = nn.ModuleList(Head() for _ in range(HEADS)), nn.Linear(D, D, bias=False)
        self.ffn = nn.Sequential(nn.Linear(D, 4 * D, bias=False), nn.ReLU(), nn.Linear(4 * D, D, bias=False))
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](x + self.o(torch.cat([head(x) for head in self.heads], -1)))
        return self.norms[1](x + self.ffn(x))


class Published(nn.Module):
    """The model as published, with its vocabulary of 239 tokens."""

    def __init__(self):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(239, D), Sinusoids(6, D)
        self.blocks, self.out = (
            nn.Sequential(PublishedBlock(), PublishedBlock()),
            nn.Linear(D, 239, bias=False),
        )

    def forward(self, rows: Tensor) -> Tensor:
        """The loss of the answer and the closing token."""
        logits = self.out(self.blocks(self.embedding(rows[:, :-1]) + self.positions()))
        return F.cross_entropy(logits[:, -2:].flatten(0, 1), rows[:, -2:].flatten())


def ours(dtype: str) -> LossModule:
    """Our model and its loss, as a run has them."""
    setup = machine.resolve(forward_dtype=dtype)
    arch = arch_class("decoder").model_validate({"loss": {"loss_type": "softmax_cross_entropy"}})
    return LossModule(build_model(arch, Equations(), setup), arch.loss)


def batch_of(rows: Tensor, device: torch.device) -> Batch:
    labels = torch.full((BATCH, 5), IGNORE)
    labels[:, -1] = rows[:, 5]
    return Batch(rows[:, :5].int(), labels, torch.zeros(BATCH, dtype=torch.int32)).to(device)


def step_of(dtype: str, device: torch.device) -> Callable[[], object]:
    losses, batch = ours(dtype), batch_of(equations(), device)
    model = losses.model
    config = TrainConfig(data_path="", optimizer={"name": "adamw"}, weight_decay=1.0, beta2=0.98)  # type: ignore[arg-type]
    optimizer = config.optimizer.build(dict(model.named_parameters()), config, "auto")
    carry = model.initial_carry(batch)
    control = model.halting.control(Moment(0, 1, 1000, 1, BATCH, slice(0, BATCH), device))

    def step() -> None:
        loss, *_ = losses(carry, batch, control, None)
        (loss / BATCH).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def step_of_published(device: torch.device) -> Callable[[], object]:
    model, rows = Published().to(device), equations().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=1.0)

    def step() -> None:
        model(rows).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def step_of_stacked(num_models: int, device: torch.device) -> Callable[[], object]:
    """A step of several models, in float32, as one."""
    models = [ours("float32").model.inner for _ in range(num_models)]
    weights, buffers = stack_module_state(models)  # type: ignore[arg-type]
    weights = {name: value.detach() for name, value in weights.items()}
    base, rows = models[0], equations().to(device)
    inputs, labels = rows[:, :5], rows[:, 5]

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = base

        def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
            e_BSD = self.inner.embed(inputs, labels)
            z_H = self.inner.blocks(e_BSD, 1, None)
            return F.cross_entropy(self.inner.lm_head(z_H)[:, 0], labels)

    whole = Loss()

    def loss(weights: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        values = {f"inner.{name}": value for name, value in (weights | buffers).items()}
        found: Tensor = functional_call(whole, values, (inputs, labels))
        return found

    gradients_of = vmap(grad(loss))
    parameters = {name: nn.Parameter(value) for name, value in weights.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3, betas=(0.9, 0.98), weight_decay=1.0)

    def step() -> None:
        found = gradients_of({name: p.detach() for name, p in parameters.items()}, buffers)
        for name, p in parameters.items():
            p.grad = found[name]
        optimizer.step()

    return step


def measure(rounds: int, models: int) -> dict:
    device = machine.resolve().device
    calls = {
        "published, float32": step_of_published(device),
        "float32": step_of("float32", device),
        "bfloat16": step_of("bfloat16", device),
        f"{models} as one, float32": step_of_stacked(models, device),
    }
    ms = medians_ms(in_turns(calls, rounds))
    ms[f"{models} as one, float32"] /= models
    return {
        "benchmark": "grokking",
        "threads": torch.get_num_threads(),
        "ms": {name: round(value, 2) for name, value in ms.items()},
        "rounds": rounds,
    }


def tell(result: dict) -> str:
    ours = result["ms"]["float32"]
    return "\n".join(f"{name:24} {ms:8.2f} ms  {ms / ours:6.2f}" for name, ms in result["ms"].items())


def main() -> None:
    front.run(__doc__, measure, tell, {"rounds": 20, "models": 4, "threads": front.THREADS})


if __name__ == "__main__":
    main()
