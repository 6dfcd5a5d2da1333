"""A causal transformer as in "Grokking" (Power et al. 2022, arXiv:2201.02177; public code openai/grok).

It reads an equation from left to right in one pass, and has neither recursion nor a Q head. Where the task says that
all answers are in the last few cells, the last block computes these alone, and reads the others only as keys and
values: the results are the same, and much of the work is left out.

As published: sinusoidal positions, a norm after each residual sum, ReLU, no biases but those of the norms, torch's own
initialisation, and dropout of the feed-forward layer as an option. Other work on grokking takes norms before each
layer, none at all, or learned positions (Nanda et al. 2023, arXiv:2301.05217).

Shapes: B batch, S tokens, A of them with an answer (the last ones), D width, N heads.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from hrm_ray.config.arch import ArchConfig
from hrm_ray.models.layers import Linear, ReasoningModule, TokenEmbedding
from hrm_ray.models.noise import below, key_of
from hrm_ray.models.recursive import RecursiveModel, State
from hrm_ray.models.rotary import Rope


class DecoderConfig(ArchConfig):
    """Architecture `decoder`."""

    has_q_head = False
    is_causal = True
    skips_questions = True

    name: Literal["decoder"] = "decoder"
    """A causal transformer, without recursion."""
    hidden_size: int = Field(default=128, gt=0, le=2**24)
    """D, width of the model."""
    num_heads: int = Field(default=4, gt=0, le=2**16)
    """Heads of attention."""
    num_layers: int = Field(default=2, gt=0, le=10**4)
    """Layers."""
    expansion: float = Field(default=4, gt=0, le=2**10)
    """Inner width of the feed-forward layer, as a multiple of arch.hidden_size."""
    activation: Literal["relu", "gelu"] = "relu"
    """Of the feed-forward layer."""
    norm: Literal["post", "pre", "none"] = "post"
    """Where layers are normalised: after each residual sum, before each layer and at the end, or nowhere."""
    norm_eps: float = Field(default=1e-5, ge=0, le=1)
    """Added to the variance in every norm."""
    pos_encodings: Literal["sinusoidal", "learned"] = "sinusoidal"  # type: ignore[assignment]
    """How a token knows its position: sinusoidal adds fixed waves, learned a vector of its own."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the feed-forward layer's outputs that is set to 0 in training."""
    puzzle_emb_ndim: int = Field(default=0, ge=0, le=0)
    """Always 0: it has no embedding of puzzles."""
    halt_max_steps: int = Field(default=1, ge=1, le=1)
    """Always 1: it keeps nothing from step to step."""

    @property
    def is_drawn(self) -> bool:
        return self.dropout > 0

    @property
    def ffn_width(self) -> int:
        """Inner width of the feed-forward layer."""
        return round(self.expansion * self.hidden_size)

    @model_validator(mode="after")
    def _keys_have_an_effect(self) -> "DecoderConfig":
        for key in ("rope_theta", "rms_norm_eps", "halt_exploration_prob", "no_ACT_continue"):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"arch.{key} has no effect with arch=decoder; leave it out")
        return self


