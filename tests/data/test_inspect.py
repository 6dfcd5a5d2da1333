import numpy as np
import pytest

from hrm_ray.data.format import Manifest
from hrm_ray.data.inspect import describe, show
from hrm_ray.data.shards import open_dataset
from hrm_ray.data.tasks.base import get_task
from hrm_ray.data.writer import DatasetWriter
from hrm_ray.errors import UserError


@pytest.fixture
def path(tmp_path):
    task = get_task("sudoku", size=4)
    questions, answers = task.generate(0, 0, 3, 7, 100)
    with DatasetWriter(tmp_path / "data") as writer:
        split = writer.split("train", task, np.array([0, 2, 3]))
        split.add(questions, answers, np.zeros(3, np.int32), np.arange(3), np.arange(3))
        manifest = Manifest(
            task=task.name,
            task_options=task.options,
            vocab_size=6,
            seq_len=16,
            pad_id=0,
            ignore_label_id=0,
            blank_identifier_id=0,
            num_puzzle_identifiers=1,
            seed=0,
            recipe={"source": "here", "num_aug": 0, "num_test": None},
            source_digest="",
            report={"bad_rows_skipped": 2, "bad_rows": ["a.csv, line 3: wrong"]},
            splits={"train": split.finish()},
        )
        writer.finish(manifest)
    return tmp_path / "data"


def test_describe(path):
    text = describe(path)
    assert "sudoku (size=4)" in text and "num_aug=0" in text and "num_test" not in text
    assert "bad rows skipped: 2" in text
    assert text.splitlines()[-1].split()[:5] == ["train", "3", "3", "3", "2"]


def test_show(path):
    lines = show(open_dataset(path), "train", 2).splitlines()
    assert lines[0] == "train example 2: group 2, puzzle 2, identifier 0"
    assert lines[1] == "+-----+-----+   +-------+-------+" and len(lines) == 10
    assert "'" in lines[2] and lines[-1].startswith("answer   ")
    for index in (3, -1):
        with pytest.raises(UserError, match=r"has examples 0\.\.2"):
            show(open_dataset(path), "train", index)
    with pytest.raises(UserError, match="has no split 'test'; it has: train"):
        show(open_dataset(path), "test", 0)
