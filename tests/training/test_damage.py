"""A checkpoint that is not byte for byte what was saved is refused, whatever happened to it."""

import pytest

from hrm_ray.config.schema import TrainConfig
from hrm_ray.data.shards import open_dataset
from hrm_ray.errors import UserError
from hrm_ray.storage.storage import Storage
from hrm_ray.training.checkpoint import Checkpoint, finished
from hrm_ray.training.driver import run_folder
from hrm_ray.training.launch import train
from tests.damage import assert_every_damage_is_refused
from tests.toy import ARCH, toy_config, toy_dataset


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of a short run."""
    toy_dataset(tmp_path / "data", num_train=16, num_test=8, num_identifiers=5)
    small = {**ARCH, "hidden_size": 16, "puzzle_emb_ndim": 16}  # every byte is read a thousand times below
    values = toy_config(tmp_path / "data", tmp_path / "runs", ema=True, max_steps=3, arch=small)
    config = TrainConfig(**values)
    train(config, show_progress=False)
    return finished(run_folder(config))[-1].folder.local_path


def test_every_damage_is_refused(folder):
    def use():
        checkpoint = Checkpoint(Storage(folder))
        for name in checkpoint.manifest.files:
            checkpoint.tensors(name)
        checkpoint.weights()

    assert_every_damage_is_refused(folder, use, range(1000, 1500))


def test_a_checkpoint_is_no_dataset_and_a_dataset_no_checkpoint(folder, tmp_path):
    with pytest.raises(UserError, match="is not of a dataset; give a dataset folder"):
        open_dataset(folder)
    with pytest.raises(UserError, match="is not a checkpoint; give a checkpoint or a run folder"):
        Checkpoint(Storage(tmp_path / "data"))
