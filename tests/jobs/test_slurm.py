"""cluster/slurm.sh on a real Slurm of this machine: two nodes of one CPU, and a partition that preempts another."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hrm_ray.config.schema import TrainConfig
from hrm_ray.storage.storage import Storage
from hrm_ray.training import launch
from hrm_ray.training.checkpoint import finished
from tests.toy import toy_config, toy_dataset
from tests.training.test_ray import command

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        shutil.which("slurmctld") is None or os.geteuid() != 0, reason="needs slurm-wlm and munge, and root"
    ),
]
SCRIPT = Path(__file__).parents[2] / "cluster/slurm.sh"

CONFIG = """
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
SlurmUser=root
SlurmdUser=root
SlurmctldPort={port}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
KillWait=10
ReturnToService=2
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{node_port}-{last_port}] CPUs=1 RealMemory=4000
PartitionName=spot Nodes=n[1-2] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 State=UP
PartitionName=urgent Nodes=n[1-2] PriorityTier=10 PreemptMode=OFF State=UP
"""


def wait_for(condition, timeout_s: float = 120):
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.2)
    return value


class Slurm:
    def __init__(self, root: Path):
        self.root = root
        self.environment = {**os.environ, "SLURM_CONF": str(root / "slurm.conf")}
        # Jobs take their environment from here: our hrm-ray, and few threads.
        self.environment |= {
            "PATH": f"{root / 'bin'}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(SCRIPT.parents[1]),
        }

    def run(self, *words: str) -> str:
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, timeout=60, cwd=self.root
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, *words: str) -> str:
        return self.run("sbatch", "--parsable", *words).strip()

    def state(self, job: str) -> str:
        return self.run("scontrol", "show", "job", job, "--oneliner").partition("JobState=")[2].split()[0]


@pytest.fixture
def slurm(tmp_path):
    root = tmp_path / "slurm"
    for folder in ("state", "n1", "n2", "bin"):
        (root / folder).mkdir(parents=True)
    hrm_ray = root / "bin/hrm-ray"
    hrm_ray.write_text(f'#!/bin/sh\nexec {sys.executable} -m hrm_ray "$@"\n')
    hrm_ray.chmod(0o755)
    base = 16000 + os.getpid() % 900
    ports = {"port": base, "node_port": base + 1000, "last_port": base + 1001}
    (root / "slurm.conf").write_text(CONFIG.format(host=socket.gethostname(), root=root, **ports))
    found = Slurm(root)
    munge = Path("/run/munge/munged.pid")
    starts_munge = not munge.exists()
    if starts_munge:
        Path("/run/munge").mkdir(exist_ok=True)
        shutil.chown("/run/munge", "munge", "munge")
        subprocess.run(["runuser", "-u", "munge", "--", "munged"], check=True)
    try:
        found.run("slurmctld")
        for node in ("n1", "n2"):
            found.run("slurmd", "-N", node)
        wait_for(lambda: found.run("sinfo", "-h", "-N", "-o", "%t").split().count("idle") >= 2)
        yield found
    finally:
        subprocess.run(["scancel", "-u", "root"], env=found.environment, timeout=60)
        for file in [
            root / "slurmctld.pid",
            root / "n1.pid",
            root / "n2.pid",
            *([munge] if starts_munge else []),
        ]:
            if file.exists():
                subprocess.run(["kill", file.read_text().strip()])


def test_a_preempted_job_goes_on_and_ends_bit_equal(tmp_path, slurm):
    toy_dataset(tmp_path / "data")
    config = toy_config(tmp_path / "data", tmp_path / "runs", epochs=4000, max_steps=900, eval_interval=None)
    words = [*command(config)[4:], "scaling=local", "compile=false"]
    run = Storage(config["storage"]) / "toy"
    log = slurm.root / "out.txt"
    options = ["--gpus-per-node=0", "--cpus-per-task=1", "--time=60", f"--output={log}", "--signal=B:TERM@30"]
    job = slurm.submit(*options, "--nodelist=n1", str(SCRIPT), "train", *words)
    wait_for(lambda: (run.read("metrics.jsonl") or b"").count(b"\n") > 3)
    urgent = slurm.submit("--partition=urgent", "--nodelist=n1", "--cpus-per-task=1", "--wrap=sleep 3")
    wait_for(lambda: slurm.state(job) == "PENDING")
    step = finished(run)[-1].step
    assert 0 < step < 900 and "; the same command continues" in log.read_text()
    wait_for(lambda: slurm.state(urgent) == "COMPLETED")
    slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm lets it wait for two minutes
    wait_for(lambda: slurm.state(job) == "COMPLETED", 240)
    assert f"continues after step {step}" in log.read_text()

    undisturbed = TrainConfig(**{**config, "run_name": "undisturbed", "compile": False})
    launch.train(undisturbed, show_progress=False)
    last, expected = finished(run)[-1], finished(launch.run_folder(undisturbed))[-1]
    assert (last.step, last.manifest.files) == (expected.step, expected.manifest.files)


def test_another_exit_code_is_the_jobs_own(tmp_path, slurm):
    log = slurm.root / "out.txt"
    options = ["--gpus-per-node=0", "--cpus-per-task=1", f"--output={log}"]
    job = slurm.submit(*options, str(SCRIPT), "train", "data=nowhere", "lr=x")
    wait_for(lambda: slurm.state(job) == "FAILED")
    assert "error: configuration: lr='x'" in log.read_text()
    assert "ExitCode=2:0" in slurm.run("scontrol", "show", "job", job, "--oneliner")


def test_a_user_stops_a_job_with_a_checkpoint_and_it_stays_stopped(tmp_path, slurm):
    toy_dataset(tmp_path / "data")
    config = toy_config(tmp_path / "data", tmp_path / "runs", epochs=4000, max_steps=9000, eval_interval=None)
    words = [*command(config)[4:], "scaling=local", "compile=false"]
    run = Storage(config["storage"]) / "toy"
    log = slurm.root / "out.txt"
    options = ["--gpus-per-node=0", "--cpus-per-task=1", "--time=60", f"--output={log}"]
    job = slurm.submit(*options, str(SCRIPT), "train", *words)
    wait_for(lambda: (run.read("metrics.jsonl") or b"").count(b"\n") > 3)
    slurm.run("scancel", "--signal=USR1", "--batch", job)
    wait_for(lambda: slurm.state(job) == "FAILED")  # Slurm's word for any exit code but 0
    about = slurm.run("scontrol", "show", "job", job, "--oneliner")
    assert "ExitCode=143:0" in about and "Restarts=0" in about
    assert 0 < finished(run)[-1].step < 9000 and "; the same command continues" in log.read_text()
    assert "back into the queue" not in log.read_text()
