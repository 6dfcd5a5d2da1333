"""How a trained model is used."""

from typing import Literal

from pydantic import Field

from hrm_ray.config.validate import Settings


class Inference(Settings):
    """How long a model thinks about a puzzle, and how often."""

    halt: Literal["max", "learned"] = "max"
    """When a puzzle ends: after halt_max_steps, or when its own Q head says so."""
    halt_max_steps: int | None = Field(default=None, gt=0, le=10**6)
    """ACT steps at most, also more than in training; null: as trained."""
    votes: int = Field(default=1, gt=0, le=10**6)
    """Relabelled copies of a puzzle whose answers vote."""


AS_TRAINED = Inference()
