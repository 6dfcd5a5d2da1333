"""How a slot comes to halt in training, and what of it is annealed. Durations are ratios of the run's steps."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from hrm_ray.config.validate import Settings

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
    dqn_warmup_ratio: float = Field(default=0.1, ge=0, le=1)  # share of the run before Q values decide

    # the price of one more ACT step, in units of a solved puzzle
    expansion_penalty: NonNegativeFloat = 0.1
    expansion_penalty_end: NonNegativeFloat = 0.001
    expansion_anneal_ratio: float = Field(default=0.5, ge=0, le=1)  # cosine
    # of the choice between halting and going on: high is random, low is greedy
    q_temperature: PositiveFloat = 1.0
    q_temperature_end: PositiveFloat = 0.1
    q_temperature_anneal_ratio: float = Field(default=1.0, ge=0, le=1)  # exponential
    # share of choices made by a coin
    epsilon: float = Field(default=0.2, ge=0, le=1)
    epsilon_end: float = Field(default=0.01, ge=0, le=1)
    epsilon_anneal_ratio: float = Field(default=0.5, ge=0, le=1)  # linear

    target_rate: float = Field(
        default=0.05, gt=0, le=1
    )  # share of the Q head that its target takes on a step
    replay_max_age: int = Field(default=32, ge=3)  # ACT steps that the memory goes back
    replay_half_life: PositiveFloat = 8  # and after which it is drawn half as often
    replay_samples: PositiveInt = 4  # memories drawn a slot and ACT step

    # old names, in steps; if given, they hold, not the ratios
    expansion_anneal_steps: PositiveInt | None = None
    q_temperature_anneal_steps: PositiveInt | None = None
    epsilon_anneal_steps: PositiveInt | None = None
    dqn_warmup_steps: PositiveInt | None = None

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
