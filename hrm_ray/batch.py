"""Examples of a data set as the tensors that models take."""

import numpy as np
import torch

from hrm_ray.data.sampler import PADDING
from hrm_ray.data.shards import Split
from hrm_ray.data.tasks.base import Task
from hrm_ray.models.act import IGNORE, Batch


def make_batch(
    split: Split,
    ids: np.ndarray,
    ignore_label_id: int | None,
    blank_identifier_id: int = 0,
    *,
    task: Task | None = None,
    keys: np.ndarray | None = None,
    filled: np.ndarray | None = None,
) -> Batch:
    """The examples `ids` (int64 [B]) as tensors; the rows of `PADDING` ids are padding.

    Args:
        task, keys: of training: the task may vary its examples, by a random uint64 [B] for each (`Task.vary`).
        filled: of training: which cells are filled in from the answer, where it has them; bool [B, C].
    """
    is_padding = ids == PADDING
    rows = split.rows(np.where(is_padding, 0, ids))
    inputs, labels = rows["inputs"], rows["labels"]
    if task is not None and keys is not None:
        inputs, labels = task.vary(inputs, labels, keys)
    labels = labels.astype(np.int64)
    if ignore_label_id is not None:
        labels[labels == ignore_label_id] = IGNORE
    identifiers = rows["puzzle_identifiers"]
    if is_padding.any():
        labels[is_padding] = IGNORE
        identifiers = np.where(is_padding, np.int32(blank_identifier_id), identifiers)
    if filled is not None:
        inputs = np.where(filled & (labels != IGNORE), labels, inputs)
    return Batch(
        torch.from_numpy(inputs.astype(np.int32)), torch.from_numpy(labels), torch.from_numpy(identifiers)
    )
