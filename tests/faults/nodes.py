"""A cluster of several nodes on this machine, which come and go as machines do.

Each node is a `ray start` in a session of its own; everything that runs on it stays in that session. So losing the
node is SIGKILL to all of the session at once, the workers with it, as when a machine is switched off.
"""

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray.util
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from ray.core.generated.gcs_pb2 import GcsNodeInfo

from tests.faults.sessions import ENVIRONMENT, Lost, kill_sessions, processes_of

START_TIMEOUT_S = 90


@dataclass(frozen=True)
class Node:
    """A node beside the head: its `ray start`, and the name that Ray has given it."""

    process: subprocess.Popen
    identity: str


class Nodes:
    """A head without CPUs for workers and some nodes with one each; none before `start`.

    Args:
        root: for Ray's files; a short path, since sockets are made there.
    """

    def __init__(self, root: Path):
        self._root = root
        self.address = ""
        self._processes: list[subprocess.Popen] = []
        self._gcs: Any = None
        self.others: list[Node] = []

    def start(self) -> None:
        """The head; returns when it answers."""
        self._root.mkdir(parents=True)
        os.environ["RAY_AUTH_MODE"] = ENVIRONMENT["RAY_AUTH_MODE"]  # for our questions to the head
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"{ray.util.get_node_ip_address()}:{port}"
        try:
            self._start(
                "--head",
                f"--port={port}",
                "--num-cpus=0",
                "--include-dashboard=false",
                f"--temp-dir={self._root / 'ray'}",
            )
            self._gcs = GcsClient(address=self.address)
            self._wait_for_one_more(set())
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """SIGKILL to all that runs on any node."""
        kill_sessions([p.pid for p in self._processes])
        for process in self._processes:
            process.wait()

    def add(self, hides: Path | None = None) -> Node:
        """One more node, with one CPU; returns when Ray knows it.

        Args:
            hides: a folder that this node has not, as on a machine of its own. Only root may hide one.
        """
        before = self._living()
        process = self._start(f"--address={self.address}", "--num-cpus=1", hides=hides)
        node = Node(process, self._wait_for_one_more(before))
        self.others.append(node)
        return node

    def lose(self, node: Node) -> None:
        """SIGKILL to all that runs on one of the `others`."""
        self.others.remove(node)
        kill_sessions([node.process.pid])
        node.process.wait()

    def give_notice(self, node: Node, seconds: float) -> None:
        """Say that `node` will be taken away, as a cloud does before it takes back a spot machine."""
        accepted, why = self._gcs.drain_node(
            node.identity,
            DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
            "spot",
            int((time.time() + seconds) * 1000),
        )
        if not accepted:
            raise Lost(f"the cluster refuses the notice: {why}")

    def processes(self) -> list[psutil.Process]:
        """Every living process of the cluster."""
        return [process for process, _ in processes_of({p.pid for p in self._processes})]

    def infos(self) -> list[Any]:
        """What Ray says of the living nodes, the head too."""
        nodes = self._gcs.get_all_node_info(timeout=5)
        return [info for info in nodes.values() if info.state == GcsNodeInfo.GcsNodeState.ALIVE]

    def _living(self) -> set[str]:
        """The names of the nodes that Ray knows, the head too."""
        return {info.node_id.hex() for info in self.infos()}

    def _wait_for_one_more(self, before: set[str]) -> str:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (new := self._living() - before):
            if time.monotonic() > deadline or self._processes[-1].poll() is not None:
                raise Lost(f"no new node within {START_TIMEOUT_S} s\n{self._log.read_text()[-2000:]}")
            time.sleep(0.1)
        return new.pop()

    @property
    def _log(self) -> Path:
        return self._root / "nodes.txt"

    def _start(self, *words: str, hides: Path | None = None) -> subprocess.Popen:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        ports = ["--node-manager-port=0", "--object-manager-port=0", "--object-store-memory=100000000"]
        words = (*command, *ports, *words)
        if hides is not None:
            words = (
                "unshare",
                "--mount",
                "bash",
                "-c",
                'mount -t tmpfs none "$0" && exec "$@"',
                str(hides),
                *words,
            )
        with self._log.open("a") as log:
            process = subprocess.Popen(
                words,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={
                    **os.environ,
                    **ENVIRONMENT,
                    "RAY_TMPDIR": str(self._root),
                    "PYTHONPATH": os.pathsep.join(sys.path),
                },
                start_new_session=True,
            )
        self._processes.append(process)
        return process
