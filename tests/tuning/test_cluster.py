"""Sweeps on clusters whose nodes come and go, and as jobs: each on real nodes of this machine."""

import csv
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

from hrm_ray.errors import UserError
from hrm_ray.storage.storage import Storage
from hrm_ray.training.checkpoint import finished
from hrm_ray.tuning.config import plain
from hrm_ray.tuning.status import status
from hrm_ray.tuning.study import trial_name
from hrm_ray.tuning.sweep import sweep_folder
from tests.faults.nodes import Nodes
from tests.training.test_preemption import head  # noqa: F401 - a fixture
from tests.tuning.test_sweep import retrained, sha_of_weights, wait_for
from tests.tuning.toy_sweep import toy_sweep

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(600)]
SLOW = {"max_steps": 400, "epochs": 200, "checkpoint_interval": 20}


@pytest.fixture
def nodes():
    root = Path(tempfile.mkdtemp(prefix="hrm")) / "n"
    found = Nodes(root)
    found.start()
    yield found
    found.end()
    shutil.rmtree(root.parent, ignore_errors=True)


def file_of(tmp_path: Path, **values) -> tuple[Path, Storage]:
    config = toy_sweep(tmp_path, pruner=None, **values)
    file = tmp_path / "toy.yaml"
    file.write_text(
        yaml.safe_dump({**{k: v for k, v in plain(config).items() if v is not None}, "pruner": "none"})
    )
    return file, sweep_folder(config)


def running_steps(folder: Storage) -> list[int]:
    """Steps of the trials at work."""
    try:
        return [row["steps"] for row in status(folder)[2] if row["state"] == "RUNNING"]
    except UserError:  # it has not begun yet
        return []


def test_nodes_come_and_go(tmp_path, nodes):
    """One node, a second one that is used, and lost in the midst: no trial counts it as a failure."""
    file, folder = file_of(tmp_path, num_trials=4, train={**SLOW, "failure.max_failures": 0})
    first = nodes.add()
    driver = subprocess.Popen(
        [sys.executable, "-m", "hrm_ray.cli", "tune", str(file)],
        env={**os.environ, "RAY_ADDRESS": nodes.address},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(lambda: driver.poll() is not None or any(s > 30 for s in running_steps(folder)), 120)
        nodes.add()
        wait_for(lambda: driver.poll() is not None or sum(s > 30 for s in running_steps(folder)) == 2, 120)
        nodes.lose(first)
        _, err = driver.communicate(timeout=400)
    finally:
        driver.kill()
    assert driver.returncode == 0, err
    rows = list(csv.DictReader((folder.local_path / "trials.csv").open()))
    assert [row["state"] for row in rows] == ["COMPLETE"] * 4
    for row in rows:
        assert sha_of_weights(folder / trial_name(int(row["number"]))) == retrained(row, tmp_path / "again")


def test_a_sweep_that_the_cluster_can_never_hold_is_refused_at_once(tmp_path, nodes):
    file, folder = file_of(tmp_path, num_trials=2, resources={"cpus": 3})
    nodes.add()
    done = subprocess.run(
        [sys.executable, "-m", "hrm_ray.cli", "tune", str(file)],
        env={**os.environ, "RAY_ADDRESS": nodes.address},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and not folder.exists()
    assert done.stderr.splitlines()[-1].startswith(
        "error: a trial needs 3 CPU, the cluster has no room for that: it has 2 nodes (1 CPU); lower"
    )


def test_ray_job_stop_and_the_same_job_again(tmp_path, head):  # noqa: F811
    from ray.job_submission import JobStatus, JobSubmissionClient

    file, folder = file_of(tmp_path, num_trials=2, train=SLOW)
    entrypoint = shlex.join([sys.executable, "-m", "hrm_ray.cli", "tune", str(file)])

    def client():
        try:
            return JobSubmissionClient(head)
        except Exception:  # it is not up yet
            return None

    wait_for(lambda: client() is not None, 120)
    jobs = client()
    job = submitted(jobs, entrypoint)
    wait_for(lambda: any(steps > 30 for steps in running_steps(folder)), 180)
    jobs.stop_job(job)
    wait_for(lambda: jobs.get_job_status(job).is_terminal(), 100)
    log = jobs.get_job_logs(job)
    assert jobs.get_job_status(job) == JobStatus.STOPPED and "the same command continues" in log, log
    rows = list(csv.DictReader((folder.local_path / "trials.csv").open()))
    assert rows and {row["state"] for row in rows} == {"RUNNING"}
    runs = [folder / trial_name(int(row["number"])) for row in rows]
    begun = [run for run in runs if run.read("metrics.jsonl")]  # the others had no step yet
    assert begun and all(finished(run) for run in begun)
    job = submitted(jobs, entrypoint)
    wait_for(lambda: jobs.get_job_status(job).is_terminal(), 300)
    assert jobs.get_job_status(job) == JobStatus.SUCCEEDED, jobs.get_job_logs(job)
    assert json.loads(folder.read("summary.json"))["states"]["COMPLETE"] == 2


def submitted(jobs, entrypoint: str) -> str:
    """The job's name; the agent that starts jobs answers some seconds after the dashboard."""
    found = []

    def try_it() -> bool:
        try:
            found.append(
                jobs.submit_job(entrypoint=entrypoint, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}})
            )
        except RuntimeError:
            return False
        return True

    wait_for(try_it, 60)
    return found[0]
