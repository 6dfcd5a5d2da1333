"""Accuracy over depth, number of paths and selection, in one pass over a split.

The first steps of a path are shared by all depths, its tries by all numbers of paths, and the answers by all
selections. So the pass costs what the deepest and widest of them costs alone, where none ends early.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hrm_ray.batch import make_batch
from hrm_ray.config.inference import Inference, Select
from hrm_ray.data.shards import Dataset
from hrm_ray.data.tasks.base import Task
from hrm_ray.errors import UserError
from hrm_ray.evaluation.evaluate import thinker_of
from hrm_ray.models.act import ACT, IGNORE
from hrm_ray.models.inference import CHOSEN_FROM, PREFERENCES, Kept, at, check, choose, rounds
from hrm_ray.models.losses import count_right

Row = dict[str, Any]


@torch.no_grad()
def survey(
    model: ACT,
    dataset: Dataset,
    *,
    inference: Inference,
    depths: Sequence[int],
    paths: Sequence[int],
    batch_size: int,
    split: str = "test",
    num_examples: int | None = None,
    on_batch: Callable[[int], object] | None = None,
) -> list[Row]:
    """Measure `model`, in evaluation mode, at each of `depths` with each number of `paths`.

    Args:
        inference: how the model is used; its `paths` is the largest of `paths`, its `select` does not matter.
        depths: ACT steps at most.
        batch_size: tries at examples that are computed at once.
        num_examples: only the first so many; None: all.
        on_batch: called with the number of examples after each batch.

    Returns:
        for each depth and number of paths: `depth`, `paths`; `path`, the exact accuracy of one path; `any`, the share
        of puzzles of which some path is right; and by selection, as `vote/steps`: `exact_accuracy`, `steps` (ACT steps
        a puzzle, over all copies and paths, that it alone takes), under `valid` also `answered` (a share). Those
        selections are left out that the model or the task does not allow.

    Raises:
        UserError: the task or the model cannot be used so.
    """
    task, examples = dataset.task, dataset.split(split)
    count = min(num_examples or examples.num_examples, examples.num_examples)
    checks = {"is_solution": task.is_solution if task.checkable else None}
    thinker = thinker_of(
        model, task, inference, rows_at_once=batch_size, with_logits=False, with_residual=True, **checks
    )
    selections = [select for select in PREFERENCES if _is_possible(model, task, inference, select)]
    sums: dict[tuple[int, int], dict[str, float]] = {}
    num_labelled = 0  # puzzles with labels, as others are not counted
    at_once = inference.puzzles_at_once(batch_size)
    for start in range(0, count, at_once):
        ids = np.arange(start, min(start + at_once, count))
        batch = make_batch(examples, ids, dataset.manifest.ignore_label_id).to(
            next(model.parameters()).device
        )
        is_puzzle = (batch.labels != IGNORE).any(1)
        num_labelled += int(is_puzzle.sum())
        for depth, kept in zip(depths, thinker.survey(batch, depths), strict=True):
            for number in paths:
                first = at(kept, (slice(None), slice(number * inference.votes)))
                sums.setdefault((depth, number), {})
                for name, values in _measures(first, batch.labels, selections).items():
                    cell = sums[depth, number]
                    cell[name] = cell.get(name, 0.0) + (values * is_puzzle).sum(dtype=torch.float64).item()
        if on_batch:
            on_batch(len(ids))
    return [
        {
            "depth": depth,
            "paths": number,
            **{name: total / max(num_labelled, 1) for name, total in cell.items()},
        }
        for (depth, number), cell in sums.items()
    ]


def _is_possible(model: ACT, task: Task, inference: Inference, select: Select) -> bool:
    """Whether `model` could be used so, but with this selection."""
    try:
        check(model, inference.model_copy(update={"select": select}))
    except UserError:
        return False
    return select != "valid" or task.checkable


def _measures(kept: Kept, labels: Tensor, selections: Sequence[Select]) -> dict[str, Tensor]:
    """What is averaged over puzzles, by name; [B] each."""
    tokens = kept["last"].answer.tokens
    right = _is_exact(tokens, labels[:, None].expand_as(tokens))
    measures = {"path": right.double().mean(1), "any": right.any(1)}
    for select in selections:
        tries = kept[CHOSEN_FROM.get(select, ("last",))[0]]
        measures[f"{select}/exact_accuracy"] = _is_exact(choose(tries, select).tokens, labels)
        measures[f"{select}/steps"] = steps_spent(kept, select)
        if select == "valid":
            measures["valid/answered"] = tries.valid.any(1)
    return measures


def _is_exact(tokens: Tensor, labels: Tensor) -> Tensor:
    num_right, num_labelled = count_right(tokens, labels)
    return num_right == num_labelled


def steps_spent(kept: Kept, select: Select) -> Tensor:
    """ACT steps over all tries at each puzzle, int64 [B], that `select` needs: none where it has an answer already."""
    steps = kept["last"].answer.steps
    if select == "first_halt":
        return kept["learned"].answer.steps.amin(1) * steps.shape[1]
    if select != "valid":
        return steps.sum(1)
    valid, spent = kept["proven"].valid, torch.zeros_like(steps[:, 0])
    found_at = torch.where(valid, kept["proven"].answer.steps, steps.amax() + 1)
    for numbers in rounds(steps.shape[1]):
        these = slice(numbers.start, numbers.stop)
        ends = torch.minimum(steps[:, these], found_at[:, these].amin(1, keepdim=True))
        spent += ends.sum(1) * ~valid[:, : numbers.start].any(1)
    return spent


def as_text(rows: Sequence[Row]) -> str:
    """A table for people: of each selection the exact accuracy, and the steps where they differ."""
    names = [name.partition("/")[0] for name in rows[0] if name.endswith("/exact_accuracy")]
    stepping = [name for name in ("vote", "first_halt", "valid") if name in names]
    head = [
        "depth",
        "paths",
        "one path",
        *names,
        "any right",
        *(f"steps {name}" for name in stepping),
    ]
    more = ["answered"] if "valid" in names else []
    lines = [head + more]
    for row in rows:
        shares = [row["path"], *(row[f"{name}/exact_accuracy"] for name in names), row["any"]]
        steps = [row[f"{name}/steps"] for name in stepping]
        lines.append(
            [str(row["depth"]), str(row["paths"])]
            + [f"{share:.1%}" for share in shares]
            + [f"{number:.1f}" for number in steps]
            + ([f"{row['valid/answered']:.1%}"] if more else [])
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
    )


def draw(rows: Sequence[Row], select: Select, trained: int) -> Any:
    """A figure of matplotlib: accuracy over depth for each number of paths, and over paths at the largest depth.

    Args:
        select: of the curves over depth.
        trained: ACT steps in training, which are marked.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    depths, paths = (sorted({row[key] for row in rows}) for key in ("depth", "paths"))
    names = [name.partition("/")[0] for name in rows[0] if name.endswith("/exact_accuracy")]
    values = {(row["depth"], row["paths"]): row for row in rows}
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    over_depth, over_paths = figure.subplots(1, 2, sharey=True)
    for number in paths:
        line = [values[depth, number][f"{select}/exact_accuracy"] for depth in depths]
        over_depth.plot(depths, line, "o-", label=f"{number} path{'s' * (number > 1)}")
    for name in names:
        line = [values[depths[-1], number][f"{name}/exact_accuracy"] for number in paths]
        over_paths.plot(paths, line, "o-", label=name)
    line = [values[depths[-1], number]["any"] for number in paths]
    over_paths.plot(paths, line, ":", color="grey", label="any path right")
    over_depth.axvline(trained, color="grey", linestyle=":", linewidth=1)
    over_depth.set(xlabel=f"ACT steps at most ({trained} in training), select={select}")
    over_depth.set(ylabel="puzzles exactly right")
    over_paths.set(xlabel=f"paths of {depths[-1]} ACT steps")
    for axes, ticks in ((over_depth, depths), (over_paths, paths)):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.legend(loc="lower right", frameon=False, fontsize=8)
    return figure
