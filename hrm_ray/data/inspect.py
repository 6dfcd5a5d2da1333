"""A dataset for a person to read: what it holds, and single examples of it."""

from pathlib import Path

import numpy as np

from hrm_ray.data.drawing import beside, draw
from hrm_ray.data.shards import Dataset, open_dataset
from hrm_ray.errors import UserError


def describe(path: str | Path) -> str:
    """Counts, schema and origin of a dataset, in lines. Raises UserError if it cannot be opened."""
    dataset = open_dataset(path)
    manifest = dataset.manifest
    options = ", ".join(f"{key}={value}" for key, value in manifest.task_options.items())
    facts = {
        "task": f"{manifest.task} ({options})",
        "tokens": f"{manifest.seq_len} of a vocabulary of {manifest.vocab_size}",
        "ids": f"pad {manifest.pad_id}, ignored label {manifest.ignore_label_id}, "
        f"blank puzzle {manifest.blank_identifier_id}, {manifest.num_puzzle_identifiers} puzzle identifiers",
        "source": str(manifest.recipe.get("source", "imported")),
        "recipe": ", ".join(
            f"{key}={value}"
            for key, value in manifest.recipe.items()
            if value is not None and key not in ("task", "source")
        )
        or "none",
        "fingerprint": dataset.fingerprint,
    }
    lines = [f"{name:<12} {value}" for name, value in facts.items()]
    lines += [f"{name.replace('_', ' ')}: {count}" for name, count in manifest.report.items() if count]
    lines += ["", f"{'split':<12} {'examples':>12} {'puzzles':>12} {'groups':>12} {'shards':>8} {'MB':>10}"]
    for name, info in manifest.splits.items():
        size_mb = sum(shard.bytes for shard in info.shards) / 1e6
        lines.append(
            f"{name:<12} {info.num_examples:>12,} {info.num_puzzles:>12,} {info.num_groups:>12,} "
            f"{len(info.shards):>8} {size_mb:>10.1f}"
        )
    return "\n".join(lines)


def show(dataset: Dataset, split: str = "train", index: int = 0, *, in_colour: bool = False) -> str:
    """Example `index` of a split, question and answer side by side.

    Raises:
        UserError: no such split or example.
    """
    part = dataset.split(split)
    if not 0 <= index < part.num_examples:
        raise UserError(
            f"index={index}: split '{split}' of {dataset.path} has examples 0..{part.num_examples - 1}"
        )
    task, row = dataset.task, part.rows(np.array([index]))
    question, answer = row["inputs"][0], row["labels"][0]
    puzzle = int(np.searchsorted(part.puzzle_starts, index, side="right")) - 1
    group = int(np.searchsorted(part.group_starts, puzzle, side="right")) - 1
    identifier = f"identifier {row['puzzle_identifiers'][0]}"
    return "\n".join(
        (
            f"{split} example {index}: group {group}, puzzle {puzzle}, {identifier}",
            beside(
                draw(task, question, in_colour=in_colour), draw(task, answer, question, in_colour=in_colour)
            ),
            f"question {task.to_text(question)}",
            f"answer   {task.to_text(answer)}",
        )
    )
