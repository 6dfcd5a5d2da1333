"""The hierarchical reasoning model: a fast (L) and a slow (H) module that refine a hidden state in turn.

One call is one ACT step: H_cycles x (L_cycles updates of z_L, then one of z_H), of which only the very last
update of each module carries a gradient (the paper's one-step gradient), so memory does not grow with depth.
The state that goes in and out is detached: it is the carry between steps.

Shapes: B batch, C puzzle cells, P puzzle tokens, S = P + C tokens, D width, V vocabulary.
Source: Wang et al. 2025, arXiv:2506.21734, section 2; public code sapientinc/HRM.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrm_ray.config.schema import HRMConfig
from hrm_ray.models.layers import (
    Linear,
    PuzzleEmbedding,
    ReasoningModule,
    TokenEmbedding,
    cast_weights,
    rope_tables,
    trunc_normal_,
)

Q_HEAD_BIAS = -5.0  # "do not halt yet" until the Q head has learned something


def num_puzzle_tokens(config: HRMConfig) -> int:
    """P, leading tokens that a puzzle's embedding takes."""
    return math.ceil(config.puzzle_emb_ndim / config.hidden_size)


def num_tokens(config: HRMConfig, seq_len: int) -> int:
    """S, tokens that the model sees for a puzzle of `seq_len` cells."""
    return num_puzzle_tokens(config) + seq_len


class State(NamedTuple):
    """Hidden states of the two modules, each [B, S, D] in the compute dtype, detached."""

    z_H: Tensor
    z_L: Tensor


class Prediction(NamedTuple):
    """What one ACT step says: logits [B, C, V] and Q values [B], all float32."""

    logits: Tensor
    q_halt: Tensor
    q_continue: Tensor


class HRM(nn.Module):
    """The recursion with its embeddings and heads.

    Args:
        config: the architecture.
        vocab_size: V, tokens of the task.
        seq_len: C, cells of a puzzle.
        num_puzzle_identifiers: rows of the puzzle embedding.
        dtype: of activations and products; float32 or bfloat16. Parameters stay float32.
        attention: a key of `layers.ATTENTION`.
    """

    def __init__(
        self,
        config: HRMConfig,
        *,
        vocab_size: int,
        seq_len: int,
        num_puzzle_identifiers: int,
        dtype: torch.dtype = torch.float32,
        attention: str = "sdpa",
    ):
        super().__init__()
        D = config.hidden_size
        self.config = config
        self.dtype = dtype
        self.seq_len = seq_len
        self.num_puzzle_tokens = num_puzzle_tokens(config)
        self.num_tokens = num_tokens(config, seq_len)

        self.embed_tokens = TokenEmbedding(vocab_size, D)
        self.lm_head = Linear(D, vocab_size)
        self.q_head = Linear(D, 2, bias=True)
        nn.init.zeros_(self.q_head.weight)
        assert self.q_head.bias is not None
        nn.init.constant_(self.q_head.bias, Q_HEAD_BIAS)
        if config.puzzle_emb_ndim:
            self.puzzle_emb = PuzzleEmbedding(num_puzzle_identifiers, config.puzzle_emb_ndim)
        if config.pos_encodings == "learned":
            self.embed_pos = TokenEmbedding(self.num_tokens, D)
        else:
            cos, sin = rope_tables(self.num_tokens, D // config.num_heads)
            self.register_buffer("rope_cos", cos, persistent=False)
            self.register_buffer("rope_sin", sin, persistent=False)

        self.H_level = ReasoningModule(config.H_layers, D, config.num_heads, config.expansion, attention)
        self.L_level = ReasoningModule(config.L_layers, D, config.num_heads, config.expansion, attention)
        self.H_init: Tensor
        self.L_init: Tensor
        self.register_buffer("H_init", trunc_normal_(torch.empty(D), std=1.0))
        self.register_buffer("L_init", trunc_normal_(torch.empty(D), std=1.0))

    def initial_state(self, batch_size: int) -> State:
        """A fresh state for `batch_size` slots."""
        shape = (batch_size, self.num_tokens, self.config.hidden_size)
        return State(self.H_init.to(self.dtype).expand(shape), self.L_init.to(self.dtype).expand(shape))

    def reset(self, state: State, fresh_B: Tensor) -> State:
        """`state` with the slots marked in `fresh_B` (bool [B]) started anew."""
        fresh = fresh_B[:, None, None]
        return State(
            torch.where(fresh, self.H_init.to(self.dtype), state.z_H),
            torch.where(fresh, self.L_init.to(self.dtype), state.z_L),
        )

    def embed(self, inputs_BC: Tensor, puzzle_identifiers_B: Tensor) -> Tensor:
        """Input embedding [B, S, D]: puzzle tokens, then cells; scaled by sqrt(D)."""
        D = self.config.hidden_size
        e_BSD = F.embedding(inputs_BC, self.embed_tokens.embedding_weight)
        if self.config.puzzle_emb_ndim:
            rows = self.puzzle_emb(puzzle_identifiers_B)
            rows = F.pad(rows, (0, self.num_puzzle_tokens * D - rows.shape[-1]))
            e_BSD = torch.cat((rows.view(-1, self.num_puzzle_tokens, D), e_BSD), dim=1)
        if self.config.pos_encodings == "learned":
            e_BSD = math.sqrt(0.5) * (e_BSD + self.embed_pos.embedding_weight)
        return (math.sqrt(D) * e_BSD).to(self.dtype)

    def forward(
        self, state: State, inputs_BC: Tensor, puzzle_identifiers_B: Tensor
    ) -> tuple[State, Prediction]:
        """One ACT step.

        Args:
            state: of the step before, or fresh.
            inputs_BC: tokens, int.
            puzzle_identifiers_B: int.

        Returns:
            the new state (detached) and the prediction, whose gradient reaches the last update of each module.
        """
        cast_weights(self, self.dtype)
        rope = None
        if self.config.pos_encodings == "rope":
            rope = (self.rope_cos, self.rope_sin)
        e_BSD = self.embed(inputs_BC, puzzle_identifiers_B)
        z_H, z_L = state
        H_cycles, L_cycles = self.config.H_cycles, self.config.L_cycles
        with torch.no_grad():
            for h in range(H_cycles):
                for _ in range(L_cycles if h < H_cycles - 1 else L_cycles - 1):
                    z_L = self.L_level(z_L, z_H + e_BSD, rope)
                if h < H_cycles - 1:
                    z_H = self.H_level(z_H, z_L, rope)
        z_L = self.L_level(z_L, z_H + e_BSD, rope)
        z_H = self.H_level(z_H, z_L, rope)

        q = F.linear(z_H[:, 0].to(self.q_head.weight.dtype), self.q_head.weight, self.q_head.bias)
        logits = self.lm_head(z_H[:, self.num_puzzle_tokens :]).to(q.dtype)
        return State(z_H.detach(), z_L.detach()), Prediction(logits, q[:, 0], q[:, 1])
