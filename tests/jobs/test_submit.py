"""Commands as jobs of a cluster: what is said before they are sent, their output and their exit codes."""

import json
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import grpc
import psutil
import pytest
import ray
from ray.job_submission import JobStatus

from hrm_ray.cli import main
from hrm_ray.errors import RunFailed, UserError
from hrm_ray.jobs import submit
from hrm_ray.jobs.submit import Jobs, Submission, check_paths, check_size, code_of
from hrm_ray.storage.storage import Storage
from hrm_ray.training.checkpoint import finished
from tests.toy import toy_config, toy_dataset
from tests.training.test_preemption import head  # noqa: F401 - a fixture
from tests.training.test_ray import command

# Before anything is sent


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["train", "data=data/x", "storage=s3://b/runs"],
            "data=data/x is a path on this machine; give a URI",
        ),
        (["train", "data=s3://b/d", "storage=runs"], "storage=runs is a path on this machine"),
        (["train", "data=s3://b/d"], "give storage=URI or a folder that all machines"),
        (["tune", "sudoku_4x4_lr"], "give storage=URI"),
        (["eval", "runs/x", "data=s3://b/d"], "runs/x is a path on this machine"),
        (
            ["data", "build", "recipe=sudoku_9x9", "source=tests", "out=s3://b/d"],
            "source=tests is a path on this",
        ),
        (["data", "build", "recipe=sudoku_4x4", "out=data/x"], "out=data/x is a path on this machine"),
    ],
)
def test_paths_that_only_this_machine_has(words, said, tmp_path, monkeypatch):
    (tmp_path / "runs/x").mkdir(parents=True)
    (tmp_path / "tests").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        check_paths(words)


@pytest.mark.parametrize(
    "words",
    [
        ["train", "data=s3://b/d", "storage=/shared/runs"],
        ["data", "build", "recipe=sudoku_4x4", "out=s3://b/d"],
        ["data", "build", "recipe=sudoku_9x9", "source=sapientinc/sudoku-extreme", "out=s3://b/d"],
        ["eval", "s3://b/runs/x", "data=/shared/d"],
        ["tune", "{tmp}/mine.yaml"],
        ["tune", "{tmp}/latin-1.yaml"],
    ],
)
def test_paths_that_all_machines_have(words, tmp_path):
    sweep = "train: experiment=sudoku_4x4\nstorage: s3://b/sweeps\n"
    (tmp_path / "mine.yaml").write_text(sweep)
    (tmp_path / "latin-1.yaml").write_bytes(f"# Zürich\n{sweep}".encode("latin-1"))
    check_paths([word.format(tmp=tmp_path) for word in words])


def test_a_large_working_directory_is_named_with_what_is_large_in_it(tmp_path):
    for name, megabytes in (
        ("notes.bin", 80),
        ("data/x", 900),
        (".venv/x", 900),
        ("more/y", 30),
        ("a.py", 0),
    ):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        with file.open("wb") as content:
            content.truncate(megabytes * 10**6)
    with pytest.raises(
        UserError, match=r"has 110 MB to copy \(notes\.bin 80 MB, more 30 MB, a\.py 0 MB\); name"
    ):
        check_size(tmp_path)
    (tmp_path / ".rayignore").write_text("notes.bin\n")
    check_size(tmp_path)


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (JobStatus.SUCCEEDED, 0, 0),
        (JobStatus.FAILED, 2, 2),
        (JobStatus.FAILED, 1, 1),
        (JobStatus.FAILED, 143, 143),
        (JobStatus.FAILED, -9, 137),
        (JobStatus.STOPPED, None, 143),
    ],
)
def test_codes(status, code, expected):
    assert code_of(SimpleNamespace(status=status, driver_exit_code=code, message="")) == expected


def test_a_job_that_ray_could_not_run():
    info = SimpleNamespace(status=JobStatus.FAILED, driver_exit_code=None, message="failed:\n no room \n\n")
    with pytest.raises(RunFailed, match=r"the job could not be run: no room$"):
        code_of(info)


class Web(BaseHTTPRequestHandler):
    status, content = 200, b"<html>"

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def answering():
    """The address of a server, as a function of what it answers to every question."""
    servers = []

    def start(status: int, content: bytes) -> str:
        server = HTTPServer(("127.0.0.1", 0), type("Answers", (Web,), {"status": status, "content": content}))
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "content", "said"),
    [
        (200, b"<html>", "answers, but is no dashboard of Ray; give http://HOST:8265"),
        (404, b"", "answers, but is no dashboard of Ray"),
        (401, b"", "asks for a token: set RAY_AUTH_MODE=token and the cluster's token"),
        (200, b'{"ray_version": "2.9.3"}', r"runs ray 2\.9\.3, this is ray 2\.\d+\.\d+; install one version"),
    ],
)
def test_what_is_no_dashboard_for_us(status, content, said, answering):
    with pytest.raises(UserError, match=said) as info:
        Jobs(answering(status, content).removeprefix("http://"))
    assert "\n" not in str(info.value)


