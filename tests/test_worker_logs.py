"""What is shown of the log of a worker that has failed: of texts, and of real workers that die."""

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from ray.experimental import internal_kv

from hrm_ray import worker_logs
from hrm_ray.config.schema import TrainConfig
from hrm_ray.errors import RayFailed, notes
from hrm_ray.training import launch, ray_train
from hrm_ray.training.loop import TrainingLoop
from hrm_ray.tuning import execute
from hrm_ray.tuning.sweep import run_sweep
from hrm_ray.tuning.trial import Run, Trial
from hrm_ray.tuning.view import View
from tests.toy import toy_config, toy_dataset
from tests.tuning.toy_sweep import toy_sweep

ERR = """\
:job_id:01000000
:actor_name:RayTrainWorker
printed
Setting up process group for: file:///tmp/store [rank=0, world_size=2]

a warning
a warning
*** SIGSEGV received at time=1 on cpu 1 ***
PC: @     0x7fda60b26f36  (unknown)  epoll_wait
    @     0x7fda5fcab5cd        128  boost::asio::detail::scheduler::do_run_one()
[2026-11-29 06:54:34,466 E 27702 27702] logging.cc:474: *** SIGSEGV received at time=1 on cpu 1 ***
Fatal Python error: Segmentation fault

Stack (most recent call first):
  File "a.py", line 1 in innermost
  File "a.py", line 2 in f
  File "a.py", line 3 in f
  File "a.py", line 4 in f
  File "a.py", line 5 in f
  File "a.py", line 6 in f
  File "a.py", line 7 in f
  File "a.py", line 8 in f
  File "a.py", line 9 in f
  File "a.py", line 10 in f
Extension modules: numpy, torch (total: 113)
"""
OUT = ":job_id:01000000\nprinted\nby \x1b[31mC\n"


def test_a_log_is_shown_without_what_ray_writes():
    assert worker_logs._readable(OUT, ERR) == [
        "by \\x1b[31mC",
        "printed",
        "a warning",
        "*** SIGSEGV received at time=1 on cpu 1 ***",
        "Fatal Python error: Segmentation fault",
        "Stack (most recent call first):",
        '  File "a.py", line 1 in innermost',
        *[f'  File "a.py", line {n} in f' for n in range(2, 9)],
        "  ... 2 more",
    ]


def test_of_a_long_log_the_end_is_shown():
    lines = [f"line {n}" for n in range(100)] + ["x" * 1000]
    shown = worker_logs._readable("", "\n".join(lines))
    assert shown[:-1] == lines[-worker_logs.NUM_LINES : -1] and len(shown[-1]) == worker_logs.WIDTH


def test_a_log_that_cannot_be_had_is_said(monkeypatch):
    def gone(ip, pid):
        raise ConnectionError("no dashboard\nreally")

    monkeypatch.setattr(worker_logs, "_is_here", lambda ip: False)
    monkeypatch.setattr(worker_logs, "_remote", gone)
    assert worker_logs.last_words("worker 3", "far", "10.0.0.1", 7) == (
        "worker 3 (process 7 on far): its log, among Ray's on that node, cannot be read from here (no dashboard)"
    )


def test_a_dashboard_that_hangs_holds_nobody_up(monkeypatch):
    """It takes requests, and answers none."""
    with socket.create_server(("127.0.0.1", 0)) as dashboard, ThreadPoolExecutor(1) as pool:
        address = f"127.0.0.1:{dashboard.getsockname()[1]}"
        monkeypatch.setattr(internal_kv, "_internal_kv_get", lambda *_, **__: address.encode())
        monkeypatch.setattr(worker_logs, "_is_here", lambda ip: False)
        monkeypatch.setattr(worker_logs, "ANSWER_S", 0.2)
        asked = pool.submit(dashboard.accept)
        said = worker_logs.last_words("worker 3", "far", "10.0.0.1", 7)
        asked.result()[0].close()
    assert "cannot be read from here (" in said


def test_what_takes_too_long_is_not_waited_for(monkeypatch):
    """Also where no request has a limit of its own."""
    monkeypatch.setattr(worker_logs, "ANSWER_S", 0.01)
    ends = threading.Event()
    with pytest.raises(TimeoutError, match=r"no answer in 0\.01 s"):
        worker_logs._in_time(ends.wait)
    ends.set()


# Real workers


def dies(how: str, train, *parameters):
    """`train`, in which this process ends at the fifth step; to be run in a worker."""
    take = TrainingLoop._step

    def step(self, number):
        if number == 5:
            print("out of handles", file=sys.stderr, flush=True)
            os.write(1, b"said by native code\n")
            if how == "segfault":
                ctypes.string_at(0)
            elif how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("CUDA error: misaligned address")
        return take(self, number)

    TrainingLoop._step = step
    try:
        return train(*parameters)
    finally:
        TrainingLoop._step = take  # it may serve others


