"""Run a command as a job of a Ray cluster: hand it to the cluster's dashboard, follow what it prints, return its code.

Thin on purpose: Ray's own client talks to the dashboard. What is added: everything that would fail minutes later on the
cluster, or be lost there, is said before anything is sent.
"""

import asyncio
import logging
import os
import re
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from hrm_ray.config.validate import in_one_line
from hrm_ray.errors import RunFailed, UserError, first_line, shown
from hrm_ray.ray_session import check_token, no_token, refused

if TYPE_CHECKING:
    from ray.job_submission import JobInfo, JobSubmissionClient

DASHBOARD = "http://127.0.0.1:8265"
ANSWER_S = 5.0
AGENT_S = 30.0  # for the part of a head that starts jobs, which comes up after its dashboard
NO_AGENT = "No available agent"
STOP_WAIT_S = 120  # how long a job that is stopped may take for its checkpoint; Ray's own time is 3 s
STOPPED = 143  # the exit code of a job that was stopped
LARGEST_MB = 100  # of a working directory; Ray itself refuses 500
# What a job never needs, besides what .gitignore and .rayignore name.
EXCLUDES = [
    *(".git", ".venv", "venv", "env", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis"),
    *("/data", "/runs", "/sweeps", "/outputs", "/wandb", "/checkpoints", "/build", "/dist"),
]
COMMANDS = ("train", "tune", "data", "eval", "solve", "import-checkpoint", "export-checkpoint")
# Words whose value is a path that the job is to find on the cluster's machines.
PATHS = ("data", "data_path", "data_paths", "storage", "out")
_LEFT_OUT = [(name.removeprefix("/"),) for name in EXCLUDES if name.startswith("/")]


@dataclass(frozen=True)
class Submission:
    """A command to be run on a cluster.

    Attributes:
        words: of the command, without ``hrm-ray``.
        working_dir: is copied to the cluster; the job runs in the copy.
        env: variables of the job's environment.
        pip: a file of requirements to install there; None: what the cluster's image has.
        name: of the job; None: Ray makes one.
    """

    words: Sequence[str]
    working_dir: Path = field(default_factory=Path.cwd)
    env: Mapping[str, str] = field(default_factory=dict)
    pip: Path | None = None
    name: str | None = None


class Jobs:
    """The jobs of the cluster whose dashboard is at `address`.

    Raises:
        UserError: there is no dashboard, or it does not let us in.
    """

    def __init__(self, address: str | None = None):
        self.address = _checked_address(address or os.environ.get("RAY_API_SERVER_ADDRESS") or DASHBOARD)
        _check_answers(self.address)
        self._client = _client(self.address)

    @property
    def is_here(self) -> bool:
        """Whether the cluster's head is this machine, so that its paths are ours. A tunnel's end is not."""
        deadline = time.monotonic() + AGENT_S
        while time.monotonic() < deadline:
            try:
                nodes = self._client._do_request("GET", "/nodes?view=summary", timeout=ANSWER_S).json()
                raylets = [node["raylet"] for node in nodes["data"]["summary"]]
                names = {raylet["nodeManagerHostname"] for raylet in raylets}
                folders = [raylet["sessionDir"] for raylet in raylets]
            except Exception:  # of the client, its HTTP library, or another answer: the head is starting
                names, folders = set(), []
            if names:  # a container may have its machine's name, but not its files
                return names == {socket.gethostname()} and all(Path(folder).is_dir() for folder in folders)
            time.sleep(1)
        return False

    def submit(self, submission: Submission) -> str:
        """Start a job; returns its name.

        Raises:
            UserError: the working directory is too large, a path is on this machine only, or the cluster refuses it.
        """
        environment: dict[str, Any] = {
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), **submission.env}
        }
        if self.is_here:
            entrypoint = f"cd {shlex.quote(str(submission.working_dir.absolute()))} && exec "
            entrypoint += shlex.join([sys.executable, "-m", "hrm_ray", *submission.words])
        else:
            check_paths(submission.words)
            check_size(submission.working_dir)
            entrypoint = "exec " + shlex.join(["python", "-m", "hrm_ray", *submission.words])
            environment |= {"working_dir": str(submission.working_dir), "excludes": EXCLUDES}
        if submission.pip is not None:
            if not submission.pip.is_file():
                raise UserError(f"--pip {submission.pip}: no such file")
            environment["pip"] = str(submission.pip)
        deadline = time.monotonic() + AGENT_S
        while True:
            try:
                return self._client.submit_job(
                    entrypoint=entrypoint, runtime_env=environment, submission_id=submission.name
                )
            except Exception as error:  # of some ten kinds
                if NO_AGENT not in str(error) or time.monotonic() > deadline:
                    raise UserError(f"{self.address}: {first_line(error)}") from error
                time.sleep(1)

    def follow(self, name: str, write: Callable[[str], object] | None = None) -> int:
        """Pass on what a job prints until it ends; returns its exit code (see `code_of`).

        Raises:
            UserError: there is no such job.
            RunFailed: the connection was lost, which by itself does not harm the job; or Ray could not run it.
        """
        with in_one_line(self.address):
            self._client.get_job_info(name)
        try:
            asyncio.run(self._tail(name, write or _print))
            info = self._ended(name)
        except Exception as error:  # of the client, its HTTP library, or the network
            raise RunFailed(
                f"{self.address}: the connection was lost ({first_line(error)}); the job goes on, and --follow {name} "
                "shows it again; if the cluster's head was lost, the same submission to a new one continues"
            ) from error
        return code_of(info)

    async def _tail(self, name: str, write: Callable[[str], object]) -> None:
        async for text in self._client.tail_job_logs(name):
            write(text)

    def _ended(self, name: str) -> "JobInfo":
        """What is known of a job when it has ended."""
        while True:
            info = self._client.get_job_info(name)
            if info.status.is_terminal():
                return info
            time.sleep(0.5)

    def stop(self, name: str) -> None:
        """Ask a job to end with a checkpoint; returns when it has ended."""
        with in_one_line(self.address):
            self._client.stop_job(name)
            self._ended(name)


