"""Checks every byte and every rule of a dataset."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa

from hrm_ray.data.fetch import local_root
from hrm_ray.data.format import UNFINISHED, Manifest, SplitInfo, to_tokens
from hrm_ray.data.shards import damages, read_batch, read_manifest, wrong_size
from hrm_ray.data.tasks.base import Task, get_task
from hrm_ray.errors import UserError
from hrm_ray.manifest import MANIFEST


def verify(path: str | Path, *, of_tokens: bool = True) -> list[str]:
    """Check every byte and every rule of a dataset. Returns the problems found, each naming its file; none is good.

    Args:
        of_tokens: whether shards are read whole; not if their bytes are known to be right, and their tokens checked.

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
    read = manifest.files if of_tokens else manifest.extra_files
    damaged = damages(root, read) or [line for entry in manifest.files if (line := wrong_size(root, entry))]
    if damaged:  # a file that is not what was written is not worth parsing, nor safe to
        return problems + damaged
    for name, info in manifest.splits.items():
        problems += _verify_split(root, name, info, manifest, task if of_tokens else None)
    return problems


def wrong_tokens(task: Task, inputs: np.ndarray, labels: np.ndarray, first_row: int = 0) -> Iterator[str]:
    """What is wrong with the tokens of rows, uint8 [n, seq_len] twice; the first has the number `first_row`."""
    for column, tokens in (("inputs", inputs), ("labels", labels)):
        if tokens.size and tokens.max() >= task.vocab_size:
            row = int(np.flatnonzero((tokens >= task.vocab_size).any(axis=1))[0])
            most = f"token {tokens[row].max()}, outside the vocabulary of {task.vocab_size}"
            yield f"row {first_row + row}: {column} has {most}"
    if task.checkable and not (fits := task.labels_fit(inputs, labels)).all():
        yield f"row {first_row + int(np.flatnonzero(~fits)[0])}: the answer does not solve its question"


def _verify_split(
    root: Path, name: str, info: SplitInfo, manifest: Manifest, task: Task | None
) -> Iterator[str]:
    """`task`: None if tokens are not to be looked at."""
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
        found = _verify_ids(batch, manifest, last)
        if task is not None:
            tokens = to_tokens(batch["inputs"]), to_tokens(batch["labels"])
            found = chain(wrong_tokens(task, *tokens), found)
        yield from (f"{shard.file}: {problem}" for problem in found)
    if num_examples != info.num_examples:
        yield f"{name}: {num_examples} examples, where the manifest says {info.num_examples}"
    for kind, count in (("puzzle", info.num_puzzles), ("group", info.num_groups)):
        if last[kind] + 1 != count:
            yield f"{name}: {last[kind] + 1} {kind}s, where the manifest says {count}"


def _verify_ids(batch: pa.RecordBatch, manifest: Manifest, last: dict[str, int]) -> Iterator[str]:
    """What is wrong with the numbers in a shard. `last` carries the last puzzle and group from shard to shard."""
    if not batch.num_rows:
        return
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