class LayerNorm(nn.LayerNorm):
    """torch's, in the type of what it gets."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(
            x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps
        )


def as_torch(layer: Linear) -> Linear:
    """`layer`, drawn as torch draws its own."""
    nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
    return layer


class CausalBlock(nn.Module):
    """Attention to the tokens before, and a feed-forward layer."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        D, F_ = config.hidden_size, config.ffn_width
        self.num_heads, self.is_pre = config.num_heads, config.norm == "pre"
        self.activate = F.relu if config.activation == "relu" else F.gelu
        self.q_proj, self.kv_proj = as_torch(Linear(D, D)), as_torch(Linear(D, 2 * D))
        self.o_proj = as_torch(Linear(D, D))
        self.up_proj, self.down_proj = as_torch(Linear(D, F_)), as_torch(Linear(F_, D))
        self.attn_norm, self.mlp_norm = norm_of(config), norm_of(config)

    def forward(self, x_BSD: Tensor, num_last: int, kept_BAD: Tensor | None) -> Tensor:
        """The block's outputs for the last `num_last` tokens; `kept_BAD` as of `Decoder.dropout`."""
        last = slice(x_BSD.shape[1] - num_last, None)
        if self.is_pre:
            x_BAD = x_BSD[:, last] + self.attend(self.attn_norm(x_BSD), last)
            return x_BAD + self.feed(self.mlp_norm(x_BAD), kept_BAD)
        x_BAD = self.attn_norm(x_BSD[:, last] + self.attend(x_BSD, last))
        return self.mlp_norm(x_BAD + self.feed(x_BAD, kept_BAD))

    def attend(self, x_BSD: Tensor, last: slice) -> Tensor:
        """Attention of the tokens in `last` to all up to themselves."""
        parts = self.q_proj(x_BSD[:, last]), *self.kv_proj(x_BSD).chunk(2, dim=-1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        scores_BNAS = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if q.shape[2] > 1:
            later = torch.ones(scores_BNAS.shape[-2:], dtype=torch.bool, device=q.device).triu(last.start + 1)
            scores_BNAS = scores_BNAS.masked_fill(later, -torch.inf)
        weights = scores_BNAS.softmax(dim=-1, dtype=torch.float32).to(v.dtype)
        return self.o_proj((weights @ v).transpose(1, 2).flatten(-2))

    def feed(self, x_BAD: Tensor, kept_BAD: Tensor | None) -> Tensor:
        """The feed-forward layer."""
        out_BAD = self.down_proj(self.activate(self.up_proj(x_BAD)))
        return out_BAD if kept_BAD is None else out_BAD * kept_BAD


class Sinusoids(nn.Module):
    """Fixed positions: sines and cosines of wave lengths from 2 pi to 10,000 times that, computed in float64."""

    def __init__(self, num_tokens: int, hidden_size: int):
        super().__init__()
        position_S1 = torch.arange(num_tokens, dtype=torch.float64)[:, None]
        even_D = torch.arange(hidden_size) // 2 * 2
        angles_SD = position_S1 / 10_000 ** (even_D.double() / hidden_size)
        table_SD = torch.where(torch.arange(hidden_size) % 2 == 0, angles_SD.sin(), angles_SD.cos())
        self.table_SD: Tensor
        self.register_buffer("table_SD", table_SD.float(), persistent=False)

    def forward(self) -> Tensor:
        """Of all tokens, [S, D]."""
        return self.table_SD


def norm_of(config: DecoderConfig) -> nn.Module:
    """A norm, where there are any."""
    return nn.Identity() if config.norm == "none" else LayerNorm(config.hidden_size, config.norm_eps)


class CausalStack(ReasoningModule):
    """Blocks one after the other; the last one computes only the outputs that are wanted."""

    def forward(self, x_BSD: Tensor, num_last: int, kept: list[Tensor] | None) -> Tensor:  # type: ignore[override]
        end = len(self.layers) - 1
        for i, block in enumerate(self.layers):
            x_BSD = block(x_BSD, num_last if i == end else x_BSD.shape[1], kept and kept[i])
        return x_BSD


class Decoder(RecursiveModel, config=DecoderConfig):
    """`num_layers` causal blocks, applied once. Of its state only z_H is used: what the head reads, [B, A, D]."""

    keeps_state = False
    gains_by_compiling_on_cpu = False  # 56 against 39 ms a step (Xeon with AMX, bfloat16, 512 equations)
    config: DecoderConfig

    def build(self, config: DecoderConfig) -> None:
        nn.init.normal_(self.embed_tokens.embedding_weight)
        as_torch(self.lm_head)
        if isinstance(self.embed_pos, TokenEmbedding):
            nn.init.normal_(self.embed_pos.embedding_weight)
        else:
            self.embed_pos = Sinusoids(self.num_tokens, config.hidden_size)
        self.blocks = CausalStack(CausalBlock(config) for _ in range(config.num_layers))
        self.end_norm = norm_of(config) if config.norm == "pre" else nn.Identity()
        self._kept: list[Tensor] | None = None  # of the pass that is being made, see `dropout`

    def initial_state(self, batch_size: int) -> State:
        shape = (batch_size, self.num_answers, self.config.hidden_size)
        zero = self.H_init.new_zeros((), dtype=self.dtype)
        return State(zero.expand(shape), zero.expand(batch_size, 1, 1))

    def embed(self, inputs_BC: Tensor, puzzle_identifiers_B: Tensor) -> Tensor:
        assert self.embed_pos is not None
        return (F.embedding(inputs_BC, self.embed_tokens.embedding_weight) + self.embed_pos()).to(self.dtype)

    def forward(self, state: State, e_BSD: Tensor, keys_B: Tensor | None = None) -> State:
        self._kept = self.dropout(keys_B, e_BSD) if keys_B is not None and self.config.dropout else None
        try:
            return super().forward(state, e_BSD)
        finally:
            self._kept = None

    def dropout(self, keys_B: Tensor, e_BSD: Tensor) -> list[Tensor]:
        """For each block, what its feed-forward layer's outputs are multiplied by: 0, or 1 / (1 - dropout)."""
        B, S, D = e_BSD.shape
        rate, kept = self.config.dropout, []
        for i in range(self.config.num_layers):
            num_last = self.num_answers if i == self.config.num_layers - 1 else S
            dropped = below(rate, key_of(keys_B, i), num_last * D).view(B, num_last, D)
            kept.append((~dropped).to(self.dtype) / (1 - rate))
        return kept

    def recur(self, z_H: Tensor, z_L: Tensor, e_BSD: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        return self.end_norm(self.blocks(e_BSD, self.num_answers, self._kept)), z_L