WORKER, RUN = ray_train._worker, Run._trained


@pytest.fixture
def config(tmp_path: Path) -> dict:
    toy_dataset(tmp_path / "data")
    return toy_config(
        tmp_path / "data", tmp_path / "runs", scaling={"mode": "ray", "num_workers": 1, "cpus_per_worker": 1}
    )


class Listens(launch.Driver):
    """Keeps what it is to say."""

    def __init__(self, config):
        super().__init__(config)
        self.said = []

    def say(self, text):
        self.said.append(text)


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.parametrize(
    ("how", "line", "telling"),
    [
        (
            "segfault",
            "worker 0 died without an exception (killed, or a crash of native code)",
            "in string_at",
        ),
        ("raise", "CUDA error: misaligned address", "RuntimeError: CUDA error: misaligned address"),
    ],
)
def test_below_the_error_stands_what_the_worker_wrote_last(
    config, ray_cluster, monkeypatch, how, line, telling
):
    monkeypatch.setattr(ray_train, "_worker", partial(dies, how, WORKER))
    config = TrainConfig(**config | {"failure": {"max_failures": 0}})
    with pytest.raises(RayFailed) as info:
        ray_train.train_on_ray(config, launch.run_folder(config), Listens(config))
    assert str(info.value) == f"Ray Train failed: {line}; the same command continues from the last checkpoint"
    (note,) = notes(info.value)
    first, *words = note.splitlines()
    log = Path(re.fullmatch(r"worker 0 \(process \d+ on .*\) wrote last, in (/.*\.err):", first)[1])
    assert "out of handles" in log.read_text()
    assert {"  said by native code", "  out of handles"} <= set(words) and telling in note
    assert len(words) <= worker_logs.NUM_LINES and "job_id" not in note


@pytest.mark.ray
@pytest.mark.long
def test_the_log_of_a_worker_that_is_replaced_is_shown_too(config, ray_cluster, monkeypatch):
    monkeypatch.setattr(ray_train, "_worker", partial(dies, "kill", WORKER))
    config = TrainConfig(**config | {"failure": {"max_failures": 1}})
    driver = Listens(config)
    with pytest.raises(RayFailed):
        ray_train.train_on_ray(config, launch.run_folder(config), driver)
    assert driver.said[0].startswith("workers were lost or added: ")
    assert "wrote last, in " in driver.said[1] and "out of handles" in driver.said[1]


@pytest.mark.ray
@pytest.mark.long
def test_the_command_shows_it_and_the_log_of_a_private_ray_is_kept(config, tmp_path):
    program = """
        import sys
        from functools import partial
        from hrm_ray.cli import main
        from hrm_ray.training import ray_train
        from tests.test_worker_logs import dies
        ray_train._worker = partial(dies, "segfault", ray_train._worker)
        sys.exit(main(["train", *sys.argv[1:]]))
    """
    from tests.training.test_ray import command

    words = command(config, "scaling=ray", "scaling.num_workers=1", "failure.max_failures=0")[4:]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *words],
        env={**os.environ, "RAY_TMPDIR": "/tmp"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 1 and done.stdout == "", done.stderr  # Ray says nothing by itself
    error, first, *rest = done.stderr[done.stderr.index("error: ") :].splitlines()
    folder = Path(re.search(r"Ray's logs are kept in (/\S+)$", error)[1])
    log = Path(re.search(r"wrote last, in (/.*\.err):$", first)[1])
    assert log.parent == folder and "out of handles" in log.read_text() and "  out of handles" in rest


class Segfaults(Trial):
    how = "segfault"

    def step(self):  # in the trial's actor
        Run._trained = lambda run: dies(self.how, RUN, run)
        return super().step()


class Raises(Segfaults):
    how = "raise"


class Hears(View):
    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.parametrize("kind", [Segfaults, Raises])
def test_the_log_of_a_trial_that_failed_is_shown(tmp_path, ray_cluster, monkeypatch, kind):
    monkeypatch.setattr(execute, "Trial", kind)
    view = Hears()
    sweep = toy_sweep(tmp_path, num_trials=1, pruner=None, train={"failure.max_failures": 0})
    run_sweep(sweep, view=view)
    (said,) = view.said
    if kind is Raises:
        assert said.splitlines()[-1] == "RuntimeError: CUDA error: misaligned address"
    else:
        assert re.match(r"the worker of trial 0 \(process \d+ on .*\) wrote last, in /.*\.err:\n", said)
        assert "  out of handles\n" in said and "in string_at" in said
