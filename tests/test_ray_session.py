"""Joining a cluster that is not one, and what a private Ray is given before it starts. No Ray is started here."""

import contextlib
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import ray
from ray._private import parameter, ray_constants
from ray._private.worker import _maybe_modify_runtime_env
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from hrm_ray import ray_session
from hrm_ray.errors import RayFailed, UserError
from hrm_ray.ray_session import check_answers, cluster_address, is_head
from tests.toy import toy_dataset


@pytest.fixture(autouse=True)
def shared_ray_stays(monkeypatch):
    """What is tried here must not end the Ray that other tests share."""
    monkeypatch.setattr(ray, "shutdown", lambda: None)


@pytest.fixture
def at_loopback(monkeypatch):
    """Ray looks for a cluster at 127.0.0.1 at the machine's other address, where the servers here do not listen."""
    monkeypatch.setattr("ray._private.services.resolve_ip_for_localhost", lambda host: host)


@pytest.mark.parametrize(
    ("value", "address"), [(None, None), ("", None), ("local", None), ("auto", "auto"), ("h:1", "h:1")]
)
def test_which_cluster_is_joined(monkeypatch, value, address):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if value is not None:
        monkeypatch.setenv("RAY_ADDRESS", value)
    assert cluster_address() == address


NO_ADDRESSES = [
    "garbage",
    "host",
    "6379",
    ":6379",
    "host:",
    "host:port",
    "host:99999",
    "::1:6379",
    " h:1",
    "h:1\r",
]
NO_ADDRESSES += [
    "http://127.0.0.1:8265",
    "https://h:1",
    "ray://127.0.0.1:10001",
    "redis://h",
    "h:1/",
    "é:1",
    "a b:1",
]


@pytest.mark.parametrize("address", NO_ADDRESSES)
def test_what_is_no_address_is_one_line(address, capfd):
    with pytest.raises(UserError, match=r"RAY_ADDRESS=.* is no address.*; give HOST:PORT") as info:
        check_answers(address)
    assert "\n" not in str(info.value) and "\r" not in str(info.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "address", ["127.0.0.1:1", "localhost:1", "nosuch.invalid:6379", f"{'x' * 70}.invalid:1"]
)
def test_where_nobody_listens(address, at_loopback, capfd):
    with pytest.raises(UserError, match=r"does not answer \(.*\); start that cluster, or unset RAY_ADDRESS"):
        check_answers(address)
    assert capfd.readouterr() == ("", "")


