"""The history of a run: losses and accuracies over its steps, of training and validation; and its file.

`training_history.json` has the layout of the replications that are collected in Mabdel-03/9.520-The-Geometry-of-Grok:
one object of lists of one length, `epoch`, `train_loss`, `train_acc`, `test_loss`, `test_acc` and some norms, beside an
object `grokking_summary`. Accuracies are fractions everywhere here.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

FILE = "training_history.json"
SUMMARY = "grokking_summary"
# Columns of the file, and by which metrics our reports tell them, the first one that is there.
_COLUMNS = {
    "train_loss": ("eval_train/loss", "train/lm_loss"),
    "train_acc": ("eval_train/exact_accuracy", "train/exact_accuracy"),
    "test_loss": ("eval/loss",),
    "test_acc": ("eval/exact_accuracy",),
    "embedding_norm": ("norm/embedding",),
    "transformer_norm": ("norm/blocks",),
    "output_norm": ("norm/output",),
    "last_layer_norm": ("norm/output",),  # what papers on the last layer call it
}
CURVES = ("train_loss", "train_acc", "test_loss", "test_acc")


@dataclass(frozen=True)
class History:
    """Rows in the order of their steps.

    Attributes:
        clock: what `steps` counts: "step" for optimizer steps, "epoch" where nothing else is known.
        steps: float64 [n].
        epochs: float64 [n].
        columns: float64 [n] each, by the names of the file; all of `CURVES`, NaN where a value is not known.
    """

    steps: np.ndarray
    epochs: np.ndarray
    columns: Mapping[str, np.ndarray]
    clock: str = "step"

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def first(self, name: str, value: float) -> int | None:
        """The first row in which the column `name` is at least `value`; None: there is none."""
        found = np.flatnonzero(self[name] >= value)
        return int(found[0]) if len(found) else None

    @classmethod
    def of_reports(cls, reports: Iterable[Mapping[str, float]]) -> "History":
        """Of what a run has reported: a row for each evaluation.

        Where the training split is not evaluated, what training itself has reported last stands for it.
        """
        known: dict[str, float] = {}
        rows: dict[str, list[float]] = {name: [] for name in ("step", "epoch", *_COLUMNS)}
        for report in reports:
            known.update(report)
            if _COLUMNS["test_acc"][0] not in report:
                continue
            rows["step"].append(report["global_step"])
            rows["epoch"].append(report.get("epoch", math.nan))
            for name, metrics in _COLUMNS.items():
                rows[name].append(next((known[m] for m in metrics if m in known), math.nan))
        arrays = {name: np.array(values, float) for name, values in rows.items()}
        columns = {
            name: arrays[name] for name in _COLUMNS if name in CURVES or not np.isnan(arrays[name]).all()
        }
        return cls(arrays["step"], arrays["epoch"], columns)

    def render(self, summary: Mapping[str, Any]) -> bytes:
        """The bytes of the file; what is not known, or not finite, is null: JSON has no such numbers."""
        content: dict[str, Any] = {
            name: [value if math.isfinite(value) else None for value in values.tolist()]
            for name, values in {"epoch": self.epochs, **self.columns}.items()
        }
        content |= {"step": self.steps.astype(int).tolist(), SUMMARY: dict(summary)}
        return (json.dumps(content, indent=2) + "\n").encode()


@dataclass(frozen=True)
class Source:
    """What is known of a run beside its history; None: it is not known.

    Attributes:
        chance: accuracy of a guess.
        num_train, num_test: equations; 0: it has none.
        weight_decay: of the optimizer.
        noise: how many training answers were replaced.
        finished: whether it has ended as planned; no others are judged for good.
    """

    chance: float | None = None
    num_train: int | None = None
    num_test: int | None = None
    weight_decay: float | None = None
    noise: int = 0
    finished: bool = True

    @classmethod
    def of_summary(cls, summary: Mapping[str, Any]) -> "Source":
        """What our `grokking_summary` says."""
        known = {name: summary[name] for name in cls.__dataclass_fields__ if is_number(summary.get(name))}
        return cls(**known | {"finished": summary.get("finished") is not False})


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def as_column(values: Sequence[Any]) -> np.ndarray:
    """float64 [n], NaN for null. Raises ValueError: a value is no number."""
    if not all(value is None or is_number(value) for value in values):
        raise ValueError("not all are numbers")
    return np.array([math.nan if value is None else value for value in values], float)
