"""Processes by the session they run in: what a command started stays in its session, also when its parent dies."""

import os
import time
from collections.abc import Collection, Iterator
from contextlib import suppress

import psutil

POLL_S = 0.01
ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONFAULTHANDLER": "1",  # says where a process was that aborts
}


class Lost(Exception):
    """A run did not do what it must; says what was awaited and what the command printed last."""


def processes_of(sessions: Collection[int]) -> Iterator[tuple[psutil.Process, int]]:
    """The living processes of `sessions`, and the session of each."""
    for pid in psutil.pids():
        with suppress(ProcessLookupError, PermissionError, psutil.NoSuchProcess):
            session = os.getsid(pid)
            if session in sessions and is_alive(process := psutil.Process(pid)):
                yield process, session


def kill_sessions(sessions: Collection[int], timeout_s: float = 30) -> None:
    """SIGKILL to all processes of `sessions` at once; returns when none is left.

    They are stopped first: else one that dies a moment later could tell of the death of another.
    """
    deadline = time.monotonic() + timeout_s
    while living := [process for process, _ in processes_of(sessions)]:
        for signal_to in (psutil.Process.suspend, psutil.Process.kill):
            for process in living:
                with suppress(psutil.NoSuchProcess):
                    signal_to(process)
        if time.monotonic() > deadline:
            raise Lost(f"processes outlive SIGKILL: {living}")
        time.sleep(POLL_S)


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs or is stopped; a zombie does not live."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def title(process: psutil.Process) -> str:
    """Its command line, or what it calls itself."""
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""