TOKENS = [
    ({"RAY_AUTH_MODE": "disabled"}, "asks for a token: set RAY_AUTH_MODE=token and the cluster's token"),
    ({"RAY_AUTH_TOKEN": "wrong"}, "refuses our token: set the cluster's token"),
    (
        {"RAY_AUTH_TOKEN_PATH": "/no/such"},
        "RAY_AUTH_TOKEN_PATH is set but .* /no/such; set RAY_AUTH_TOKEN to",
    ),
    ({"HOME": "{tmp}"}, "couldn't find an authentication token; set RAY_AUTH_TOKEN to the cluster's token"),
]


@pytest.mark.parametrize(("variables", "said"), TOKENS)
def test_tokens(variables, said, tmp_path, answering):
    done = submitted("--address", answering(403, b""), "--", "train", env=with_token(variables, tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert re.match(rf"error: --address http://127\.0\.0\.1:\d+:? .*{said}", line), line


def with_token(variables: dict[str, str], home: Path) -> dict[str, str]:
    """An environment with the token of `variables`, and no other."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
    return {**ours, "RAY_AUTH_MODE": "token", **{k: v.format(tmp=home) for k, v in variables.items()}}


def submitted(*words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    hrm_ray = [sys.executable, "-m", "hrm_ray", "submit"]
    return subprocess.run([*hrm_ray, *words], capture_output=True, text=True, timeout=240, env=env)


def test_a_server_that_is_silent(monkeypatch):
    monkeypatch.setattr(submit, "ANSWER_S", 0.2)
    said = "answers, but not as a dashboard does; if it is the cluster's own port"
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(UserError, match=said):
        Jobs(f"127.0.0.1:{server.getsockname()[1]}")


def test_the_port_of_the_cluster_itself():
    """Which speaks gRPC."""
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(UserError, match=r"give that of the dashboard, .* 8265: http://HOST:8265"):
            Jobs(f"127.0.0.1:{port}")
    finally:
        server.stop(None)


def test_https_where_there_is_no_tls(answering):
    with pytest.raises(UserError, match=r"uses no TLS \(then give http://\)"):
        Jobs(answering(200, b"").replace("http", "https"))


def test_the_address_that_is_given_is_the_one_that_is_asked(answering, monkeypatch):
    """Ray's own client would ask the one in the environment."""
    given = answering(200, json.dumps({"ray_version": ray.__version__}).encode())
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    assert Jobs(given)._client._address == given
    assert os.environ["RAY_API_SERVER_ADDRESS"] == "http://127.0.0.1:9"
    assert os.environ["RAY_ADDRESS"] == "127.0.0.1:9"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--address", "http://127.0.0.1:9", "--", "train"], "does not answer .* reach it by a tunnel"),
        (
            ["--address", "ray://h:10001", "--", "train"],
            "jobs are handed to the cluster's dashboard; give http://",
        ),
        (["--address", "auto", "--", "train"], "give http://HOST:8265"),
        (["--address", "http://h:99999", "--", "train"], "give http://HOST:8265"),
        (["--address", "http://[h:1", "--", "train"], "give http://HOST:8265"),
        (["--address", "[::1]:9", "--", "train"], r"--address http://\[::1\]:9 does not answer"),
        ([], "give a command behind --"),
        (["--", "submit"], "give a command behind --"),
        (["--working-dir", "/no/such", "--", "train"], "--working-dir /no/such: no such folder"),
        (
            ["--env", "X", "--address", "127.0.0.1:9", "--", "train"],
            "--env X is not of the form NAME=VALUE",
        ),
        (["--stop", "x", "--follow", "y"], "do not go together"),
    ],
)
def test_mistakes_are_one_line(words, said, capsys):
    assert main(["submit", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(said, line)


# Real jobs


@pytest.mark.timeout(600)
def test_the_life_of_a_job(tmp_path, head, monkeypatch):  # noqa: F811
    """Its output, its exit codes, a stop with a checkpoint, and the same submission again."""
    toy_dataset(tmp_path / "data")
    config = toy_config(
        tmp_path / "data", tmp_path / "runs", epochs=4000, max_steps=60_000, eval_interval=None
    )
    words = [*command(config)[3:], "scaling=local", "compile=false"]
    run = Storage(config["storage"]) / "toy"
    monkeypatch.chdir(tmp_path)
    at_head = partial(submitted, "--address", head)

    deadline = time.monotonic() + 60
    # Until the head has started.
    while "does not answer" in (done := at_head("--", "train", "data=d", "lr=x")).stderr:
        assert time.monotonic() < deadline
    assert done.returncode == 2 and "error: configuration: lr='x': give a number above 0" in done.stdout

    begun = at_head("--detach", "--name", "first", "--", *words)
    assert begun.returncode == 0 and "--follow first, stop it with: " in begun.stderr, begun.stderr
    while not run.read("metrics.jsonl"):
        assert time.monotonic() < deadline + 60
        time.sleep(0.2)
    assert at_head("--stop", "first").returncode == 0
    followed = at_head("--follow", "first")
    assert followed.returncode == 143 and "; the same command continues" in followed.stdout
    step = finished(run)[-1].step
    assert step > 0

    again = at_head("--", *words, f"max_steps={step + 5}")
    assert again.returncode == 0 and f"step {step + 5}" in again.stdout, again.stdout
    diverged = at_head("--", *words, f"max_steps={step + 9}", "max_loss=1e-9")
    assert diverged.returncode == 1 and "error: " in diverged.stdout


@pytest.mark.long
def test_a_job_in_a_copy_of_the_folder(tmp_path, head, monkeypatch):  # noqa: F811
    """As on another machine: what the job needs is in the copy, or has a path that all machines share."""
    toy_dataset(tmp_path / "data")
    config = toy_config(tmp_path / "data", tmp_path / "runs", max_steps=3, eval_interval=None)
    folder = tmp_path / "project"
    for name in ("mine.yaml", "data/hidden.yaml", ".venv/hidden.yaml"):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("train: [experiment=sudoku_4x4]\nspace: {lr: [1e-3, 1e-4]}\n")
    monkeypatch.setattr(Jobs, "is_here", False)
    deadline = time.monotonic() + 60
    while True:
        try:
            jobs = Jobs(head)
            break
        except UserError:
            assert time.monotonic() < deadline

    def ran(*words: str) -> tuple[int, str]:
        lines: list[str] = []
        name = jobs.submit(Submission(words, folder, {"OMP_NUM_THREADS": "1"}))
        return jobs.follow(name, lines.append), "".join(lines)

    words = [*command(config)[3:], "scaling=local", "compile=false"]
    code, output = ran(*words)
    assert code == 0, output
    assert json.loads((tmp_path / "runs/toy/summary.json").read_text())["finished"]

    assert ran("config", "validate", "mine.yaml")[0] == 0
    for hidden in ("data/hidden.yaml", ".venv/hidden.yaml"):
        code, output = ran("config", "validate", hidden)
        assert code == 2 and f"{hidden} does not exist" in output

    # As `ray job submit` sends it, without a look at the paths.
    monkeypatch.setattr(submit, "check_paths", lambda words: None)
    code, output = ran(*words, "storage=runs")
    assert code == 2 and "storage=runs lies in the job's own copy of the working directory" in output


@pytest.fixture
def token(monkeypatch) -> str:
    """The token of the head that is started next."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    return os.environ["RAY_AUTH_TOKEN"]


@pytest.mark.long
def test_tokens_of_a_real_head(token, head, tmp_path):  # noqa: F811
    at_head = partial(submitted, "--address", head)
    words = ("--name", "first", "--", "train", "data=d", "lr=x")
    deadline = time.monotonic() + 60
    while "does not answer" in (done := at_head(*words)).stderr:
        assert time.monotonic() < deadline
    assert done.returncode == 2 and "error: configuration: lr='x': give a number above 0" in done.stdout
    for variables, said in TOKENS:
        for more in (["--", "train"], ["--follow", "first"], ["--stop", "first"]):
            done = at_head(*more, env=with_token(variables, tmp_path))
            assert done.returncode == 2 and done.stdout == "", done
            (line,) = done.stderr.splitlines()
            assert re.search(said, line), line


@pytest.mark.long
def test_a_head_that_is_lost_while_a_job_is_followed(head):  # noqa: F811
    deadline = time.monotonic() + 120
    while True:
        try:
            jobs = Jobs(head)
            job = jobs._client.submit_job(entrypoint="echo at work; sleep 1000")
            break
        except (UserError, RuntimeError):  # it is starting
            assert time.monotonic() < deadline
    follow = [sys.executable, "-m", "hrm_ray", "submit", "--address", head, "--follow", job]
    with subprocess.Popen(follow, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as follower:
        while "at work" not in follower.stdout.readline():
            assert follower.poll() is None
        port = head.rpartition(":")[2]
        (process,) = (p for p in psutil.Process().children() if f"--dashboard-port={port}" in p.cmdline())
        for member in [process, *process.children(recursive=True)]:
            member.kill()
        _, err = follower.communicate(timeout=60)
    assert follower.returncode == 1
    (line,) = err.splitlines()
    assert line.startswith(f"error: {head}: the connection was lost (")
    assert line.endswith("if the cluster's head was lost, the same submission to a new one continues")
