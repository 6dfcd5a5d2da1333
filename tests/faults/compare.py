"""What an undisturbed run leaves, and how a disturbed one differs from it."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.runs import is_finished, step_of

Key = tuple[int, str]  # a step, and "train" or "eval"
RECORDS = "metrics.jsonl"


@dataclass(frozen=True)
class Reference:
    """What an undisturbed run wrote.

    Attributes:
        records: every record without its times.
        files: SHA-256 by name of file, for every checkpoint's step.
    """

    records: dict[Key, dict[str, Any]]
    files: dict[int, dict[str, str]]

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


def record_problems(run: Path, reference: Reference, *, whole: bool) -> list[str]:
    """How the records of a run differ from the reference's, up to its last one unless it should be `whole`."""
    records = read_records(run)
    problems = [
        f"{times} {kind} records of step {step}"
        for (step, kind), times in Counter(key for key, _ in records).items()
        if times > 1
    ]
    if [key for key, _ in records] != sorted((key for key, _ in records), key=_order):
        problems.append("records out of order")
    problems += [
        f"{kind} record of step {step} differs: {_difference(values, reference.records.get((step, kind), {}))}"
        for (step, kind), values in records
        if reference.records.get((step, kind)) != values
    ]
    end = reference.last_step if whole else max((step for (step, _), _ in records), default=0) - 1
    there = {key for key, _ in records}
    problems += [
        f"no {kind} record of step {step}"
        for step, kind in reference.records
        if step <= end and (step, kind) not in there
    ]
    return problems


def _order(key: Key) -> Key:
    step, kind = key
    return step, {"train": "a", "eval": "b"}[kind]


def _difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    keys = [k for k in sorted({*ours, *theirs}) if ours.get(k) != theirs.get(k)]
    return ", ".join(f"{k} {ours.get(k)} for {theirs.get(k)}" for k in keys[:3])


def checkpoint_problems(folder: Path, reference: Reference) -> list[str]:
    """How a finished checkpoint is damaged, or not that of the reference at the same step."""
    try:
        return _folder_problems(folder, reference.files.get(step_of(folder)))
    except FileNotFoundError as error:
        return [f"{folder.name} has no {error.filename}"]


def _folder_problems(folder: Path, expected: dict[str, str] | None) -> list[str]:
    """`expected` is None where a signal stopped the run and the reference has no checkpoint."""
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


def litter(run: Path) -> list[str]:
    """What a finished run should not have left: files set aside, checkpoints without a manifest."""
    aside = [str(p.relative_to(run)) for p in run.rglob("*.tmp")]
    return aside + [p.name for p in (run / "checkpoints").glob("step-*") if not is_finished(p)]
