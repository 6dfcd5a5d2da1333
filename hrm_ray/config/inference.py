"""How a trained model is used."""

from typing import Literal

from pydantic import Field

from hrm_ray.config.validate import NonNegativeFloat, NonNegativeInt, Settings

MOST_PATHS = 10**6
Select = Literal["vote", "q", "residual", "first_halt", "valid"]


class Use(Settings):
    """How a model thinks about a puzzle, and which of its answers counts; all but along how many paths."""

    halt: Literal["max", "learned"] = "max"
    """When a puzzle ends: after halt_max_steps, or when its own Q head says so."""
    halt_threshold: float = Field(default=0.5, gt=0, lt=1)
    """Probability above which a Q head says so: of a right answer or, if it is trained to compare, of halting rather
    than going on."""
    halt_max_steps: int | None = Field(default=None, gt=0, le=10**6)
    """ACT steps at most, also more than in training; null: as trained."""
    votes: int = Field(default=1, gt=0, le=10**6)
    """Relabelled copies of a puzzle."""
    noise: NonNegativeFloat = 0.0
    """Standard deviation of the noise on the working state z_L before every ACT step."""
    init_std: NonNegativeFloat | None = None
    """Standard deviation of the numbers that a path starts from; 0: all start from the model's own; null: as trained
    (arch.init_std)."""
    select: Select = "vote"
    """The answer that counts: `vote`, the one that most stand behind; of one path alone, `q`: the one whose Q head is
    surest, `residual`: that came to rest, `first_halt`: that halts first, `valid`: whose answer passes a check."""
    seed: NonNegativeInt = 0
    """Of the noise."""

    @property
    def ends_early(self) -> bool:
        """Whether puzzles may end before their last ACT step."""
        return self.halt == "learned" or self.select in ("first_halt", "valid")


class Inference(Use):
    """How a model is used."""

    paths: int = Field(default=1, gt=0, le=MOST_PATHS)
    """Times that each copy is thought about, with noise of its own."""

    @property
    def num_tries(self) -> int:
        """Tries at a puzzle: its copies, each along all paths."""
        return self.votes * self.paths

    def puzzles_at_once(self, batch_size: int) -> int:
        """Puzzles whose tries are remembered together: enough to keep `batch_size` tries at work, and fewer where there
        are many tries at each, for the sake of memory."""
        return max(1, min(batch_size, 8 * batch_size // self.num_tries))


AS_TRAINED = Inference()