def test_a_server_that_is_silent(at_loopback, monkeypatch):
    monkeypatch.setattr(ray_session, "ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UserError, match=r"answers, but not as Ray does \(DEADLINE_EXCEEDED\)"):
            check_answers(address)


def test_a_server_of_pages(at_loopback):
    """Such as a dashboard's."""
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(
            UserError, match=r"answers, but not as Ray does .*; give the port of `ray start --head`"
        ):
            check_answers(f"127.0.0.1:{server.server_port}")
        server.shutdown()


class Head(gcs_service_pb2_grpc.InternalKVGcsServiceServicer):
    """Answers as a head of some version does, or as one that wants a token."""

    def __init__(self, content: bytes | None):
        self.content = content

    def InternalKVGet(self, request, context):  # noqa: N802 - Ray's name
        assert (request.key, request.namespace) == (b"CLUSTER_METADATA", b"cluster")
        if self.content is None:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
        return gcs_service_pb2.InternalKVGetReply(value=self.content)


@pytest.fixture
def head(at_loopback):
    """The address of a head, as a function of what it says of itself; None: it wants a token."""
    servers = []

    def start(content: dict | None) -> str:
        server = grpc.server(ThreadPoolExecutor(1))
        body = None if content is None else json.dumps(content).encode()
        gcs_service_pb2_grpc.add_InternalKVGcsServiceServicer_to_server(Head(body), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(None)


OURS = {"ray_version": ray.__version__, "python_version": ".".join(map(str, sys.version_info[:3]))}


def test_a_head_of_our_version(head):
    check_answers(head(OURS))
    check_answers(head({}))  # what it does not say, `ray.init` finds out


@pytest.mark.parametrize("other", [{"ray_version": "2.55.1"}, {"python_version": "3.9.1"}])
def test_a_head_of_another_version(head, other):
    with pytest.raises(UserError) as info:
        check_answers(head({**OURS, **other}))
    there, here = {**OURS, **other}, OURS
    assert f"runs ray {there['ray_version']} on Python {there['python_version']}, this is ray " in str(
        info.value
    )
    assert f"{here['ray_version']} on Python {here['python_version']}; install" in str(info.value)
    assert "\n" not in str(info.value)


@contextlib.contextmanager
def token(**variables: str):
    """Inside, Ray is to send a token, which it finds by these variables."""
    with ray_session.environment({"RAY_AUTH_MODE": "token", **variables}, ray_session._reload_token):
        yield


def test_a_head_that_wants_a_token(head):
    with pytest.raises(UserError, match="asks for a token: set RAY_AUTH_MODE=token and the cluster's token"):
        check_answers(head(None))


def test_a_head_that_wants_another_token(head):
    with (
        token(RAY_AUTH_TOKEN="wrong"),
        pytest.raises(UserError, match="refuses our token: set the cluster's token"),
    ):
        check_answers(head(None))


BUILD = ["data", "build", "recipe=sudoku_4x4", "out=data"]


@pytest.mark.parametrize(
    ("address", "words", "variables"),
    [
        ("127.0.0.1:9", BUILD, {"RAY_AUTH_TOKEN": "t\xf6ken"}),
        ("", BUILD, {"RAY_AUTH_TOKEN_PATH": "token"}),  # by a private Ray, whose core would abort
        ("", ["submit", "--address", "http://127.0.0.1:9", "--", "train"], {"RAY_AUTH_TOKEN": "a\x01"}),
    ],
)
def test_a_token_that_cannot_be_sent(address, words, variables, tmp_path):
    """In a process of its own, since a Ray that runs in this one would send it."""
    (tmp_path / "token").write_bytes(b"\xff\xfe")
    ours = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "RAY_ADDRESS": address}
    done = subprocess.run(
        [sys.executable, "-m", "hrm_ray", *words],
        env={**ours, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "", **variables},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "holds something else than printable ASCII; set the cluster's token there" in line
    assert not (tmp_path / "data").exists()


def test_no_token_where_one_is_to_be_sent(head):
    said = r"RAY_ADDRESS=\S+: RAY_AUTH_TOKEN_PATH is set but .* /no/such; set RAY_AUTH_TOKEN to the cluster's token"
    with (
        token(RAY_AUTH_TOKEN="", RAY_AUTH_TOKEN_PATH="/no/such"),
        pytest.raises(UserError, match=said) as info,
    ):
        check_answers(head(OURS))
    assert "\n" not in str(info.value)


def test_the_address_of_a_dashboard():
    with pytest.raises(
        UserError, match=r"but of a dashboard; give HOST:PORT .* \(hrm-ray submit --address URL"
    ):
        check_answers("http://127.0.0.1:8265")


@pytest.mark.parametrize("command", ["train", "tune"])
def test_an_interrupt_ends_the_wait_for_a_cluster_at_once(command, tmp_path):
    """Without a word, and without a folder."""
    toy_dataset(tmp_path / "data")
    with socket.create_server(("", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        words = [*WORDS[command], f"data={tmp_path / 'data'}", f"storage={tmp_path / 'runs'}"]
        with subprocess.Popen(
            [sys.executable, "-m", "hrm_ray", *words],
            env={**os.environ, "RAY_ADDRESS": address},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            kept = [server.accept() for _ in range(2)]  # the first only asks whether somebody listens
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=60)
        for connection, _ in kept:
            connection.close()
    assert process.returncode == -signal.SIGINT, output
    assert "Traceback" not in output and "stopping" not in output
    assert not (tmp_path / "runs").exists()


WORDS = {"train": ["train", "experiment=sudoku_4x4"], "tune": ["tune", "sudoku_4x4_lr"]}


def test_a_head_that_does_not_answer_any_more_is_told_of_at_once(monkeypatch, capfd):
    monkeypatch.setattr(ray_session, "WATCH_S", 0.05)
    server = socket.create_server(("127.0.0.1", 0))
    joined = {"gcs_address": f"127.0.0.1:{server.getsockname()[1]}", "raylet_socket_name": "/no/such"}
    with ray_session._witnessed(joined, "RAY_ADDRESS=h:1"):
        server.accept()  # it is asked, and answers
        server.close()
        said, deadline = "", time.monotonic() + 60
        while "RAY_ADDRESS=h:1: the cluster's head does not answer; if it does not come back" not in said:
            assert time.monotonic() < deadline
            said += capfd.readouterr().err
    assert (
        said.count("\n") == 2 and capfd.readouterr().err == ""
    )  # said once; and nothing was lost in the end


# What a private Ray is given


def test_its_folder_is_closed_and_removed(monkeypatch, tmp_path_factory):
    base = Path("/tmp") / f"t{os.getpid()}"  # a short path
    base.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(base))
    before = os.umask(0)
    try:
        folder = ray_session._new_folder()
    finally:
        os.umask(before)
    assert folder.parent == base and folder.stat().st_mode & 0o777 == 0o700
    logs = folder / "s" / "session_2026-01-01" / "logs"
    logs.mkdir(parents=True)
    (logs / "raylet.out").write_text("died")
    (folder / "s" / "session_latest").symlink_to(logs.parent)
    ray_session._remove(folder, keep_logs=True)
    assert [p.relative_to(folder).as_posix() for p in folder.rglob("*")] == ["logs", "logs/raylet.out"]
    ray_session._remove(folder, keep_logs=False)
    base.rmdir()


@pytest.mark.parametrize("name", ["RAY_TMPDIR", "TMPDIR"])
def test_a_path_that_is_too_long_for_sockets(monkeypatch, tmp_path, name):
    long = tmp_path / ("a_rather_long_path_as_slurm_makes_it" * 3)
    long.mkdir()
    for other in ("RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, str(long))
    monkeypatch.setattr("tempfile.tempdir", None)
    with pytest.raises(
        UserError, match=rf"{name}=.* is too long by \d+ bytes for Ray's sockets; set RAY_TMPDIR=/tmp"
    ):
        ray_session._new_folder()
    assert list(long.iterdir()) == []


@pytest.mark.parametrize("where", ["/nonexistent/x", "/dev/null", "/proc"])
def test_a_folder_that_cannot_be_written(monkeypatch, where):
    monkeypatch.setenv("RAY_TMPDIR", where)
    with pytest.raises(
        UserError, match=rf"RAY_TMPDIR={where}: Ray's files cannot be there \(.*\); set RAY_TMPDIR"
    ):
        ray_session._new_folder()


def test_uv_copies_nothing_and_the_changes_to_ray_end(monkeypatch):
    monkeypatch.setattr(
        "ray._private.runtime_env.uv_runtime_env_hook._get_uv_run_cmdline", lambda: ["uv", "run", "x"]
    )
    before = (
        ray_constants.ENABLE_RAY_CLUSTER,
        ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV,
        parameter.RayParams,
    )
    monkeypatch.setattr("ray._private.worker._global_node", None)  # the one that other tests share
    with ray_session._on_loopback():
        assert _maybe_modify_runtime_env({"env_vars": {}}, False) == {"env_vars": {}}
        assert parameter.RayParams().dashboard_agent_listen_port == 0
        assert ray.util.get_node_ip_address() == "127.0.0.1"
    after = ray_constants.ENABLE_RAY_CLUSTER, ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV, parameter.RayParams
    assert before == after


def test_it_has_a_token_of_its_own_unless_the_user_has_decided(monkeypatch):
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with ray_session._own_token():
        assert "RAY_AUTH_TOKEN" not in os.environ
    monkeypatch.delenv("RAY_AUTH_MODE")
    found = []
    for _ in range(2):
        with ray_session._own_token():
            assert os.environ["RAY_AUTH_MODE"] == "token"
            found.append(os.environ["RAY_AUTH_TOKEN"])
        assert not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} & set(os.environ)
    assert len(set(found)) == 2


@pytest.mark.parametrize("num_failures", [2, 3])
def test_a_ray_that_is_not_ready_in_time_is_started_again(monkeypatch, tmp_path, num_failures):
    """And what the first start left is ended: Ray itself knows it no more."""
    started = []

    def init(**options):
        started.append(subprocess.Popen(["sleep", "1000"]))
        if len(started) <= num_failures:
            raise Exception("The current node timed out during startup. The GCS may be busy.")

    monkeypatch.setattr(ray, "init", init)
    try:
        if num_failures == 2:
            ray_session._start()
        else:
            with pytest.raises(RayFailed, match=r"Ray cannot be started here: .*timed out"):
                ray_session._start()
        assert len(started) == 3
        assert [p.wait() for p in started[:num_failures]] == [-signal.SIGKILL] * num_failures
        assert num_failures == 3 or started[-1].poll() is None
    finally:
        started[-1].kill()


def test_where_ray_cannot_start_its_logs_are_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(ray_session, "_new_folder", lambda: tmp_path / "h")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def fails(**options):
        logs = Path(options["_temp_dir"]) / "session_2026-01-01" / "logs"
        logs.mkdir(parents=True)
        (Path(options["_temp_dir"]) / "session_latest").symlink_to(logs.parent)
        (logs / "raylet.out").write_text("died")
        raise ValueError("first\nthe disk is full")

    monkeypatch.setattr(ray, "init", fails)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(RayFailed) as info, ray_session.ray_session():
        pass
    assert str(info.value) == (
        f"Ray cannot be started here: the disk is full; Ray's logs are kept in {tmp_path}/h/logs"
    )
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == [
        "h",
        "h/logs",
        "h/logs/raylet.out",
    ]


def test_a_cluster_that_listens_on_loopback_alone_is_told_from_one_of_this_machine():
    """Ray takes 127.0.0.1 for the machine's own address."""
    with socket.socket() as alone, socket.socket() as everywhere:
        alone.bind(("127.0.0.1", 0))
        everywhere.bind(("0.0.0.0", 0))
        for listener in (alone, everywhere):
            listener.listen()
        ports = [listener.getsockname()[1] for listener in (alone, everywhere)]
        names = ("127.0.0.1", "localhost")
        answers = [ray_session._is_only_on_loopback(f"{name}:{p}") for p in ports for name in names]
        assert answers == [True, True, False, False]
        assert not ray_session._is_only_on_loopback(f"10.0.0.1:{ports[0]}")
    assert not ray_session._is_only_on_loopback(f"127.0.0.1:{ports[0]}")  # nobody listens there any more


@pytest.mark.ray
def test_who_starts_a_ray_is_its_head_and_who_joins_it_is_not(ray_cluster):
    program = (
        "import ray, sys; from hrm_ray.ray_session import is_head; ray.init(sys.argv[1]); sys.exit(is_head())"
    )
    words = [sys.executable, "-c", program, ray.get_runtime_context().gcs_address]
    assert is_head()
    assert subprocess.run(words, capture_output=True).returncode == 0