def _print(text: str) -> None:
    print(text, end="", flush=True)


def code_of(info: "JobInfo") -> int:
    """The exit code of a job: its command's own, `STOPPED` if it was stopped, 1 if Ray could not run it.

    Raises:
        RunFailed: Ray could not run it; with Ray's reason.
    """
    from ray.job_submission import JobStatus

    if info.status == JobStatus.SUCCEEDED:
        return 0
    if info.status == JobStatus.STOPPED:
        return STOPPED
    if info.driver_exit_code is None:
        raise RunFailed(f"the job could not be run: {_line_of(info.message)}")
    return info.driver_exit_code if info.driver_exit_code >= 0 else 128 - info.driver_exit_code


def _line_of(message: str | None) -> str:
    lines = [line.strip() for line in (message or "").splitlines() if line.strip()]
    return lines[-1] if lines else "Ray does not say why"


# Before anything is sent


def _checked_address(address: str) -> str:
    if re.fullmatch(r"(\[[\w:.%]+\]|[\w.-]+):\d+", address):
        address = f"http://{address}"
    try:
        parts = urlsplit(address)
        is_one = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of the port, or of brackets
        is_one = False
    if not is_one:
        raise UserError(
            f"--address {shown(address)}: jobs are handed to the cluster's dashboard; give http://HOST:8265"
        )
    return address.rstrip("/")


def _check_answers(address: str) -> None:
    """Raises UserError if there is no dashboard of Ray, or it does not let us in."""
    import ray
    import requests
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled
    from ray.exceptions import AuthenticationError

    named = f"--address {address}"
    check_token()
    try:
        headers = get_auth_headers_if_auth_enabled({})
    except AuthenticationError as error:
        raise no_token(named, error) from None
    try:
        answer = requests.get(f"{address}/api/version", timeout=ANSWER_S, headers=headers)
    except requests.RequestException as error:
        raise UserError(f"{named} {_no_answer(error)}") from None
    if answer.status_code in (401, 403):
        raise refused(named)
    try:
        version = answer.json()["ray_version"]
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{named} answers, but is no dashboard of Ray; give http://HOST:8265, the port of the dashboard and not "
            "that of the cluster (6379)"
        ) from None
    if version.split(".")[:2] != ray.__version__.split(".")[:2]:
        raise UserError(
            f"{named} runs ray {version}, this is ray {ray.__version__}; install one version on both"
        )


