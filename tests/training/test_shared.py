"""Folders that only the driver's machine has."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

from hrm_ray.errors import Unseen
from hrm_ray.storage.storage import Storage
from hrm_ray.training.shared import check_seen
from hrm_ray.tuning.config import plain
from tests.faults.nodes import Nodes
from tests.toy import toy_config, toy_dataset
from tests.training.test_ray import command
from tests.tuning.toy_sweep import toy_sweep


def test_what_is_seen(tmp_path):
    for path in (str(tmp_path), tmp_path.as_uri(), "s3://b/nowhere"):
        check_seen("data", path)
    with pytest.raises(
        Unseen, match=r"node \S+ does not see data=/no/such, which is on the machine where the command"
    ):
        check_seen("data", "/no/such")
    with pytest.raises(Unseen, match=f"storage={tmp_path},"):
        check_seen("storage", str(tmp_path), Storage(tmp_path) / "just-made")


@pytest.fixture
def other_machine(tmp_path):
    """A cluster whose only node for workers has nothing in `tmp_path / "mine"`; its address."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("only root may hide a folder from a node")
    (tmp_path / "mine").mkdir()
    root = Path(tempfile.mkdtemp(prefix="hrm")) / "n"
    nodes = Nodes(root)
    nodes.start()
    nodes.add(hides=tmp_path / "mine")
    yield nodes.address
    nodes.end()
    shutil.rmtree(root.parent, ignore_errors=True)


@pytest.mark.ray
@pytest.mark.long
def test_another_machine_says_what_it_does_not_see(tmp_path, other_machine):
    def error_of(words: list[str]) -> str:
        env = {**os.environ, "RAY_ADDRESS": other_machine}
        done = subprocess.run(words, env=env, stderr=subprocess.PIPE, text=True, timeout=240)
        assert done.returncode == 2, done.stderr
        return done.stderr.splitlines()[-1]

    def not_seen(key: str, path: Path) -> str:
        return f"does not see {key}={path}, which is on the machine where the command runs; give a URI"

    seen, mine = tmp_path / "seen", tmp_path / "mine"
    for folder in (seen, mine):
        toy_dataset(folder / "data")
    more = ["scaling=ray", "scaling.num_workers=1"]
    for data, storage, key, path in (
        (seen, mine, "storage", mine / "runs"),
        (mine, seen, "data", mine / "data"),
    ):
        line = error_of([*command(toy_config(data / "data", storage / "runs", max_steps=3)), *more])
        assert not_seen(key, path) in line

    sweep = plain(toy_sweep(tmp_path, pruner=None, num_trials=8, train={"data_path": str(seen / "data")}))
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in sweep.items() if v is not None} | {"pruner": "none"}))
    hrm_ray = [sys.executable, "-m", "hrm_ray", "tune", str(file)]
    assert not_seen("storage", mine / "sweeps/toy") in error_of([*hrm_ray, f"storage={mine / 'sweeps'}"])
    assert not_seen("data", mine / "data") in error_of([*hrm_ray, f"data_path={mine / 'data'}"])
