"""A real run to hurt: the command a user gives, in a session of its own, and what can be seen of it from outside.

Everything a command starts (its private cluster, the workers) stays in its session. So the processes of a run are
those of its sessions, and no others are ever touched.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.faults.nodes import Nodes
from tests.faults.sessions import ENVIRONMENT, POLL_S, Lost, kill_sessions, processes_of, title
from tests.toy import ARCH, toy_dataset

STEPS_FOR_A_FAULT = 120
WIDTH = 128  # of the model: more than 1 MiB of weights, so that several workers sum gradients in more than one bucket


@dataclass(frozen=True)
class Setting:
    """What a run computes; runs of equal settings must end alike. A step takes some 30 ms of a CPU.

    Attributes:
        max_workers: with it the run is elastic, on a cluster of as many nodes with one CPU each.
        more: keys of the configuration and their values.
    """

    num_workers: int = 1
    max_workers: int | None = None
    max_steps: int = 1000
    checkpoint_interval: int = 10
    eval_interval: int = 4  # epochs, of 16 steps
    max_failures: int = 1000
    watchdog_s: float = 8
    more: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        most = f" to {self.max_workers}" if self.max_workers else ""
        return f"{self.num_workers}{most} worker(s)"

    def words(self, data: Path, storage: Path) -> list[str]:
        """What follows `hrm-ray train`."""
        arch = {**ARCH, "hidden_size": WIDTH, "puzzle_emb_ndim": WIDTH}
        values = {
            "data_path": data,
            "storage": storage,
            "run_name": "run",
            "global_batch_size": 16,
            "epochs": 1000,
            "max_steps": self.max_steps,
            "eval_interval": self.eval_interval,
            "checkpoint_interval": self.checkpoint_interval,
            "log_interval": 1,
            "lr": 1e-3,
            "lr_warmup_steps": 20,
            "ema": "true",
            "device": "cpu",
            "forward_dtype": "float32",
            "tensorboard": "false",
            "failure.max_failures": self.max_failures,
            "watchdog_s": self.watchdog_s,
            "scaling": "ray",
            "scaling.num_workers": (
                f"[{self.num_workers},{self.max_workers}]" if self.max_workers else self.num_workers
            ),
            "scaling.cpus_per_worker": 1,
            **{f"arch.{key}": value for key, value in arch.items()},
            **dict(self.more),
        }
        return [f"{key}={value}" for key, value in values.items()]


def make_dataset(folder: Path) -> Path:
    """The toy puzzles of all runs: 16 steps an epoch, an evaluation of 12 batches."""
    if not folder.exists():
        toy_dataset(folder, num_train=256, num_test=192, num_identifiers=5)
    return folder


class Run:
    """A run and the commands given for it. Leaving its context ends every process it has started.

    Args:
        setting: what to compute.
        root: a folder for the run, its log and Ray's files; a short path, since sockets are made there.
        data: the dataset.
    """

    def __init__(self, setting: Setting, root: Path, data: Path):
        self.setting = setting
        self.folder = root / "runs" / "run"
        self.log = root / "log.txt"
        self._command = [sys.executable, "-m", "hrm_ray.cli", "train", *setting.words(data, root / "runs")]
        self._environment = {
            **os.environ,
            **ENVIRONMENT,
            "RAY_TMPDIR": str(root),
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        self.nodes = Nodes(root / "cluster")
        self._sessions: list[int] = []
        self.driver: subprocess.Popen | None = None
        root.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "Run":
        if self.setting.max_workers:
            self.nodes.start()
            while len(self.nodes.others) < self.setting.max_workers:
                self.nodes.add()
            self._environment["RAY_ADDRESS"] = self.nodes.address
        return self

    def __exit__(self, *error: object) -> None:
        self.kill_all()
        self.nodes.end()

    # processes

    def start(self) -> None:
        """Give the command, once more if need be."""
        assert self.driver is None or self.driver.poll() is not None, "the command is still running"
        with self.log.open("a") as log:
            self.driver = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
        self._sessions.append(self.driver.pid)

    def processes(self) -> list[psutil.Process]:
        """Every living process of this run."""
        living = list(processes_of(self._sessions))
        latest = self.driver.pid if self.driver else None
        found = {session for _, session in living}
        self._sessions = [s for s in self._sessions if s in found or s == latest]  # a pid may come again
        return [process for process, _ in living]

    def workers(self) -> list[psutil.Process]:
        """The workers that train, in the order of their making."""
        workers = [p for p in self.processes() if "RayTrainWorker" in title(p)]
        return sorted(workers, key=lambda p: (p.create_time(), p.pid))

    def signal_driver(self, number: int, *, group: bool = False) -> None:
        """To the driver, or to its process group as Ctrl-C does."""
        assert self.driver is not None
        (os.killpg if group else os.kill)(self.driver.pid, number)

    def kill_all(self) -> None:
        """SIGKILL to every process of the run at once; returns when none is left."""
        kill_sessions(self._sessions)
        if self.driver is not None:
            self.driver.wait()

    # waiting

    def wait_for(
        self, condition: Callable[[], Any], what: str, *, timeout_s: float = 120, poll_s: float = POLL_S
    ) -> Any:
        """The first true value of `condition`. Raises Lost if the command ends first, or nothing comes."""
        deadline = time.monotonic() + timeout_s
        while not (value := condition()):
            if self.has_ended:
                if value := condition():
                    return value
                raise Lost(
                    f"the command ended with {self._exit_code()} instead of {what}\n{self.last_words()}"
                )
            if time.monotonic() > deadline:
                raise Lost(f"waited {timeout_s:.0f} s for {what}\n{self.last_words()}")
            time.sleep(poll_s)
        return value

    def wait_for_exit(self, timeout_s: float = 120) -> int:
        """The exit code of the command."""
        assert self.driver is not None
        try:
            return self.driver.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise Lost(f"the command still runs after {timeout_s:.0f} s\n{self.last_words()}") from None

    @property
    def has_ended(self) -> bool:
        """Whether no command is running."""
        return self._exit_code() is not None

    def _exit_code(self) -> int | None:
        return self.driver.poll() if self.driver else None

    def last_words(self) -> str:
        """The end of what the command printed."""
        lines = self.log.read_text(errors="replace").replace("\r", "\n").splitlines()
        return "\n".join(line[-300:] for line in lines[-12:])

    # what the run has written

    def last_record(self) -> dict[str, Any]:
        """The newest whole record; its global_step is 0 before the first."""
        try:
            with (self.folder / "metrics.jsonl").open("rb") as stream:
                stream.seek(max(0, stream.seek(0, os.SEEK_END) - 8192))
                whole = stream.read().rpartition(b"\n")[0].splitlines()
        except FileNotFoundError:
            whole = []
        return json.loads(whole[-1]) if whole else {"global_step": 0}

    def last_step(self) -> int:
        return self.last_record()["global_step"]

    def events(self, kind: str) -> list[dict[str, Any]]:
        """What has happened to the run, of one kind: the whole lines of events.jsonl."""
        try:
            lines = (self.folder / "events.jsonl").read_text().rpartition("\n")[0].splitlines()
        except FileNotFoundError:
            return []
        return [event for event in map(json.loads, lines) if event["event"] == kind]

    def starts(self) -> list[dict[str, Any]]:
        """Every time that workers began or went on."""
        return self.events("started")

    def checkpoints(self) -> list[Path]:
        """The folders of the checkpoints, oldest first, finished or not."""
        with suppress(FileNotFoundError):
            return sorted(p for p in (self.folder / "checkpoints").iterdir() if p.name.startswith("step-"))
        return []

    def finished_checkpoints(self) -> list[Path]:
        return [p for p in self.checkpoints() if is_finished(p)]

    def checkpoint(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step-{step:08d}"

    @property
    def ends_soon(self) -> bool:
        """Whether too little is left for another fault: some steps, an evaluation to wait for, a last checkpoint."""
        return self.last_step() > self.setting.max_steps - STEPS_FOR_A_FAULT


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def is_finished(checkpoint: Path) -> bool:
    return (checkpoint / "manifest.json").exists()


def interrupt_on_signals() -> None:
    """SIGTERM to this process unwinds it like Ctrl-C, so that contexts end what they started.

    And Ctrl-C does, also in a background job, which is started with SIGINT ignored: else its children would be too,
    until they handle it, and a fault that they are to have might be none.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
