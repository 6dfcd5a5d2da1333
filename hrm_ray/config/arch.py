"""The keys that all architectures share, and how `arch.name` finds an architecture's class.

An architecture is a module of `hrm_ray.models` with two classes, its configuration and its model, and a YAML of the
same name under `config/arch/`. Its configuration derives from `ArchConfig` and gives `name` a default: that is what
`arch.name` looks for.
"""

import importlib
import math
import pkgutil
from functools import cache
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from hrm_ray.config.choice import chosen_by_name
from hrm_ray.config.validate import NonNegativeFloat, Settings, nearest
from hrm_ray.errors import UserError

ROOM = "hrm_ray.models"  # where the architectures are
DEFAULT_ARCH = "hrm_v1"
ROPE_THETA, RMS_NORM_EPS = 10_000.0, 1e-5  # as published


LossType = Literal["stablemax_cross_entropy", "softmax_cross_entropy"]


class LossConfig(Settings):
    """The loss over the cells of a puzzle."""

    loss_type: LossType = "stablemax_cross_entropy"
    """How the scores of a cell become probabilities, before their cross entropy."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target that is spread evenly over all tokens; 0: all of it is on the right one."""


class StateConfig(Settings):
    """How a state starts and moves: keys of the architectures that keep one from step to step.

    Source: EqR, arXiv:2605.21488; how far it is followed, see `hrm_ray.models.recursive`.
    """

    init_std: NonNegativeFloat = 0.0
    """Standard deviation of the random numbers that both states start from (EqR: 1); 0: the model's own start."""
    noise: NonNegativeFloat = 0.0
    """Standard deviation of the noise on a state after each of its updates, in training (EqR: 0.01)."""
    damping: float = Field(default=1.0, gt=0, le=1)
    """Share d of each update that is taken, z becoming (1 - d) z + d f(z), in training and in use (EqR: 0.95)."""

    @property
    def is_drawn(self) -> bool:
        """Whether anything of it is random in training."""
        return bool(self.init_std or self.noise)


class ArchConfig(Settings):
    """Keys that all architectures share."""

    classes: ClassVar[dict[str, type["ArchConfig"]]] = {}
    has_q_head: ClassVar[bool] = True  # whether it learns when to halt
    is_causal: ClassVar[bool] = False  # whether no token changes what comes of those before it
    skips_questions: ClassVar[bool] = False  # whether it computes no outputs of cells that never have a label

    name: str
    """The architecture; arch=NAME chooses it with its own settings."""
    hidden_size: int = Field(default=512, gt=0, le=2**24)
    """D, width of the model."""
    num_heads: int = Field(default=8, gt=0, le=2**16)
    """Heads of attention."""
    expansion: float = Field(default=4, gt=0, le=2**10)
    """SwiGLU's inner width is 2/3 of this times its outer width, rounded up to a multiple of 256."""
    pos_encodings: Literal["rope", "learned", "grid", "none"] = "rope"
    """How a token knows its position: rope turns queries and keys; learned adds a vector of its own; grid adds the sum
    of one for its row, one for its column and, where there are boxes, one for its box."""
    rope_theta: float = Field(default=ROPE_THETA, gt=0, le=1e12)
    """Base of the frequencies of rotary positions."""
    rms_norm_eps: float = Field(default=RMS_NORM_EPS, ge=0, le=1)
    """Added to the mean square in every norm."""
    puzzle_emb_ndim: int = Field(default_factory=lambda values: values.get("hidden_size", 0), ge=0, le=2**24)
    """Numbers in the embedding of a puzzle identifier; 0: no such embedding. Default: arch.hidden_size."""
    halt_max_steps: int = Field(default=16, gt=0, le=10**6)
    """ACT steps at most."""
    halt_exploration_prob: float = Field(default=0.1, ge=0, le=1)
    """Share of puzzles that must take a random number of ACT steps at least, in training."""
    no_ACT_continue: bool = False
    """Halt when q_halt > 0, and learn no q_continue."""
    loss: LossConfig = LossConfig()
    """The loss over the cells of a puzzle."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        name = cls.model_fields["name"].default
        if not isinstance(name, str) or name in ArchConfig.classes:
            raise TypeError(f"{cls.__name__} needs a default of its own for `name`, it has {name!r}")
        ArchConfig.classes[name] = cls

    @property
    def num_puzzle_tokens(self) -> int:
        """P, leading tokens that a puzzle's embedding takes."""
        return math.ceil(self.puzzle_emb_ndim / self.hidden_size)

    @property
    def state(self) -> StateConfig:
        """How its states start and move; the defaults, if it has no such keys."""
        return self if isinstance(self, StateConfig) else StateConfig()

    @property
    def is_drawn(self) -> bool:
        """Whether anything in it is random in training."""
        return self.state.is_drawn

    @property
    def full_depth(self) -> tuple[int, int] | None:
        """H_cycles and L_cycles, of an architecture that has both."""
        H, L = (getattr(self, key, None) for key in ("H_cycles", "L_cycles"))
        return None if H is None or L is None else (H, L)

    def num_tokens(self, seq_len: int) -> int:
        """S, tokens that the model sees for a puzzle of `seq_len` cells."""
        return self.num_puzzle_tokens + seq_len

    @model_validator(mode="after")
    def _heads_fit(self) -> "ArchConfig":
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"arch.hidden_size={self.hidden_size} is not a multiple of arch.num_heads={self.num_heads}"
            )
        if self.pos_encodings == "rope" and (self.hidden_size // self.num_heads) % 2:
            raise ValueError(
                f"heads of odd width {self.hidden_size // self.num_heads} cannot be rotated: change "
                "arch.hidden_size or arch.num_heads, or set arch.pos_encodings=learned"
            )
        return self


@cache
def architectures() -> dict[str, type[ArchConfig]]:
    """Configuration classes by name, of every module in `ROOM`."""
    # By name, as with plug-ins: the configuration does not depend on the models.
    for module in pkgutil.iter_modules(importlib.import_module(ROOM).__path__, f"{ROOM}."):
        try:
            importlib.import_module(module.name)
        except Exception as error:
            raise UserError(f"{module.name} cannot be imported: {error!r}") from error
    return ArchConfig.classes


def arch_class(name: str) -> type[ArchConfig]:
    """The configuration class of the architecture `name`. Raises UserError if there is none."""
    known = architectures()
    if not isinstance(name, str) or name not in known:
        raise UserError(f"arch.name={name} is unknown; {nearest(str(name), known)}")
    return known[name]


# The field of a configuration that holds any architecture.
Arch = Annotated[
    SerializeAsAny[ArchConfig], BeforeValidator(chosen_by_name("arch", arch_class, DEFAULT_ARCH))
]
