"""A cluster of several nodes on this machine, which come and go as machines do.

Each node is a `ray start` in a session of its own; everything that runs on it stays in that session. So losing the
node is SIGKILL to all of the session at once, the workers with it, as when a machine is switched off.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import ray.util

from tests.faults.runs import ENVIRONMENT
from tests.faults.sessions import kill_sessions, processes_of


class Nodes:
    """A head without CPUs for workers and some nodes with one each. Leaving its context ends them all.

    Args:
        root: for Ray's files; a short path, since sockets are made there.
    """

    def __init__(self, root: Path):
        self._root = root
        root.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.address = f"{ray.util.get_node_ip_address()}:{self._port}"
        self._head: subprocess.Popen | None = None
        self.others: list[subprocess.Popen] = []

    def __enter__(self) -> "Nodes":
        self._head = self._start(
            "--head", f"--port={self._port}", "--num-cpus=0", f"--temp-dir={self._root / 'ray'}"
        )
        return self

    def __exit__(self, *error: object) -> None:
        kill_sessions([p.pid for p in self._all()])
        for process in self._all():
            process.wait()

    def _all(self) -> list[subprocess.Popen]:
        return [*self.others, *([self._head] if self._head else [])]

    def add(self) -> None:
        """One more node, with one CPU."""
        self.others.append(self._start(f"--address={self.address}", "--num-cpus=1"))

    def lose(self, index: int) -> None:
        """SIGKILL to all that runs on one of the `others`."""
        node = self.others.pop(index)
        kill_sessions([node.pid])
        node.wait()

    def processes(self) -> list[psutil.Process]:
        """Every living process of the cluster."""
        return [process for process, _ in processes_of({p.pid for p in self._all()})]

    def _start(self, *words: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        ports = ["--node-manager-port=0", "--object-manager-port=0", "--object-store-memory=100000000"]
        with (self._root / "nodes.txt").open("a") as log:
            return subprocess.Popen(
                [*command, *ports, *words],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ENVIRONMENT, "RAY_TMPDIR": str(self._root)},
                start_new_session=True,
            )
