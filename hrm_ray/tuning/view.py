"""What a user sees of a sweep while it runs. This one shows nothing."""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hrm_ray.tuning.config import SweepConfig
    from hrm_ray.tuning.estimate import Estimate, Spent
    from hrm_ray.tuning.execute import Live, Slot
    from hrm_ray.tuning.outline import Outline
    from hrm_ray.tuning.study import SweepStudy


class View:
    """To be derived from."""

    def outline(self, config: "SweepConfig", outline: "Outline", slot: "Slot", found: "Estimate") -> None:
        """What will be done."""

    def live(self) -> AbstractContextManager[None]:
        """Around the time in which trials run."""
        return nullcontext()

    def show(self, study: "SweepStudy", live: "list[Live]", spent: "Spent") -> None:
        """How it goes; called every second."""

    def ended(self, study: "SweepStudy", number: int) -> None:
        """What became of a trial."""

    def say(self, text: str) -> None:
        """A line."""
