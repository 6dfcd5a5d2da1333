"""A cluster that was joined for a build, and is lost in the midst."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.faults.nodes import Nodes

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(600)]


def test_a_cluster_that_is_lost_during_a_build_is_one_line(tmp_path):
    root = Path(tempfile.mkdtemp(prefix="hrm"))
    nodes = Nodes(root / "n")
    log = (tmp_path / "log.txt").open("w+")
    words = ["data", "build", "recipe=sudoku_6x6", "num_train=3000000", f"out={tmp_path / 'out'}"]
    try:
        nodes.start()
        nodes.add()
        build = subprocess.Popen(
            [sys.executable, "-m", "hrm_ray", *words],
            env={**os.environ, "RAY_ADDRESS": nodes.address},
            stdout=log,
            stderr=log,
        )
        deadline = time.monotonic() + 300
        while "generate" not in (tmp_path / "log.txt").read_text():
            assert build.poll() is None and time.monotonic() < deadline, (tmp_path / "log.txt").read_text()
            time.sleep(0.1)
    finally:
        nodes.end()
        shutil.rmtree(root, ignore_errors=True)
    assert build.wait(200) != 0
    message = f"error: RAY_ADDRESS={nodes.address}: the cluster, or its node on this machine, was lost"
    while message not in (text := (tmp_path / "log.txt").read_text()):  # another process says it
        assert time.monotonic() < deadline + 300, text
        time.sleep(0.1)
    assert "Traceback" not in text
    assert not (tmp_path / "out").exists()
