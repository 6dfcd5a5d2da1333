"""A dataset that is not byte for byte what was built is refused, whatever happened to it."""

import json

import pytest

from hrm_ray.config.schema import TrainConfig
from hrm_ray.data.shards import open_dataset
from hrm_ray.errors import UserError
from hrm_ray.manifest import seal
from hrm_ray.training.driver import run_folder
from hrm_ray.training.hooks import Hooks
from hrm_ray.training.loop import TrainingLoop
from hrm_ray.world import World
from tests.damage import assert_every_damage_is_refused
from tests.toy import toy_config, toy_dataset


def test_every_damage_is_refused(tmp_path):
    folder = tmp_path / "data"
    toy_dataset(folder)

    def use():
        for split in open_dataset(folder).splits.values():
            split.check_files()

    assert_every_damage_is_refused(folder, use, range(500))


@pytest.mark.parametrize("split", ["train", "test"])
def test_training_refuses_a_flipped_bit(tmp_path, split):
    file = tmp_path / f"data/{split}/shard-00001.arrow"
    toy_dataset(tmp_path / "data")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    config = TrainConfig(**toy_config(tmp_path / "data", tmp_path / "runs"))
    with pytest.raises(UserError, match=f"{file} is damaged: its SHA-256 .*; build the dataset again"):
        TrainingLoop(config, run_folder(config), World(), Hooks())
    assert not (tmp_path / "runs").exists()


def test_a_damaged_copy_in_the_cache_is_to_be_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setenv("HRM_RAY_CACHE", str(tmp_path))
    copy = tmp_path / "datasets" / "0123"
    copy.parent.mkdir()
    dataset = toy_dataset(copy)
    file = copy / dataset.manifest.files[0].file
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(UserError, match=f"shard-00000.arrow is damaged: .*; delete {copy} to fetch it again"):
        dataset.split("train").check_files()
    (copy / "manifest.json").write_text("")
    with pytest.raises(UserError, match=f"manifest.json is damaged: .*; delete {copy} to fetch it again"):
        open_dataset(copy)


@pytest.mark.parametrize(
    "name", ["../elsewhere.arrow", "/tmp/elsewhere.arrow", "train/../../elsewhere.arrow"]
)
def test_a_manifest_names_no_file_elsewhere(tmp_path, name):
    """Also one that was made so: a copy into the cache would write there."""
    manifest = toy_dataset(tmp_path / "data").manifest
    values = json.loads(manifest.render())
    del values["digest"]
    values["splits"]["train"]["shards"][0]["file"] = name
    (tmp_path / "data/manifest.json").write_bytes(seal(values))
    with pytest.raises(UserError, match="lies outside the dataset's folder"):
        open_dataset(tmp_path / "data")


def test_a_newer_format_is_named(tmp_path):
    manifest = toy_dataset(tmp_path / "data").manifest
    file = tmp_path / "data/manifest.json"
    file.write_bytes(manifest.model_copy(update={"format_version": 2}).render())
    with pytest.raises(UserError, match="has format 2, this hrm_ray reads up to 1; upgrade hrm_ray"):
        open_dataset(tmp_path / "data")
