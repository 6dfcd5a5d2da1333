"""Building a data set deletes nothing that a build has not written."""

import shutil
from pathlib import Path

import pytest

from hrm_ray.data.files import delete_matching, whole_file
from hrm_ray.data.format import OUR_FILES, UNFINISHED
from hrm_ray.data.writer import DatasetWriter, strangers, writable_folder
from hrm_ray.errors import UserError
from hrm_ray.manifest import MANIFEST
from tests.toy import toy_dataset


@pytest.fixture
def data(tmp_path: Path) -> Path:
    toy_dataset(tmp_path / "data", num_train=8, num_test=4)
    return tmp_path / "data"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt",
        "train/notes.txt",
        "train/more/shard-00000.arrow",
        "manifest.json.bak",
        "train/shard-0.arrow",
        ".git/config",
        "empty/",
        "train/deeper/",
    ],
)
def test_a_data_set_with_something_else_in_it_is_not_replaced(data, name):
    path = data / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir() if name.endswith("/") else path.write_text("mine")
    before = contents(data)
    with pytest.raises(UserError, match=r"holds .*, which is not of a dataset; move it away") as told:
        writable_folder(data, overwrite=True)
    assert contents(data) == before and str(told.value).split(" holds ")[1].split(",")[0] in name


def test_a_link_in_a_data_set_is_not_followed(data, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "shard-00000.arrow").write_text("mine")
    (data / "link").symlink_to(tmp_path / "home")
    with pytest.raises(UserError, match="holds link, which is not of a dataset"):
        writable_folder(data, overwrite=True)
    delete_matching(data, OUR_FILES)
    assert contents(tmp_path / "home") == {"shard-00000.arrow": b"mine"} and (data / "link").is_symlink()


def test_a_manifest_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / MANIFEST).write_text('{"name": "a web page"}')
    with pytest.raises(UserError, match=r"holds manifest\.json, which is not of a dataset"):
        writable_folder(tmp_path, overwrite=True)


def test_a_damaged_data_set_may_be_replaced(data):
    (data / MANIFEST).write_text("{")
    assert writable_folder(data, overwrite=True) == data


@pytest.mark.parametrize("name", ["notes.txt", "train/notes.txt", "a/b/c"])
def test_a_folder_that_has_the_name_of_a_build_is_left_alone(tmp_path, name):
    path = tmp_path / "data.building" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(UserError, match=r"holds .*, which no build left there; move it away"):
        toy_dataset(tmp_path / "data")
    assert contents(tmp_path) == {f"data.building/{name}": b"mine"}


def test_a_finished_data_set_that_has_the_name_of_a_build_is_left_alone(data, tmp_path):
    shutil.move(data, tmp_path / "data.building")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"holds manifest\.json, which no build left there"):
        toy_dataset(tmp_path / "data")
    assert contents(tmp_path) == before


def test_a_build_that_was_killed_at_its_end_is_cleared(data, tmp_path):
    """Its manifest was written, and it had not yet its name."""
    shutil.move(data, tmp_path / "data.building")
    (tmp_path / "data.building" / UNFINISHED).touch()
    (tmp_path / "data.building" / "manifest.json.0123abcd.tmp").touch()
    toy_dataset(tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert strangers(tmp_path / "data") == [] and not (tmp_path / "data" / UNFINISHED).exists()


def test_a_folder_beside_it_of_any_name_stays(data, tmp_path):
    for name in ("data.replaced", "data.tmp", "data.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / MANIFEST).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="KeyError"), DatasetWriter(data, overwrite=True):
        raise UserError("KeyError")
    assert contents(tmp_path) == before


def test_writing_a_file_touches_no_file_beside_it(tmp_path):
    (tmp_path / "out.npz.tmp").write_text("mine")
    with whole_file(tmp_path / "out.npz") as file:
        file.write(b"1")
    assert contents(tmp_path) == {"out.npz.tmp": b"mine", "out.npz": b"1"}
