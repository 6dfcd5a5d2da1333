"""Checks every byte and every rule of a dataset."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from hrm_ray.data.fetch import local_root
from hrm_ray.data.format import UNFINISHED, Manifest, SplitInfo, to_tokens
from hrm_ray.data.shards import damages, read_batch, read_manifest
from hrm_ray.data.tasks.base import Task, get_task
from hrm_ray.errors import UserError
from hrm_ray.manifest import MANIFEST


def verify(path: str | Path) -> list[str]:
    """Check every byte and every rule of a dataset. Returns the problems found, each naming its file; none is good.

    Raises:
        UserError: there is no dataset to check.
    """
    root = local_root(path)
    try:
        manifest = read_manifest(root)
        task = get_task(manifest.task, **manifest.task_options)
    except UserError as error:
        if not (root / MANIFEST).is_file():
            raise
        return [f"{MANIFEST}: {error}"]
    problems = []
    if (task.vocab_size, task.seq_len) != (manifest.vocab_size, manifest.seq_len):
        problems.append(f"{MANIFEST}: vocab_size or seq_len does not fit task {manifest.task}")
    known = {MANIFEST, UNFINISHED} | {entry.file for entry in manifest.files}
    there = {str(file.relative_to(root)) for file in root.rglob("*") if not file.is_dir()}
    problems += [f"{file}: not in the manifest" for file in sorted(there - known)]
    damaged = damages(root, manifest.files)
    if damaged:  # a file that is not what was written is not worth parsing, nor safe to
        return problems + damaged
    for name, info in manifest.splits.items():
        problems += _verify_split(root, name, info, manifest, task)
    return problems


def _verify_split(root: Path, name: str, info: SplitInfo, manifest: Manifest, task: Task) -> Iterator[str]:
    num_examples, last = 0, {"puzzle": -1, "group": -1}
    for shard in info.shards:
        try:
            batch = read_batch(root / shard.file, manifest.seq_len)
        except UserError as error:
            yield f"{shard.file}: {str(error).removeprefix(f'{root / shard.file} ')}"
            continue
        if batch.num_rows != shard.rows:
            yield f"{shard.file}: {batch.num_rows} rows, where the manifest says {shard.rows}"
        if any(column.null_count for column in batch.columns):
            yield f"{shard.file}: has empty values"
            continue
        num_examples += batch.num_rows
        for problem in _verify_batch(batch, manifest, task, last):
            yield f"{shard.file}: {problem}"
    if num_examples != info.num_examples:
        yield f"{name}: {num_examples} examples, where the manifest says {info.num_examples}"
    for kind, count in (("puzzle", info.num_puzzles), ("group", info.num_groups)):
        if last[kind] + 1 != count:
            yield f"{name}: {last[kind] + 1} {kind}s, where the manifest says {count}"


def _verify_batch(
    batch: pa.RecordBatch, manifest: Manifest, task: Task, last: dict[str, int]
) -> Iterator[str]:
    """The rules inside a shard. `last` carries the last puzzle and group from shard to shard."""
    inputs, labels = to_tokens(batch["inputs"]), to_tokens(batch["labels"])
    if not len(inputs):
        return
    for column, tokens in (("inputs", inputs), ("labels", labels)):
        if tokens.max() >= manifest.vocab_size:
            row = int(np.flatnonzero((tokens >= manifest.vocab_size).any(axis=1))[0])
            yield f"row {row}: {column} has token {tokens[row].max()}, outside the vocabulary of {manifest.vocab_size}"
    identifiers = batch["puzzle_identifier"].to_numpy()
    if identifiers.min() < 0 or identifiers.max() >= manifest.num_puzzle_identifiers:
        yield f"a puzzle identifier is outside 0..{manifest.num_puzzle_identifiers - 1}"
    steps = {}
    for kind in ("puzzle", "group"):
        values = batch[kind].to_numpy()
        steps[kind] = np.diff(values, prepend=last[kind])
        if ((steps[kind] < 0) | (steps[kind] > 1)).any():
            yield f"{kind} does not count up by ones"
        last[kind] = int(values[-1])
    if steps["group"][0] != 1:
        yield "does not begin with a new group"
    if (steps["group"] > steps["puzzle"]).any():
        yield "a puzzle lies in two groups"
    if ((np.diff(identifiers) != 0) & (steps["puzzle"][1:] == 0)).any():
        yield "a puzzle has two identifiers"
    if task.checkable and not (solved := task.is_solution(inputs, labels)).all():
        yield f"row {int(np.flatnonzero(~solved)[0])}: the answer does not solve its question"
