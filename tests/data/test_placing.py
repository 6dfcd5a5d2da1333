"""Datasets at URIs: the same bytes as local ones, whole or not at all, one build at a time."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hrm_ray.cli import main
from hrm_ray.data import pipeline, placing
from hrm_ray.data.format import UNFINISHED
from hrm_ray.data.placing import manifest_at, placed
from hrm_ray.data.shards import open_dataset
from hrm_ray.errors import UserError
from hrm_ray.manifest import MANIFEST
from hrm_ray.remote import StorageError
from hrm_ray.storage import lock
from hrm_ray.storage.storage import Storage
from tests.toy import toy_dataset


@pytest.fixture(autouse=True)
def fast_leases_and_own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(lock, "RENEW_S", 0.3)
    monkeypatch.setattr(lock, "TAKE_OVER_S", 2.0)
    monkeypatch.setattr(lock, "LOOK_S", 0.05)
    monkeypatch.setenv("HRM_RAY_CACHE", str(tmp_path / "cache"))


def put(out: str, seed: int = 0, overwrite: bool = False, **values) -> None:
    """A toy dataset to `out`."""
    with placed(out, overwrite=overwrite, show_progress=False) as folder:
        if not folder.exists():
            toy_dataset(folder, seed=seed, **values)


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def builds_left(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "cache/builds").glob("*") if path.is_dir()]


def test_the_same_bytes_as_a_local_dataset(s3, tmp_path):
    toy_dataset(tmp_path / "local")
    put(s3("data"))
    there = Storage(s3("data"))
    names = set(there.files()) - {lock.NAME}
    assert {name: hashlib.sha256(there.read(name)).hexdigest() for name in names} == digests(
        tmp_path / "local"
    )
    assert open_dataset(s3("data")).fingerprint == open_dataset(tmp_path / "local").fingerprint
    assert builds_left(tmp_path) == []


def test_the_manifest_comes_last(s3, s3_proxy):
    put(s3("data"))
    written = [r.split("?")[0].partition("/data/")[2] for r in s3_proxy.requests if r.startswith("PUT ")]
    files = [name for name in written if name not in ("", lock.NAME)]
    assert files[0] == UNFINISHED and files[-1] == MANIFEST
    shards = [entry.file for entry in manifest_at(s3("data")).files]
    assert len(shards) > 3 and sorted(files[1:-1]) == sorted(shards)  # and each is one request


@pytest.mark.parametrize("fault", ["error", "drop"])
def test_a_build_that_could_not_be_copied_leaves_no_dataset_and_is_copied_by_the_same_command(
    s3, s3_proxy, tmp_path, fault
):
    s3_proxy.fault = lambda method, path: fault if method == "PUT" and "test/shard" in path else None
    with pytest.raises(
        StorageError, match=r"the finished dataset is kept in .*, and the same command copies it"
    ):
        put(s3("data"))
    assert manifest_at(s3("data")) is None
    with pytest.raises(UserError, match="no dataset, or its build did not finish"):
        open_dataset(s3("data"))
    (kept,) = builds_left(tmp_path)
    s3_proxy.fault = lambda method, path: None
    with placed(s3("data"), show_progress=False) as folder:
        assert folder == kept and open_dataset(folder)
    assert open_dataset(s3("data")).split("test") and builds_left(tmp_path) == []


@pytest.mark.parametrize("fault", ["error", "drop", "lost", "twice"])
def test_requests_that_fail_now_and_then_change_nothing(s3, s3_proxy, fault):
    count = iter(range(10**6))
    s3_proxy.fault = lambda method, path: fault if method == "PUT" and next(count) % 4 == 1 else None
    put(s3("data"))
    s3_proxy.fault = lambda method, path: None
    assert placing.manifest_at(s3("data")) == open_dataset(s3("data")).manifest
    assert UNFINISHED not in Storage(s3("data")).files()


def test_what_is_there_is_replaced_only_when_asked_for(s3):
    put(s3("data"), num_train=64)
    with pytest.raises(
        UserError, match="already holds another dataset; give another out=, or overwrite=true"
    ):
        put(s3("data"))
    put(s3("data"), num_train=8, overwrite=True)
    manifest = manifest_at(s3("data"))
    assert set(Storage(s3("data")).files()) == {MANIFEST, lock.NAME, *(f.file for f in manifest.files)}
    Storage(s3("data")).write("notes.txt", b"mine")
    with pytest.raises(UserError, match=r"holds notes\.txt, which is not of a dataset"):
        put(s3("data"), overwrite=True)
    Storage(s3("mine")).write("train/shard-00000.arrow", b"of a person who has copied it there")
    with pytest.raises(UserError, match="is a folder with other things in it"):
        put(s3("mine"))


def test_a_second_build_is_refused_while_one_is_at_work(s3):
    with placed(s3("data"), show_progress=False) as folder:
        toy_dataset(folder)
        with pytest.raises(UserError, match=r"another process is building s3://.*; wait for it"):
            put(s3("data"))
    assert open_dataset(s3("data"))


def test_where_no_lease_can_be_held_this_machine_has_one_build_at_a_time(s3, s3_proxy, capsys, tmp_path):
    """Both would use one folder."""
    s3_proxy.fault = lambda method, path: "unconditional"
    with placed(s3("data"), show_progress=False) as folder:
        assert "cannot keep other builds off" in capsys.readouterr().err
        toy_dataset(folder)
        with pytest.raises(UserError, match=r"another process is building s3://.*; wait for it"):
            put(s3("data"))
        put(s3("other"))
        assert open_dataset(folder)
    assert open_dataset(s3("data")) and open_dataset(s3("other")) and builds_left(tmp_path) == []


def test_old_builds_are_deleted_by_the_next_one(s3, tmp_path):
    builds = tmp_path / "cache/builds"
    names = ("old", "killed.building", "at-work", "mine", "young")
    for name in names:
        toy_dataset(builds / name)
    (builds / "mine/notes.txt").write_text("a user's")
    weeks_ago = time.time() - 1.1 * placing.KEPT_S
    for name in names[:-1]:
        os.utime(builds / name, (weeks_ago, weeks_ago))
    with placing._locked(builds / "at-work"):
        put(s3("data"))
    assert {path.name for path in builds_left(tmp_path)} == {"at-work", "mine", "young"}
    assert open_dataset(builds / "at-work") and open_dataset(builds / "young")
    assert [path.name for path in (builds / "mine").iterdir()] == ["notes.txt"]


def test_who_was_taken_over_does_not_finish(s3):
    """Its machine slept while another one built the same place."""
    with pytest.raises(lock.LeaseLost), placed(s3("data"), show_progress=False) as folder:
        toy_dataset(folder, seed=1)
        lease = json.loads(Storage(s3("data")).read(lock.NAME))
        Storage(s3("data")).write(lock.NAME, json.dumps({**lease, "holder": "another"}).encode())
        deadline = time.monotonic() + 60
        while any(t.name == "lease" for t in threading.enumerate()):
            assert time.monotonic() < deadline  # it ends when a renewal was refused
            time.sleep(0.05)
    assert manifest_at(s3("data")) is None


def test_a_manifest_is_never_written_over(s3):
    place = Storage(s3("data"))
    assert place.create_file(MANIFEST, b"one") and place.create_file(MANIFEST, b"one")
    assert not place.create_file(MANIFEST, b"two") and place.read(MANIFEST) == b"one"


BUILD = """
import os, signal, sys
from hrm_ray.data import placing
from hrm_ray.storage import lock, storage
from tests.data.test_placing import put
lock.RENEW_S, lock.TAKE_OVER_S, lock.LOOK_S = 0.3, 2.0, 0.05
written, write = [], storage.Storage.write
def dies(self, name, content):
    write(self, name, content)
    written.append(name)
    if len(written) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
