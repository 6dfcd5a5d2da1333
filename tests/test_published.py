"""What is said where something of a published layout is given where ours is expected."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from hrm_ray.cli import main
from hrm_ray.interop.checkpoint import import_checkpoint
from tests.interop.test_dataset import write_set
from tests.toy import toy_dataset

GOLDEN = Path(__file__).parent / "golden"
DATASET = "pub is in the published layout: hrm-ray data import-npy pub out=DIR"
SPLIT = "pub/train is one split of a data set in the published layout; give the folder around it: hrm-ray data import"
CHECKPOINT = "{} is in the published layout: hrm-ray import-checkpoint {} out=DIR, and give DIR"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With `pub`, a published data set, `hrm`, a published checkpoint, and both in our formats."""
    folder = tmp_path_factory.mktemp("published")
    for split in ("train", "test"):
        write_set(folder / "pub" / split, "all", np.random.default_rng(0), [1, 1], [1, 1])
    shutil.copytree(GOLDEN / "hrm_base", folder / "hrm")
    import_checkpoint(folder / "hrm", folder / "ours", toy_dataset(folder / "data", num_identifiers=5))
    return folder


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train data_path=pub epochs=20000 eval_interval=2000 scaling=local max_steps=1", DATASET),
        ("train experiment=sudoku_4x4 data=pub/", DATASET),
        ("data info pub", DATASET),
        ("data verify pub", DATASET),
        ("data build recipe=sudoku_9x9 source=pub out=o", DATASET),
        ("eval ours data=pub", DATASET),
        ("solve ours data=pub", DATASET),
        ("import-checkpoint hrm data=pub out=o", DATASET),
        ("data info pub/train", SPLIT),
        ("data import-npy pub/train out=o", SPLIT),
        ("eval hrm data=data", CHECKPOINT.format("hrm", "hrm")),
        ("solve hrm ...", CHECKPOINT.format("hrm", "hrm")),
        ("eval hrm/checkpoint data=data", CHECKPOINT.format("hrm/checkpoint", "hrm/checkpoint")),
        ("export-checkpoint hrm out=o", CHECKPOINT.format("hrm", "hrm")),
        (
            "eval owner/name data=data",
            "if it is on Hugging Face: hrm-ray import-checkpoint owner/name out=DIR",
        ),
        ("import-checkpoint ours out=o", "ours is a checkpoint or run of hrm_ray already; use it as it is"),
        ("import-checkpoint data out=o", "data has no all_config.yaml: not a published checkpoint folder"),
    ],
)
def test_the_command_that_converts_it_is_named(folder, monkeypatch, capsys, words, said):
    monkeypatch.chdir(folder)
    before = sorted(folder.iterdir())
    assert main(words.split()) == 2
    line = capsys.readouterr().err
    assert said in line and len(line.splitlines()) == 1
    assert sorted(folder.iterdir()) == before


def test_an_empty_data_set_is_not_trained_on(tmp_path, capsys):
    toy_dataset(tmp_path / "data", num_train=0)
    words = ["train", f"data={tmp_path / 'data'}", "scaling=local", f"storage={tmp_path / 'runs'}"]
    assert main(words) == 2
    assert "split 'train' holds no examples" in capsys.readouterr().err
    assert main(["data", "info", str(tmp_path / "data")]) == 0
