"""How a slot comes to halt in training, and what of it is annealed. Durations are ratios of the run's steps."""

from typing import Literal

from pydantic import Field, model_validator

from hrm_ray.config.validate import NonNegativeFloat, PositiveFloat, PositiveInt, Settings

# Numbers of steps under the names of older code, and the ratios that they are converted to.
OLD_STEP_COUNTS = {
    "expansion_anneal_steps": "expansion_anneal_ratio",
    "q_temperature_anneal_steps": "q_temperature_anneal_ratio",
    "epsilon_anneal_steps": "epsilon_anneal_ratio",
    "dqn_warmup_steps": "dqn_warmup_ratio",
}


class HaltingConfig(Settings):
    """`act` as published, `q_learning`, or `fixed`; all keys but `name` are of q_learning."""

    name: Literal["act", "q_learning", "fixed"] = "act"
    """The way of halting; halting=NAME chooses it."""
    dqn_warmup_ratio: float = Field(default=0.1, ge=0, le=1)
    """Share of the run before Q values decide."""

    expansion_penalty: NonNegativeFloat = 0.1
    """Price of one more ACT step, in units of a solved puzzle, at the start."""
    expansion_penalty_end: NonNegativeFloat = 0.001
    """The same at the end of its annealing."""
    expansion_anneal_ratio: float = Field(default=0.5, ge=0, le=1)
    """Share of the run over which the price falls, as a cosine."""
    q_temperature: PositiveFloat = 1.0
    """Of the choice between halting and going on: high is random, low is greedy; at the start."""
    q_temperature_end: PositiveFloat = 0.1
    """The same at the end of its annealing."""
    q_temperature_anneal_ratio: float = Field(default=1.0, ge=0, le=1)
    """Share of the run over which the temperature falls, exponentially."""
    epsilon: float = Field(default=0.2, ge=0, le=1)
    """Share of choices made by a coin, at the start."""
    epsilon_end: float = Field(default=0.01, ge=0, le=1)
    """The same at the end of its annealing."""
    epsilon_anneal_ratio: float = Field(default=0.5, ge=0, le=1)
    """Share of the run over which epsilon falls, linearly."""

    target_rate: float = Field(default=0.05, gt=0, le=1)
    """Share of the Q head that its slow copy, the target, takes on at a step."""
    replay_max_age: int = Field(default=32, ge=3, le=10**6)
    """ACT steps that the replay memory goes back."""
    replay_half_life: PositiveFloat = 8
    """ACT steps after which a memory is drawn half as often."""
    replay_samples: int = Field(default=4, gt=0, le=10**6)
    """Memories drawn a puzzle and ACT step."""

    expansion_anneal_steps: PositiveInt | None = None
    """Older name of expansion_anneal_ratio, in optimizer steps; if given, it holds."""
    q_temperature_anneal_steps: PositiveInt | None = None
    """Older name of q_temperature_anneal_ratio, in optimizer steps; if given, it holds."""
    epsilon_anneal_steps: PositiveInt | None = None
    """Older name of epsilon_anneal_ratio, in optimizer steps; if given, it holds."""
    dqn_warmup_steps: PositiveInt | None = None
    """Older name of dqn_warmup_ratio, in optimizer steps; if given, it holds."""

    @model_validator(mode="after")
    def _falls(self) -> "HaltingConfig":
        for key in ("expansion_penalty", "q_temperature", "epsilon"):
            start, end = getattr(self, key), getattr(self, f"{key}_end")
            if end > start:
                raise ValueError(
                    f"halting.{key}={start:g} is annealed down to halting.{key}_end={end:g}, which is higher; "
                    f"lower {key}_end or raise {key}"
                )
        return self


AS_PUBLISHED = HaltingConfig()
