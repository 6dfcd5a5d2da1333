"""What the architectures share: embeddings, heads, and the state that goes from one ACT step to the next.

One call is one ACT step. An architecture says in `recur` how the two hidden states are refined; the state that goes
out is detached: it is the carry between steps.

From EqR (arXiv:2605.21488; public code locuslab/EqR) are random starts, noise and damping (`StateConfig`). Where this
departs from it: starts are from a normal distribution, not from one cut off at two deviations; in use there is no noise
unless it is asked for, where EqR keeps it. Everything is drawn by key, so that neither workers nor a restart change it.

Shapes: B batch, C puzzle cells, P puzzle tokens, S = P + C tokens, D width, V vocabulary.
Source: Wang et al. 2025, arXiv:2506.21734, section 2; public code sapientinc/HRM.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import count
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrm_ray.config.arch import ArchConfig
from hrm_ray.models.layers import (
    Block,
    GridEmbedding,
    Linear,
    PuzzleEmbedding,
    ReasoningModule,
    TokenEmbedding,
    trunc_normal_,
)
from hrm_ray.models.noise import key_of, noise_of
from hrm_ray.models.rotary import Rope, rope_tables

_START, _FIRST_UPDATE = 0, 1  # what is drawn under a slot's key; the other updates follow
Q_HEAD_BIAS = -5.0  # "do not halt yet" until the Q head has learned something


class State(NamedTuple):
    """Hidden states of the two modules, each [B, S, D] in the compute dtype."""

    z_H: Tensor
    z_L: Tensor


class Prediction(NamedTuple):
    """What one ACT step says: logits [B, C, V] and Q values [B], all float32.

    There may be logits for the last cells only, where no other has a label. Without a Q head q_halt is the `certainty`
    of the answer in use, and 0 in training.
    """

    logits: Tensor
    q_halt: Tensor
    q_continue: Tensor


class RecursiveModel(nn.Module, ABC):
    """Embeddings and heads around a recursion; the base of every architecture.

    A subclass names its configuration in its head, `class TRM(RecursiveModel, config=TRMConfig)`, makes its modules in
    `build`, and defines `recur`.

    Args:
        config: the architecture.
        vocab_size: V, tokens of the task.
        seq_len: C, cells of a puzzle.
        num_puzzle_identifiers: rows of the puzzle embedding.
        coordinates: where the cells lie, integers [C, n]; needed for positions in a grid only.
        answer_cells: A, all labels are in the last A cells; None: they may be anywhere.
        dtype: of activations and products; float32 or bfloat16. Parameters stay float32.
        attention: one of `attention.KERNELS`, which can run on the model's device.
    """

    classes: ClassVar[dict[type[ArchConfig], type["RecursiveModel"]]] = {}
    gains_by_compiling_on_cpu: ClassVar[bool] = True
    keeps_state: ClassVar[bool] = True  # whether what a step computes depends on the state of the one before

    def __init_subclass__(cls, *, config: type[ArchConfig], **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        RecursiveModel.classes[config] = cls

    def __init__(
        self,
        config: ArchConfig,
        *,
        vocab_size: int,
        seq_len: int,
        num_puzzle_identifiers: int,
        coordinates: np.ndarray | None = None,
        answer_cells: int | None = None,
        dtype: torch.dtype = torch.float32,
        attention: str = "sdpa",
    ):
        super().__init__()
        D = config.hidden_size
        self.config = config
        self.dtype = dtype
        self.seq_len = seq_len
        self.num_answers = answer_cells or seq_len
        self.attention = attention
        self.motion = config.state
        self._noise: Iterator[Tensor] | None = None  # of the updates of the step that is being taken
        self.num_puzzle_tokens = config.num_puzzle_tokens
        self.num_tokens = config.num_tokens(seq_len)

        self.embed_tokens = TokenEmbedding(vocab_size, D)
        self.lm_head = Linear(D, vocab_size)
        self.q_head: Linear | None = Linear(D, 2, bias=True) if config.has_q_head else None
        if self.q_head is not None:
            nn.init.zeros_(self.q_head.weight)
            assert self.q_head.bias is not None
            nn.init.constant_(self.q_head.bias, Q_HEAD_BIAS)
        if config.puzzle_emb_ndim:
            self.puzzle_emb = PuzzleEmbedding(num_puzzle_identifiers, config.puzzle_emb_ndim)
        self.embed_pos: nn.Module | None = None
        if config.pos_encodings == "learned":
            self.embed_pos = TokenEmbedding(self.num_tokens, D)
        elif config.pos_encodings == "grid":
            assert coordinates is not None
            self.embed_pos = GridEmbedding(coordinates, self.num_puzzle_tokens, D)
        elif config.pos_encodings == "rope":
            self.rope_cos: Tensor
            self.rope_sin: Tensor
            cos, sin = rope_tables(self.num_tokens, D // config.num_heads, config.rope_theta)
            self.register_buffer("rope_cos", cos, persistent=False)
            self.register_buffer("rope_sin", sin, persistent=False)
        self.use_depth(None)
        self.build(config)
        self.H_init: Tensor
        self.L_init: Tensor
        self.register_buffer("H_init", trunc_normal_(torch.empty(D), std=1.0))
        self.register_buffer("L_init", trunc_normal_(torch.empty(D), std=1.0))

    def stack(self, num_layers: int) -> ReasoningModule:
        """A module of `num_layers` transformer blocks of this model's width."""
        c = self.config
        return ReasoningModule(
            Block(c.hidden_size, c.num_heads, c.expansion, c.rms_norm_eps, self.attention)
            for _ in range(num_layers)
        )

    @abstractmethod
    def build(self, config: Any) -> None:
        """Make the modules of the recursion; `config` is of the class named in the head.

        Called in the middle of `__init__`, since the order in which weights are drawn belongs to what a seed means.
        """

    @abstractmethod
    def recur(self, z_H: Tensor, z_L: Tensor, e_BSD: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Refine both states for one ACT step.

        Where gradients are to stop is decided here; they reach `e_BSD` and the weights. An architecture with the keys
        of `StateConfig` makes each update by `refine`.

        Args:
            z_H, z_L: the answer's and the working state, [B, S, D] in the compute dtype.
            e_BSD: the embedded puzzle.
            rope: to be passed on to the modules.

        Returns:
            the new z_H, which the heads read, and z_L.
        """

    def use_depth(self, depth: tuple[int, int] | None) -> None:
        """Set `self.H_cycles` and `self.L_cycles`, by which `recur` goes; None: to those of the configuration.

        An architecture without such keys has none.
        """
        cycles = depth or self.config.full_depth
        if cycles is not None:
            self.H_cycles, self.L_cycles = cycles

    def initial_state(self, batch_size: int) -> State:
        """A fresh state for `batch_size` slots."""
        shape = (batch_size, self.num_tokens, self.config.hidden_size)
        return State(self.H_init.to(self.dtype).expand(shape), self.L_init.to(self.dtype).expand(shape))

    def random_state(self, keys_B: Tensor, std: float) -> State:
        """A state of Gaussian numbers of this standard deviation for each key, int64 [B]."""
        shape = (2, self.num_tokens, self.config.hidden_size)
        drawn = noise_of(std, self.dtype, keys_B.device).draw(key_of(keys_B, _START), math.prod(shape))
        return State(*drawn.view(-1, *shape).unbind(1))

    def reset(self, state: State, fresh_B: Tensor, keys_B: Tensor | None = None) -> State:
        """`state` with the slots marked in `fresh_B` (bool [B]) at their start, which is random if there are keys."""
        if keys_B is not None and self.motion.init_std:
            start = self.random_state(keys_B, self.motion.init_std)
        else:
            start = self.initial_state(len(fresh_B))
        fresh = fresh_B[:, None, None]
        return State(torch.where(fresh, start.z_H, state.z_H), torch.where(fresh, start.z_L, state.z_L))

    def embed(self, inputs_BC: Tensor, puzzle_identifiers_B: Tensor) -> Tensor:
        """Input embedding [B, S, D] of integer tokens: puzzle tokens, then cells; scaled by sqrt(D)."""
        D = self.config.hidden_size
        e_BSD = F.embedding(inputs_BC, self.embed_tokens.embedding_weight)
        if self.config.puzzle_emb_ndim:
            rows = self.puzzle_emb(puzzle_identifiers_B)
            rows = F.pad(rows, (0, self.num_puzzle_tokens * D - rows.shape[-1]))
            e_BSD = torch.cat((rows.view(-1, self.num_puzzle_tokens, D), e_BSD), dim=1)
        if self.config.pos_encodings in ("learned", "grid"):
            assert self.embed_pos is not None
            e_BSD = math.sqrt(0.5) * (e_BSD + self.embed_pos())
        return (math.sqrt(D) * e_BSD).to(self.dtype)

    def refine(
        self, module: ReasoningModule, z_BSD: Tensor, injection_BSD: Tensor | float, rope: Rope
    ) -> Tensor:
        """One update of a state by `module`, damped, and noisy if the step has keys; see `StateConfig`."""
        new_BSD: Tensor = module(z_BSD, injection_BSD, rope)
        if self.motion.damping < 1:
            new_BSD = torch.lerp(z_BSD, new_BSD, self.motion.damping)
        return new_BSD if self._noise is None else new_BSD + next(self._noise).view_as(new_BSD)

    def forward(self, state: State, e_BSD: Tensor, keys_B: Tensor | None = None) -> State:
        """One ACT step from `state` on the embedded puzzle, with the weights of the last `cast_weights`.

        Args:
            keys_B: of the noise of each slot, int64; None: there is none.

        Returns:
            the new state; its z_H, which the heads read, carries the gradient.
        """
        rope = (self.rope_cos, self.rope_sin) if self.config.pos_encodings == "rope" else None
        if keys_B is not None and self.motion.noise:
            noise = noise_of(self.motion.noise, self.dtype, keys_B.device)
            size = state.z_H[0].numel()
            self._noise = (noise.draw(key_of(keys_B, update), size) for update in count(_FIRST_UPDATE))
        try:
            return State(*self.recur(state.z_H, state.z_L, e_BSD, rope))
        finally:
            self._noise = None

    def predict(self, z_H: Tensor) -> Prediction:
        """What the heads read from the state of the answer."""
        q_halt, q_continue = self.q_values(z_H)
        logits = self.lm_head(z_H[:, self.num_puzzle_tokens :]).to(q_halt.dtype)
        if self.q_head is None and not self.training:
            q_halt = certainty(logits)
        return Prediction(logits, q_halt, q_continue)

    def q_values(self, z_H: Tensor) -> tuple[Tensor, Tensor]:
        """q_halt and q_continue [B], read from the first token in the precision of the weights; 0 without a Q head."""
        if self.q_head is None:
            unknown_B = z_H.new_zeros(len(z_H), dtype=torch.float32)
            return unknown_B, unknown_B
        q_B2 = F.linear(z_H[:, 0].to(self.q_head.weight.dtype), self.q_head.weight, self.q_head.bias)
        return q_B2[:, 0], q_B2[:, 1]


@torch.no_grad()
def certainty(logits_BCV: Tensor) -> Tensor:
    """How sure a model is of its whole answer: the logit of the product of its cells' probabilities, float32 [B]."""
    log_p = logits_BCV.log_softmax(-1).amax(-1).sum(-1).clamp(-30, -1e-6)
    return log_p - torch.log(-torch.expm1(log_p))