storage.Storage.write = dies
placing.AT_ONCE = 1
put(sys.argv[1])
"""


@pytest.mark.parametrize("after", [1, 3])
def test_a_killed_build_leaves_no_dataset_and_the_next_one_takes_its_place(s3, after, tmp_path):
    killed = subprocess.run([sys.executable, "-c", BUILD, s3("data"), str(after)], env={**os.environ})
    assert killed.returncode == -signal.SIGKILL
    assert manifest_at(s3("data")) is None and UNFINISHED in Storage(s3("data")).files()
    put(s3("data"))
    files = Storage(s3("data")).files()
    assert set(files) == {MANIFEST, lock.NAME, *(f.file for f in manifest_at(s3("data")).files)}


def test_the_command(s3, tmp_path, capsys):
    """As a person gives it; the second time nothing is to be done, and a local build has the same bytes."""
    words = ["data", "build", "recipe=sudoku_4x4", "num_train=40", "num_test=10", "num_aug=2"]
    assert main([*words, f"out={s3('data')}"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("s3://") and "train 1" in captured.out and "copy" in captured.err
    assert main([*words, f"out={s3('data')}"]) == 0
    assert "is up to date" in capsys.readouterr().err
    assert main([*words, f"out={tmp_path / 'local'}"]) == 0
    assert open_dataset(s3("data")).fingerprint == open_dataset(tmp_path / "local").fingerprint
    assert main(["data", "verify", s3("data")]) == 0
    assert main([*words, "num_aug=1", f"out={s3('data')}"]) == 2
    assert "already holds another dataset" in capsys.readouterr().err


def test_a_local_folder_is_given_by_its_path(tmp_path):
    for call in (lambda: put(f"file://{tmp_path}/x"), lambda: manifest_at(f"file://{tmp_path}/x")):
        with pytest.raises(UserError, match="leave out file://"):
            call()
    assert not list(tmp_path.glob("*"))


def test_the_first_error_ends_the_copy(s3, s3_proxy, monkeypatch):
    monkeypatch.setattr(placing, "AT_ONCE", 1)
    s3_proxy.fault = lambda method, path: "error" if method == "PUT" and "shard-00000" in path else None
    with pytest.raises(StorageError):
        put(s3("data"))
    tried = {r.partition("/data/")[2] for r in s3_proxy.requests if r.startswith("PUT ") and "shard" in r}
    assert len(tried) <= 2  # of some seven; one may have begun meanwhile


def test_a_bucket_that_is_not_there_is_said_before_anything_is_built(s3, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "_build", None)
    nowhere = s3("data").replace("s3://bucket-", "s3://nobucket-")
    assert main(["data", "build", "recipe=sudoku_4x4", f"out={nowhere}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "check the address, the network and the credentials" in line
