"""Whether a run has grokked, and if not, why that may be; a pure function of its history.

What is measured is the delay between two jumps: the step at which the accuracy of training passes 99 % (or 90 %, if
validation never gets further) and the one at which that of validation does.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from hrm_ray.grokking.history import History, Source

Outcome = Literal["grokked", "at once", "memorised only", "did not learn"]

LEVELS = (99, 90)  # percent; a run is judged by the first that its validation passes
DELAY = 1.5  # of validation behind training, as a ratio of steps, from which on it has a name
ROWS_BETWEEN = 3  # evaluations between the two jumps, below which the delay is one of measuring
RISING = 0.01  # gain of validation over the last tenth of a run that is more than noise
FEW, TOO_FEW = 0.25, 0.05  # share of all equations in training; published runs take 0.25 to 0.5
PUBLISHED_STEPS, FIGURE_1_STEPS = 100_000, 1_000_000


@dataclass(frozen=True)
class Verdict:
    """What came of a run.

    Attributes:
        outcome: in one word or two.
        text: the same as a sentence, with the steps and, where it has not generalised, why that may be.
        steps: those at which an accuracy passed a level, by name (`test_99`); None: it never did.
        gap: steps from the jump of training to that of validation; None: one of them is missing.
        best_test_acc: the highest accuracy of validation.
    """

    outcome: Outcome
    text: str
    steps: dict[str, int | None]
    gap: int | None
    best_test_acc: float | None
    source: Source

    def summary(self) -> dict[str, Any]:
        """What `grokking_summary` holds."""
        return {
            "outcome": self.outcome,
            "verdict": self.text,
            **{f"{name}_step": step for name, step in self.steps.items()},
            "gap_steps": self.gap,
            "best_test_acc": self.best_test_acc,
            **asdict(self.source),
        }


def judge(history: History, source: Source) -> Verdict:
    """What came of a run with this history."""
    train, test = _jumps(history, "train_acc"), _jumps(history, "test_acc")
    best = _best(history["test_acc"])
    level = next((level for level in LEVELS if level in test), None)
    gap: int | None = None
    if level is None:
        outcome, text = _not_generalised(history, source, train, best)
    else:
        outcome, text = _generalised(history, train.get(level), test[level], level, best)
        if level in train:
            gap = _step(history, test[level]) - _step(history, train[level])
    steps = {
        f"{split}_{level}": _step(history, rows[level]) if level in rows else None
        for split, rows in (("train", train), ("test", test))
        for level in LEVELS
    }
    return Verdict(outcome, text, steps, gap, best, source)


def _jumps(history: History, name: str) -> dict[int, int]:
    """The first row of each of `LEVELS` that the accuracy `name` passes."""
    rows = {level: history.first(name, level / 100) for level in LEVELS}
    return {level: row for level, row in rows.items() if row is not None}


def _step(history: History, row: int) -> int:
    return int(history.steps[row])


def _best(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.max()) if len(known) else None


def _generalised(
    history: History, train: int | None, test: int, level: int, best: float | None
) -> tuple[Outcome, str]:
    """Args: the rows of the jumps past `level`, and the best accuracy of validation."""
    clock, there = history.clock, _step(history, test)
    more = "" if level == LEVELS[0] else f"; {LEVELS[0]} % was not reached (best {_percent(best)})"
    at_once = f"generalised at once, no delay: validation passed {level} % at {clock} {there:,}, training"
    if train is None:
        return "at once", f"{at_once} never{more}"
    before = _step(history, train)
    if test - train < ROWS_BETWEEN or there < DELAY * before:
        return "at once", f"{at_once} at {clock} {before:,}{more}"
    return "grokked", (
        f"grokked at {clock} {there:,}: validation passed {level} % there, {there - before:,} {clock}s after training "
        f"({clock} {before:,}), when it was at {_percent(history['test_acc'][train])}{more}"
    )


def _not_generalised(
    history: History, source: Source, train: dict[int, int], best: float | None
) -> tuple[Outcome, str]:
    if not len(history):
        return "did not learn", "nothing was evaluated, so there is no verdict"
    last, clock = _step(history, -1), history.clock
    level = next((level for level in LEVELS if level in train), None)
    if level is None:
        trained = _best(history["train_acc"])
        text = f"did not learn: by {clock} {last:,} training reached {_percent(trained)}, validation {_percent(best)}"
        return "did not learn", text + _because(_why_not_learned(history))
    if is_chance(best, source):
        stayed = f"stayed at chance level (best {_percent(best)}, chance {_percent(source.chance)})"
    else:
        chance = "" if source.chance is None else f", chance {_percent(source.chance)}"
        stayed = f"came to {_percent(best)} only{chance}"
    text = (
        f"memorised only: training passed {level} % at {clock} {_step(history, train[level]):,}, validation {stayed} "
        f"up to {clock} {last:,}"
    )
    return "memorised only", text + _because(_why_not_generalised(history, source, last))


def is_chance(accuracy: float | None, source: Source) -> bool:
    """Whether the best of many evaluations may be luck: four standard deviations, and at least twice of chance."""
    if accuracy is None or source.chance is None:
        return False
    chance = source.chance
    spread = math.sqrt(chance * (1 - chance) / source.num_test) if source.num_test else 0.0
    return accuracy <= max(2 * chance, chance + 4 * spread)


def _because(reasons: list[str]) -> str:
    return f". Why that may be: {'; '.join(reasons)}" if reasons else ""


def _why_not_learned(history: History) -> list[str]:
    if _is_rising(history, "train_acc"):
        return ["it is too short: training still rises"]
    if len(history) < ROWS_BETWEEN:
        return ["it may be too short, and was evaluated too rarely to tell"]
    return ["the learning rate or its warm-up does not fit"]


def _why_not_generalised(history: History, source: Source, last: int) -> list[str]:
    reasons = []
    if source.num_train and source.num_test:
        total = source.num_train + source.num_test
        share = source.num_train / total
        counts = f"{source.num_train:,} of {total:,} equations ({_percent(share)})"
        if share < TOO_FEW:
            percent = (
                "; openai/grok takes train_data_pct in percent, where 0.5 is half a percent"
                if share < 0.01
                else ""
            )
            return [f"{counts} are too few to find the rule, published runs take 25 to 50 %{percent}"]
        if share < FEW:
            reasons.append(f"{counts} may be too few, published runs take 25 to 50 %")
    if source.noise:
        reasons.append(f"{source.noise:,} answers of training are wrong on purpose")
    if _is_rising(history, "test_acc"):
        reasons.append("it is too short: validation still rises")
    elif history.clock == "step" and last < PUBLISHED_STEPS:
        reasons.append(f"it may be too short, published runs go on to {PUBLISHED_STEPS:,} steps")
    if source.weight_decay == 0 and last < FIGURE_1_STEPS:
        reasons.append(
            f"without weight decay it takes up to {FIGURE_1_STEPS:,} steps (figure 1 of Power et al.), with "
            "weight_decay=1 some thousand"
        )
    return reasons


def _is_rising(history: History, name: str) -> bool:
    """Whether a column is higher over the last tenth of the steps than over the tenth before."""
    last = history.steps[-1]
    means = []
    for begin, end in ((0.8, 0.9), (0.9, 1.0)):
        part = history[name][(history.steps > begin * last) & (history.steps <= end * last)]
        part = part[~np.isnan(part)]
        if not len(part):
            return False
        means.append(part.mean())
    return bool(means[1] - means[0] > RISING)


def _percent(share: float | None) -> str:
    """Two digits of what is small, one of the rest."""
    if share is None or math.isnan(share):
        return "an unknown share"
    return f"{share * 100:.2f} %" if share < 0.1 else f"{share * 100:.1f} %"
