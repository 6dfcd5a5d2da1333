"""What an undisturbed run leaves, and how a disturbed one differs from it."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.faults.runs import is_finished, step_of

Key = tuple[int, str]  # a step, and "train" or "eval"
RECORDS = "metrics.jsonl"


@dataclass(frozen=True)
class Tolerance:
    """Largest absolute differences of losses in records, of weights, and of puzzle embeddings."""

    loss: float
    weight: float
    embedding: float


@dataclass(frozen=True)
class Reference:
    """What an undisturbed run wrote.

    Attributes:
        records: every record without its times.
        files: SHA-256 by name of file, for every checkpoint's step.
        tolerance: by how much what was computed may differ; None: by nothing.
    """

    records: dict[Key, dict[str, Any]]
    files: dict[int, dict[str, str]]
    tolerance: Tolerance | None = None

    @property
    def last_step(self) -> int:
        return max(self.files)

    @property
    def evaluated_steps(self) -> list[int]:
        return [step for step, kind in self.records if kind == "eval"]


def read_records(run: Path) -> list[tuple[Key, dict[str, Any]]]:
    """The whole lines of metrics.jsonl, without times."""
    lines = (run / RECORDS).read_text().rpartition("\n")[0].splitlines()
    return [(key_of(record), timeless(record)) for record in map(json.loads, lines)]


def key_of(record: dict[str, Any]) -> Key:
    return record["global_step"], "eval" if any(k.startswith("eval/") for k in record) else "train"


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if not key.startswith("time/")}


def checksums(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of the files, as the manifest says."""
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    return {name: info["sha256"] for name, info in files.items()}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def record_problems(run: Path, reference: Reference | None, *, whole: bool = False) -> list[str]:
    """What is amiss in the records of a run up to its last one, or in all if they should be `whole`.

    Without `reference`, a record missing among the others, or there twice; with it, what differs from it too.
    """
    records = read_records(run)
    keys = [key for key, _ in records]
    problems = [
        f"{times} {kind} records of step {step}" for (step, kind), times in Counter(keys).items() if times > 1
    ]
    if keys != sorted(keys, key=_order):
        problems.append("records out of order")
    last = max((step for step, _ in keys), default=0)
    expected: Iterable[Key] = ((step, "train") for step in range(1, last))
    if reference:
        problems += _value_problems(records, reference)
        end = reference.last_step if whole else last - 1
        expected = (key for key in reference.records if key[0] <= end)
    there = set(keys)
    return problems + [
        f"no {kind} record of step {step}" for step, kind in expected if (step, kind) not in there
    ]


def _value_problems(records: Sequence[tuple[Key, dict[str, Any]]], reference: Reference) -> list[str]:
    differences = {
        key: difference
        for key, values in records
        if (difference := _difference(values, reference.records.get(key, {}), reference.tolerance))
    }
    return [f"{kind} record of step {step} differs: {text}" for (step, kind), text in differences.items()]


def _order(key: Key) -> Key:
    step, kind = key
    return step, {"train": "a", "eval": "b"}[kind]


def _difference(ours: dict[str, Any], theirs: dict[str, Any], tolerance: Tolerance | None) -> str:
    """The first metrics that are not the same; empty if all are."""
    keys = [k for k in sorted({*ours, *theirs}) if not _is_same(k, ours.get(k), theirs.get(k), tolerance)]
    return ", ".join(f"{k} {ours.get(k)} for {theirs.get(k)}" for k in keys[:3])


def _is_same(metric: str, ours: Any, theirs: Any, tolerance: Tolerance | None) -> bool:
    if tolerance is None or ours is None or theirs is None:
        return ours == theirs
    if "accuracy" in metric:  # counts, of which an answer may flip at the least difference
        return True
    return abs(ours - theirs) <= tolerance.loss


def checkpoint_problems(folder: Path, reference: Reference | None) -> list[str]:
    """How a finished checkpoint is damaged, or not that of the reference at the same step."""
    try:
        return _folder_problems(folder, reference.files.get(step_of(folder)) if reference else None)
    except FileNotFoundError as error:
        return [f"{folder.name} has no {error.filename}"]


def _folder_problems(folder: Path, expected: dict[str, str] | None) -> list[str]:
    """`expected` is None where the reference has no checkpoint, as when a signal stopped the run."""
    said = checksums(folder)
    problems = [
        f"{folder.name}/{name} is not what its manifest says"
        for name, expected_sha256 in said.items()
        if sha256((folder / name).read_bytes()) != expected_sha256
    ]
    if expected is not None and said != expected:
        names = [n for n in sorted({*said, *expected}) if said.get(n) != expected.get(n)]
        problems.append(f"{folder.name} differs from the undisturbed run in {', '.join(names)}")
    return problems


def end_problems(run: Path, reference: Reference) -> list[str]:
    """Everything in which a finished run differs from the reference."""
    problems = record_problems(run, reference, whole=True)
    for folder in sorted((run / "checkpoints").glob("step-*")):
        if is_finished(folder):
            problems += checkpoint_problems(folder, reference)
    if not is_finished(run / "checkpoints" / f"step-{reference.last_step:08d}"):
        problems.append(f"no checkpoint at the last step, {reference.last_step}")
    summary = json.loads((run / "summary.json").read_text())
    if not summary["finished"] or summary["global_step"] != reference.last_step:
        problems.append(f"summary.json says finished={summary['finished']} at step {summary['global_step']}")
    return problems


def likeness_problems(checkpoint: Path, other: Path, tolerance: Tolerance) -> list[str]:
    """How two checkpoints of the same step differ that were written by other numbers of workers.

    The puzzles must be the same, and where each of them is; the weights alike.
    """
    ours, theirs = _tensors(checkpoint), _tensors(other)
    problems = []
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape:
            problems.append(f"{checkpoint.name}: {name} is there, or of that shape, in one only")
        elif (by := _difference_of(ours[name], theirs[name])) > _allowed(name, tolerance):
            problems.append(f"{checkpoint.name}: {name} differs by {by:.3g}")
    return problems


def _difference_of(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().max())


def _allowed(name: str, tolerance: Tolerance) -> float:
    if name in ("carry/inputs", "carry/labels", "carry/puzzle_identifiers", "carry/steps", "carry/halted"):
        return 0
    if name.endswith("puzzle_emb.weights"):
        return tolerance.embedding
    return tolerance.weight if name.startswith(("model/", "ema/")) else math.inf


def _tensors(checkpoint: Path) -> dict[str, Tensor]:
    """What two checkpoints have in common, by the name of the file and their own; carries in line over the workers."""
    tensors = {}
    for kind in ("model", "ema", "carry-*"):
        parts = [load_file(path) for path in sorted(checkpoint.glob(f"{kind}.safetensors"))]
        for name in parts[0] if parts else ():
            rows = [part[name] for part in parts]
            tensors[f"{kind.rstrip('-*')}/{name}"] = torch.cat(rows) if len(rows) > 1 else rows[0]
    tensors.pop("carry/sums")  # a row for each worker
    return tensors


def litter(run: Path) -> list[str]:
    """What a finished run should not have left: files set aside, checkpoints without a manifest."""
    aside = [str(p.relative_to(run)) for p in run.rglob("*.tmp")]
    return aside + [p.name for p in (run / "checkpoints").glob("step-*") if not is_finished(p)]
