"""A trial of several workers: Ray Train starts them in the placement group that Ray Tune has reserved for the trial.

So a trial never waits, half of its resources in hand, for the other half, and with its actor all of it ends: Tune
removes the group, and whatever runs in it.
"""

from collections.abc import Callable
from typing import Any

from hrm_ray.config.schema import TrainConfig
from hrm_ray.errors import OutOfMemory, RunFailed
from hrm_ray.storage.storage import Storage
from hrm_ray.training.driver import Driver
from hrm_ray.training.hooks import Progress
from hrm_ray.training.ray_train import train_on_ray
from hrm_ray.training.signals import StopRequest


class TrialDriver(Driver):
    """Passes on what the workers tell, and the wish to stop. For the arguments, see `train_in_reservation`."""

    wants_reports = True

    def __init__(
        self,
        config: TrainConfig,
        progress: Callable[[Progress], None],
        report: Callable[[dict[str, Any]], None],
        reason: Callable[[], str | None],
        owner: str | None = None,
        sweep: str = "",
    ):
        super().__init__(config, owner=owner)
        self.sweep = sweep
        self._progress, self._report = progress, report
        self.stop = Wish(reason)

    def progress(self, progress: Progress) -> None:
        self._progress(progress)

    def report(self, record: dict[str, Any]) -> None:
        self._report(record)


class Wish(StopRequest):
    """A wish to stop that is another's, since signals reach the main thread alone."""

    def __init__(self, reason: Callable[[], str | None]):
        super().__init__()
        self._reason = reason

    def reason(self) -> str | None:
        return self._reason()


def train_in_reservation(
    config: TrainConfig,
    run: Storage,
    progress: Callable[[Progress], None],
    report: Callable[[dict[str, Any]], None],
    reason: Callable[[], str | None],
    owner: str | None = None,
    sweep: str = "",
) -> dict[str, Any]:
    """Train `config` in the folder `run`, by workers in the placement group of this actor.

    Args:
        progress, report: called for what the first worker tells, see `Hooks`.
        reason: why to stop; None to go on. Asked several times a second.
        owner: see `Hooks`.
        sweep: of which it is a trial.

    Returns:
        the summary.

    Raises:
        UserError: as `launch.train` does.
    """
    from ray.util import get_current_placement_group

    group = get_current_placement_group()
    if group is None:
        raise RunFailed("a trial of several workers has no placement group; is this ray 2.60?")
    try:
        return train_on_ray(config, run, TrialDriver(config, progress, report, reason, owner, sweep), group)
    except RunFailed as error:
        if "running low on memory" in str(error.__cause__):  # Ray's monitor of memory has killed a worker
            raise OutOfMemory("its worker was killed since its node ran out of memory") from None
        raise
