"""Whether a run has grokked, and if not, why that may be; a pure function of its history.

What is measured is the delay between two jumps: the step at which the accuracy of training passes 99 % (or 90 %, if
validation never gets further) and the one at which that of validation does.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from hrm_ray.grokking.history import History, Source

# "generalised": a delay cannot be told; "unknown": neither can whether it has generalised or memorised.
Outcome = Literal["grokked", "at once", "generalised", "memorised only", "did not learn", "unknown"]

LEVELS = (99, 90)  # percent; a run is judged by the first that its validation passes
DELAY = 1.5  # of validation behind training, as a ratio of steps, from which on it has a name
ROWS_BETWEEN = 3  # evaluations between the two jumps, below which the delay is one of measuring
RISING = 0.005  # gain of the last quarter of a run over the one before that is more than noise
LUCK = (0.02, 0.2)  # above chance, within which an accuracy may be luck at least, and at most
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
        outcome, text = _generalised(history, source, train.get(level), test[level], level)
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
    history: History, source: Source, train: int | None, test: int, level: int
) -> tuple[Outcome, str]:
    """Args: the rows of the jumps past `level`, where `train` may be missing."""
    clock, there, best = history.clock, _step(history, test), _best(history["test_acc"])
    passed = f"validation passed {level} % at {clock} {there:,}"
    so_far = "" if source.finished else " so far"
    more = "" if level == LEVELS[0] else f"; {LEVELS[0]} % was not reached{so_far} (best {_percent(best)})"
    if train is None:
        if _best(history["train_acc"]) is None:
            why = "the accuracy of training is not known, so neither is a delay"
        elif source.noise:
            why = f"training never{so_far}, as {_replaced(source)}, so there is no delay to be told"
        else:
            return "at once", f"generalised at once, no delay: {passed}, training never{so_far}{more}"
        return "generalised", f"generalised: {passed}; {why}{more}"
    before = _step(history, train)
    earliest = _step(history, train - 1) if train else 0  # training may have passed right behind it
    if 0 <= test - train < ROWS_BETWEEN and there >= DELAY * earliest:
        return "generalised", (
            f"generalised: {passed}, training at {clock} {before:,}; evaluated too rarely to tell a delay{more}"
        )
    if test <= train or there < DELAY * before:
        return "at once", f"generalised at once, no delay: {passed}, training at {clock} {before:,}{more}"
    return "grokked", (
        f"grokked at {clock} {there:,}: validation passed {level} % there, {there - before:,} {clock}s after training "
        f"({clock} {before:,}), when it was at {_percent(history['test_acc'][train])}{more}"
    )


def _not_generalised(
    history: History, source: Source, train: dict[int, int], best: float | None
) -> tuple[Outcome, str]:
    so_far = "" if source.finished else " so far"
    if source.num_test == 0:
        return "unknown", "this run has no validation equations, so whether it generalises is not known"
    if not len(history):
        return "unknown", f"nothing was evaluated{so_far}, so there is no verdict"
    last, clock = _step(history, -1), history.clock
    level = next((level for level in LEVELS if level in train), None)
    trained = _best(history["train_acc"])
    if trained is None:
        return "unknown", (
            f"did not generalise{so_far}: by {clock} {last:,} validation reached {_percent(best)}; the accuracy of "
            "training is not known, so neither is whether it has memorised"
        )
    if level is None:
        text = (
            f"did not learn{so_far}: by {clock} {last:,} training reached {_percent(trained)}, validation "
            f"{_percent(best)}"
        )
        return "did not learn", text + _because(source, _why_not_learned(history))
    if is_chance(best, source):
        stayed = f"stayed at chance level (best {_percent(best)}, chance {_percent(source.chance)})"
    else:
        chance = "" if source.chance is None else f", chance {_percent(source.chance)}"
        stayed = f"came to {_percent(best)} only{chance}"
    text = (
        f"memorised only{so_far}: training passed {level} % at {clock} {_step(history, train[level]):,}, validation "
        f"{stayed} up to {clock} {last:,}"
    )
    return "memorised only", text + _because(source, _why_not_generalised(history, source, last))


def is_chance(accuracy: float | None, source: Source) -> bool:
    """Whether the best of many evaluations may be luck: within four standard deviations of chance, within `LUCK`."""
    if accuracy is None or source.chance is None:
        return False
    chance, (least, most) = source.chance, LUCK
    spread = math.sqrt(chance * (1 - chance) / source.num_test) if source.num_test else 0.0
    return accuracy <= chance + min(max(4 * spread, least), most)


def _because(source: Source, reasons: list[str]) -> str:
    """Of a run that still goes on, anything else would be a guess."""
    if not source.finished:
        reasons = ["it is not finished"]
    return f". Why that may be: {'; '.join(reasons)}" if reasons else ""


def _replaced(source: Source) -> str:
    return f"{source.noise:,} answers of training were replaced"


def _why_not_learned(history: History) -> list[str]:
    if np.isfinite(history["train_acc"]).sum() < ROWS_BETWEEN:
        return ["it may be too short, and was evaluated too rarely to tell"]
    if _is_rising(history["train_acc"]):
        return ["it is too short: training still rises"]
    return ["the learning rate, its warm-up, weight decay or noise may not fit"]


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
        reasons.append(_replaced(source))
    if _is_rising(history["test_acc"]):
        reasons.append("it is too short: validation still rises")
    elif history.clock == "step" and last < PUBLISHED_STEPS:
        reasons.append(f"it may be too short, published runs go on to {PUBLISHED_STEPS:,} steps")
    if source.weight_decay == 0 and last < FIGURE_1_STEPS:
        reasons.append(
            f"without weight decay it takes up to {FIGURE_1_STEPS:,} steps (figure 1 of Power et al.), with "
            "weight_decay=1 some thousand"
        )
    return reasons


def _is_rising(values: np.ndarray) -> bool:
    """Whether the last quarter of the known rows is higher than the quarter before; of rows, which steps may space."""
    known = values[~np.isnan(values)]
    if len(known) < 2:
        return False
    quarter = max(1, len(known) // 4)
    return bool(known[-quarter:].mean() - known[-2 * quarter : -quarter].mean() > RISING)


def _percent(share: float | None) -> str:
    """Two digits of what is small, one of the rest."""
    if share is None or math.isnan(share):
        return "an unknown share"
    return f"{share * 100:.2f} %" if share < 0.1 else f"{share * 100:.1f} %"
