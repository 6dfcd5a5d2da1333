"""What the training loop tells and asks its surroundings."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class Progress:
    """What a progress bar shows; the metrics are of the last report."""

    step: int
    last_step: int
    phase: str  # "compile", "record", "train" or "eval"
    setup: str  # what of the machine the first worker uses
    metrics: dict[str, float]


@dataclass(frozen=True)
class Hooks:
    """What the loop tells and asks its surroundings; called on the first worker only, `stop` on every one.

    Attributes:
        progress: called after every step and every evaluated batch.
        report: called with every record once it is in metrics.jsonl; again with those that a resumed run repeats.
        saved: called when a checkpoint has become whole.
        stop: why to end after the step at hand; None to go on.
        save: whether to write a checkpoint after the step at hand.
        event: called with every entry of events.jsonl.
        owner: who runs it: the same for workers that replace lost ones. None: this process alone.
    """

    progress: Callable[[Progress], None] = lambda progress: None
    report: Callable[[dict[str, Any]], None] = lambda record: None
    saved: Callable[[], None] = lambda: None
    stop: Callable[[], str | None] = lambda: None
    save: Callable[[], bool] = lambda: False
    event: Callable[[dict[str, Any]], None] = lambda entry: None
    owner: str | None = None