def _no_answer(error: Exception) -> str:
    """What is wrong where a request has no answer, and how to mend it."""
    import requests
    from urllib3.exceptions import ProtocolError

    if isinstance(error, requests.exceptions.SSLError):
        return "uses no TLS (then give http://), or has a certificate that is not trusted here"
    if isinstance(error, requests.ReadTimeout) or any(isinstance(arg, ProtocolError) for arg in error.args):
        return (
            "answers, but not as a dashboard does; if it is the cluster's own port (6379), give that of the dashboard, "
            "which is usually 8265: http://HOST:8265"
        )
    return (
        f"does not answer ({type(error).__name__}); start the cluster, or reach it by a tunnel: "
        "ssh -L 8265:127.0.0.1:8265 HEAD, kubectl port-forward, or ray dashboard CLUSTER.yaml"
    )


def _client(address: str) -> "JobSubmissionClient":
    from ray.job_submission import JobSubmissionClient

    for module in ("job.sdk", "dashboard_sdk"):  # which choose to be louder when they are imported
        logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.ERROR)
    instead = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # of which Ray would take one in place of `address`
    before = {name: os.environ.pop(name) for name in instead if name in os.environ}
    with in_one_line(address):
        try:
            return JobSubmissionClient(address)
        finally:
            os.environ.update(before)


def check_paths(words: Sequence[str]) -> None:
    """Raise UserError for a path that only this machine knows, or that would lie in the job's copy of the folder."""
    values = {key: value for key, equals, value in (word.partition("=") for word in words) if equals}
    paths = {key: path for key in PATHS if (path := values.get(key))}
    # What is no path here is the name of a generator, or of a data set of the hub.
    if "source" in values and Path(values["source"]).exists():
        paths["source"] = values["source"]
    # A checkpoint or a puzzle file; a YAML or a recipe of the folder is in the copy.
    paths |= {word: word for word in words[1:] if Path(word).parts[:1] in _LEFT_OUT and Path(word).exists()}
    for key, path in paths.items():
        if "://" not in path and path != "null" and not path.startswith("/"):
            named = key if key == path else f"{key}={shown(path)}"
            raise UserError(
                f"{named} is a path on this machine; give a URI (s3://BUCKET/FOLDER) or an absolute path that all "
                "machines of the cluster share"
            )
    if words[:1] in (["train"], ["tune"]) and "storage" not in values and not _says_storage(words):
        raise UserError(
            "give storage=URI or a folder that all machines of the cluster share: the default runs/ would lie in the "
            "job's own copy of this folder, and be deleted with it"
        )


def _says_storage(words: Sequence[str]) -> bool:
    """Whether a sweep's own file says where it is to lie."""
    files = [Path(word) for word in words[1:] if word.endswith((".yaml", ".yml")) and Path(word).is_file()]
    # What is no text, the reader of sweeps refuses.
    texts = (file.read_text(errors="replace") for file in files)
    return any(re.search(r"^storage:\s*\S", text, re.MULTILINE) for text in texts)


def check_size(folder: Path) -> None:
    """Raise UserError if what would be copied of `folder` is large, naming what is."""
    sizes: dict[str, int] = {}
    for file in _files(folder):
        first = file.relative_to(folder).parts[0]
        sizes[first] = sizes.get(first, 0) + file.stat().st_size
    total = sum(sizes.values())
    if total > LARGEST_MB * 10**6:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        names = ", ".join(f"{shown(name)} {sizes[name] / 1e6:.0f} MB" for name in largest)
        raise UserError(
            f"the working directory {folder} has {total / 1e6:.0f} MB to copy ({names}); name what the job does not "
            "need in .rayignore, or give another --working-dir"
        )


def _files(folder: Path) -> Iterator[Path]:
    """The files that Ray would copy."""
    from ray._private.runtime_env import packaging

    found: list[Path] = []
    packaging._dir_travel(
        folder,
        [packaging._get_excludes(folder, EXCLUDES)],
        lambda path: found.append(path) if path.is_file() else None,
        include_gitignore=True,
    )
    yield from found
