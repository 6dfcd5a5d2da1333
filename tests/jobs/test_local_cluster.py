"""The cluster of cluster/local.yaml: nodes that come when they are wanted and go, as on a cloud. All for real."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from hrm_ray.storage.storage import Storage
from hrm_ray.training.checkpoint import finished
from tests.toy import toy_config, toy_dataset
from tests.training.test_ray import command
from tests.tuning.test_cluster import file_of, running_steps

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(600)]
SCRIPT = Path(__file__).parents[2] / "cluster/local.sh"
SLOW = {"max_steps": 300, "epochs": 100, "checkpoint_interval": 20}


def free_port() -> int:
    """Of three that the cluster takes; below those that Ray gives to its workers."""
    for port in range(7400, 9000, 7):
        try:
            for taken in (port, port + 1, port + 1886):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", taken))
            return port
        except OSError:
            continue
    raise AssertionError("no port is free")


class Cluster:
    """A cluster that `cluster/local.sh` starts from `configuration`."""

    def __init__(self, configuration: Path | None = None):
        self.folder = Path(tempfile.mkdtemp(prefix="hrm-lc-"))
        paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
        usual = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self._env = {
            **usual,
            "PATH": ":".join(paths),
            "HRM_RAY_LOCAL": str(self.folder),
            "PORT": str(free_port()),
        }
        self.env = self._env
        try:
            self.said = self._call("up", *([str(configuration)] if configuration else []))
        except subprocess.CalledProcessError as error:
            raise AssertionError(f"{error.stderr}{(self.folder / 'log').read_text()}") from error
        self.group = int((self.folder / "pid").read_text())
        named = re.findall(r"(\w+)=(\S+)", (self.folder / "env").read_text())
        self.env = {**self._env, **dict(named)}

    def _call(self, *words: str) -> str:
        done = subprocess.run(
            [SCRIPT, *words], env=self._env, capture_output=True, text=True, timeout=100, check=True
        )
        return done.stdout

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if os.getpgid(process.pid) == self.group and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        return found

    def workers(self) -> list[psutil.Process]:
        """The nodes but the head, oldest first; each is what Ray calls a raylet."""
        raylets = []
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):  # it may end meanwhile
                if process.name() == "raylet" and "--head" not in process.cmdline():
                    raylets.append((process.create_time(), process))
        return [process for _, process in sorted(raylets, key=lambda pair: pair[0])]

    def at_work(self, actor: str) -> psutil.Process:
        """The newest of the workers on which there is an actor of that name."""
        for raylet in reversed(self.workers()):
            with suppress(psutil.NoSuchProcess):
                if any(f"ray::{actor}" in " ".join(child.cmdline()) for child in raylet.children()):
                    return raylet
        raise AssertionError(f"no node has a {actor}")

    def wait_for_workers(self, count: int, timeout: float = 120) -> None:
        wait_until(
            lambda: len(self.workers()) == count, f"{count} workers, there are {len(self.workers())}", timeout
        )

    def start(self, *words: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "hrm_ray", *words],
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *words: str) -> tuple[int, str]:
        process = self.start(*words)
        said = process.communicate(timeout=400)[0]
        return process.returncode, said

    def end(self) -> None:
        self._call("down")


def wait_until(condition, what: str, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"in vain for {what}"
        time.sleep(0.3)


@pytest.fixture(scope="module")
def cluster():
    found = Cluster()
    yield found
    found.end()
    assert not found.processes() and not found.folder.exists()


def training(tmp_path: Path, *more: str, **keys) -> tuple[list[str], Storage]:
    """The words of a training, and its run."""
    if not (tmp_path / "data").exists():
        toy_dataset(tmp_path / "data")
    config = toy_config(tmp_path / "data", tmp_path / "runs", **{**SLOW, **keys})
    return command(config, "scaling.num_workers=2", *more)[3:], Storage(str(tmp_path / "runs")) / config[
        "run_name"
    ]


def test_nodes_come_for_a_training_and_a_sweep_and_go(cluster, tmp_path):
    assert "without workers yet" in cluster.said
    cluster.wait_for_workers(0)
    words, run = training(tmp_path, max_steps=20)
    code, said = cluster.run(*words)
    assert code == 0, said
    assert "waiting for 2 x (1 CPU): the cluster has room for 0 now; it has 1 node (no CPU)" in said
    assert finished(run)[-1].manifest.world_size == 2
    cluster.wait_for_workers(0)

    file, _ = file_of(tmp_path / "sweep", num_trials=4, train={"max_steps": 20})
    sweep = cluster.start("tune", str(file))
    cluster.wait_for_workers(2)
    said = sweep.communicate(timeout=300)[0]
    assert sweep.returncode == 0 and "4 of 4 trials: 4 complete" in said, said
    cluster.wait_for_workers(0)


def test_a_run_that_is_stopped_while_it_waits_gives_its_nodes_back(cluster, tmp_path):
    cluster.wait_for_workers(0)
    words, _ = training(tmp_path)
    process = cluster.start(*words)
    cluster.wait_for_workers(1)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=30)[0]
    assert process.returncode == 143 and "stopped at step 0" in said, said
    cluster.wait_for_workers(0, timeout=60)  # Ray would have kept them for 180 s


def test_what_can_never_fit_is_said_at_once(cluster, tmp_path):
    words, _ = training(tmp_path, "scaling.num_workers=3")
    code, said = cluster.run(*words)
    assert code == 2 and "needs 3 x (1 CPU), each on one node, the cluster can have room for 2" in said, said
    words, _ = training(tmp_path, "scaling.use_gpu=true", device="auto")
    code, said = cluster.run(*words)
    assert code == 2 and "scaling.use_gpu=true needs a GPU" in said and "the cluster can have 0" in said, said
    file, _ = file_of(tmp_path / "sweep", resources={"num_workers": 1, "cpus": 2})
    code, said = cluster.run("tune", str(file))
    assert code == 2 and "a trial needs 2 CPU, the cluster has no room for that" in said, said


def test_doctor_says_what_there_is_and_what_fits(cluster, tmp_path):
    cluster.wait_for_workers(0)
    code, said = cluster.run("doctor", "experiment=sudoku_4x4", "scaling.num_workers=2")
    assert code == 0, said
    rows = dict(re.findall(r"^(\S.*?) {2,}(.*)$", said, re.MULTILINE))
    assert rows["cluster"] == cluster.env["RAY_ADDRESS"]
    assert rows["nodes"] == "1 (no CPU), free: no CPU" and rows["can grow by"] == "2 x cpu (1 CPU)"
    assert rows["training takes"] == "2 x (1 CPU)"  # not what an empty cluster has
    assert rows["fits"] == "0 workers now, 2 when it has grown: it will wait for room"
    address = cluster.env["RAY_API_SERVER_ADDRESS"]
    code, said = cluster.run("doctor", "--address", address, "sudoku_4x4_lr", "resources.cpus=7")
    assert code == 2 and "a trial needs 7 CPU, the cluster has no room for that" in said, said


def test_two_jobs_share_the_cluster(cluster, tmp_path):
    """There is room for one of them: the second says that it waits, and runs when the first is stopped."""
    never = {"checkpoint_interval": None, "eval_interval": 10**6}  # no checkpoint but that of the stop
    words, first_run = training(tmp_path / "a", max_steps=50000, epochs=10000, **never)
    first = cluster.start("submit", "--name", "first", "--", *words)
    wait_until(lambda: first_run.read("metrics.jsonl"), "a record", 200)
    assert not finished(first_run)
    words, second_run = training(tmp_path / "b", max_steps=20)
    second = cluster.start("submit", "--", *words)
    lines = []
    for line in second.stdout:
        lines.append(line)
        if "the cluster has room for 2, others have taken 2" in line:
            code, said = cluster.run("submit", "--stop", "first")
            assert code == 0, said
            break
    assert first.wait(60) == 143, first.stdout.read()
    said = "".join(lines) + second.communicate(timeout=300)[0]
    assert second.returncode == 0, said
    assert finished(second_run)[-1].manifest.global_step == 20
    (stopped,) = finished(first_run)
    records = [json.loads(line) for line in first_run.read("metrics.jsonl").splitlines()]
    assert stopped.manifest.global_step >= records[-1]["global_step"] > 0


@pytest.fixture
def larger_cluster(tmp_path):
    """With a node more than the tests want, to stand in for one that is lost."""
    configuration = yaml.safe_load((SCRIPT.parent / "local.yaml").read_text())
    configuration["max_workers"] = configuration["available_node_types"]["cpu"]["max_workers"] = 3
    file = tmp_path / "larger.yaml"
    file.write_text(yaml.safe_dump(configuration))
    found = Cluster(file)
    yield found
    found.end()
    assert not found.processes()


def test_a_lost_node_is_replaced(larger_cluster, tmp_path):
    """In the middle of a training, then of a sweep; no step counts twice, no trial as failed."""
    cluster = larger_cluster
    words, run = training(
        tmp_path, max_steps=50000, epochs=10000, eval_interval=10**6
    )  # it cannot end before
    process = cluster.start(*words)
    wait_until(lambda: len(finished(run)) > 0, "a checkpoint", 200)
    cluster.at_work("RayTrainWorker").kill()
    said = ""
    for line in process.stdout:
        said += line
        if "workers were lost or added" in line:
            break
    assert "workers were lost or added" in said, said
    before = finished(run)[-1].manifest.global_step
    wait_until(lambda: finished(run)[-1].manifest.global_step > before, "a later checkpoint", 200)
    process.send_signal(signal.SIGTERM)
    said += process.communicate(timeout=60)[0]
    assert process.returncode == 143, said
    steps = [json.loads(line)["global_step"] for line in run.read("metrics.jsonl").splitlines()]
    assert steps == sorted(set(steps))
    stopped = finished(run)[-1].manifest.global_step
    code, said = cluster.run(*words, f"max_steps={stopped + 20}")  # the same run, to an end that it can reach
    assert code == 0, said
    assert finished(run)[-1].manifest.global_step == stopped + 20

    file, folder = file_of(tmp_path / "sweep", num_trials=3, train={**SLOW, "failure.max_failures": 0})
    process = cluster.start("tune", str(file))
    wait_until(lambda: max(running_steps(folder), default=0) > 20, "a trial at work", 300)
    cluster.at_work("Trial").kill()
    said = process.communicate(timeout=400)[0]
    assert process.returncode == 0 and "3 of 3 trials: 3 complete" in said, said


def test_up_and_down_say_what_is_wrong(cluster, tmp_path):
    again = subprocess.run([SCRIPT, "up"], env=cluster._env, capture_output=True, text=True)
    assert again.returncode == 2 and "it is up already; source " in again.stderr
    nowhere = {**cluster._env, "HRM_RAY_LOCAL": str(tmp_path / "other")}
    down = subprocess.run([SCRIPT, "down"], env=nowhere, capture_output=True, text=True)
    assert (down.returncode, down.stdout) == (0, "it is not up\n")
    (tmp_path / "file").touch()
    bad = {**nowhere, "HRM_RAY_LOCAL": str(tmp_path / "file")}
    up = subprocess.run([SCRIPT, "up"], env=bad, capture_output=True, text=True)
    assert up.returncode == 2 and "is no folder of yours" in up.stderr
    taken = subprocess.run([SCRIPT, "up"], env=nowhere, capture_output=True, text=True, timeout=100)
    assert taken.returncode == 2 and "it did not start" in taken.stderr
    shutil.rmtree(tmp_path / "other")
