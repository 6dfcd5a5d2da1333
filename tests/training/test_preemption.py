"""A stop that comes from outside the terminal: `ray job stop`, and nodes that the cloud takes away."""

import contextlib
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hrm_ray.config.schema import TrainConfig
from hrm_ray.training.checkpoint import finished
from hrm_ray.training.driver import run_folder
from tests.toy import toy_config, toy_dataset
from tests.training.test_ray import command

pytestmark = pytest.mark.ray


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def head(tmp_path: Path):
    """A Ray head with a dashboard on loopback, as one that jobs are submitted to; its dashboard's address."""
    port, agent_port = _free_port(), _free_port()
    words = ["start", "--head", "--block", "--num-cpus=2", "--port=0", "--dashboard-host=127.0.0.1"]
    words += [f"--dashboard-port={port}", "--node-manager-port=0", "--object-manager-port=0"]
    # Other clusters on this machine have the agent's usual port, and without its own it runs no jobs.
    words += [f"--dashboard-agent-listen-port={agent_port}", "--disable-usage-stats"]
    # How long a stopped job may take; Ray reads it where the head starts (3 s unless told).
    environment = {**os.environ, "RAY_JOB_STOP_WAIT_TIME_S": "60"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # jobs call `python`
    with (tmp_path / "head.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", *words], env=environment, stdout=log, stderr=log
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        family = [process, *psutil.Process(process.pid).children(recursive=True)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()


def _wait_for(condition, what: str, timeout_s: float = 120):
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"no {what} in {timeout_s} s"
        time.sleep(0.1)
    return value


@pytest.mark.long  # and `test_the_life_of_a_job` stops one too
def test_ray_job_stop_ends_with_a_checkpoint_and_the_same_job_continues(tmp_path, head):
    from ray.job_submission import JobStatus, JobSubmissionClient

    toy_dataset(tmp_path / "data", num_identifiers=5)
    config = toy_config(
        tmp_path / "data",
        tmp_path / "runs",
        epochs=4000,
        max_steps=25_000,
        eval_interval=None,
        log_interval=1,
        checkpoint_interval_s=None,
    )
    run = run_folder(TrainConfig(**config))

    def client():
        try:
            return JobSubmissionClient(head)
        except ConnectionError:
            return None

    jobs = _wait_for(client, "dashboard")

    def submit(values: dict) -> str:
        words = command(values, "scaling=ray", "scaling.num_workers=1")
        entrypoint = " ".join(map(shlex.quote, words))
        environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}}

        def submitted():
            try:
                return jobs.submit_job(entrypoint=entrypoint, runtime_env=environment)
            except RuntimeError as error:  # the dashboard is there before what runs jobs
                assert "No available agent" in str(error)

        return _wait_for(submitted, "agent that runs jobs")

    def has_ended(job: str) -> bool:
        return jobs.get_job_status(job).is_terminal()

    job = submit(config)
    _wait_for(lambda: run.read("metrics.jsonl") or has_ended(job), "step")
    assert not has_ended(job), jobs.get_job_logs(job)
    jobs.stop_job(job)
    _wait_for(lambda: has_ended(job), "end")
    assert "the same command continues" in jobs.get_job_logs(job)
    step = finished(run)[-1].manifest.global_step
    records = [json.loads(line) for line in run.read("metrics.jsonl").decode().splitlines()]
    assert records[-1]["global_step"] == step  # not a step is lost
    again = submit(config | {"max_steps": step + 3})
    _wait_for(lambda: has_ended(again), "end")
    assert jobs.get_job_status(again) == JobStatus.SUCCEEDED, jobs.get_job_logs(again)
    assert finished(run)[-1].manifest.global_step == step + 3
