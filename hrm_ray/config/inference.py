"""How a trained model is used."""

from typing import Literal

from pydantic import PositiveInt

from hrm_ray.config.validate import Settings


class Inference(Settings):
    """How long a model thinks about a puzzle, and how often."""

    halt: Literal["max", "learned"] = "max"  # learned: each puzzle ends when its own Q head says so
    halt_max_steps: PositiveInt | None = (
        None  # ACT steps at most, also more than in training; null: as trained
    )
    votes: PositiveInt = 1  # relabelled copies of a puzzle whose answers vote


AS_TRAINED = Inference()
