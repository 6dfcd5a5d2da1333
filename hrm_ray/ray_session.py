"""A Ray to work on: the cluster of RAY_ADDRESS, or a private one on this machine.

What always holds of a private one: all it opens is on loopback, it has a token of its own, its files lie in a folder
that only its user can enter, and at its end nothing of it is left. A cluster is asked before it is joined, since
`ray.init` waits for minutes for one that does not answer, and hears no signal meanwhile.
"""

import json
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from hrm_ray.errors import RayFailed, UserError, first_line, notes

ANSWER_S = 3.0  # how long a cluster may take for each answer
WATCH_S = 3.0  # how often it is asked whether a cluster's head is there
STARTS = 3  # of a private Ray, where it is not ready in time
REMOVE_S = 10.0  # how long processes that are ending may keep a private Ray's folder
HOST_PORT = re.compile(r"(\[[\w:.%]+\]|[\w.-]+):(\d{1,4}|[1-5]\d{4}|6[0-5]\d{3})", re.ASCII)
# What Ray adds to the folder that is given to it, for the socket with the longest name.
SOCKET = "/session_2000-01-01_00-00-00_000000_{pid}/sockets/plasma_store"
SOCKET_BYTES = 103 if sys.platform == "darwin" else 107  # that the path of a socket may have


def cluster_address() -> str | None:
    """The cluster that RAY_ADDRESS names (Ray sets it in jobs); None: a private Ray is wanted."""
    address = os.environ.get("RAY_ADDRESS")
    return None if address in (None, "", "local") else address


def is_head() -> bool:
    """Whether the Ray of this process was started by it, and is no cluster that it joined."""
    import ray

    node = ray._private.worker._global_node
    return node is not None and bool(node.is_head())


@contextmanager
def ray_session(
    object_store_bytes: int | None = None, env_vars: dict[str, str] | None = None
) -> Iterator[bool]:
    """Inside, `ray` is initialised; what was started here is shut down at the end. Yields whether it was.

    RAY_ADDRESS names a cluster to join. Without it a private Ray is started on this machine, so that a stray one is
    never joined by accident; `object_store_bytes` bounds its shared memory. `env_vars` are set in all its workers.

    Raises:
        UserError: RAY_ADDRESS names no cluster that can be joined, or a private Ray has no folder for its files.
        RayFailed: Ray cannot be started. One that is raised inside is told where the logs of a private Ray are kept.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the coming default; silences a warning
    import ray

    if ray.is_initialized():
        yield False
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if env_vars:
        options["runtime_env"] = {"env_vars": env_vars}
    address = cluster_address()
    with (
        _unwinding_on_signals(),
        _quiet(),
        _cluster(address, options) if address else _private(object_store_bytes, options),
    ):
        yield True


# A cluster


@contextmanager
def _cluster(address: str, options: dict[str, Any]) -> Iterator[None]:
    """Inside, the cluster at `address` is joined."""
    import ray

    check_answers(address)
    try:
        with _talking_to(address):
            try:
                with _handlers_kept():
                    joined: Any = ray.init(address, **options)
            except Exception as error:
                raise UserError(f"RAY_ADDRESS={address} cannot be joined: {_last_line(error)}") from error
            with _witnessed(joined.address_info, f"RAY_ADDRESS={address}"):
                yield
    finally:
        ray.shutdown()


def _talking_to(address: str) -> AbstractContextManager[None]:
    """Inside, Ray looks for a cluster where it is."""
    return _talking_on_loopback() if _is_only_on_loopback(address) else nullcontext()


def _is_only_on_loopback(address: str) -> bool:
    """Whether that is a cluster within this machine, as `make cluster-up` starts one.

    Ray takes 127.0.0.1 for the machine's own address, where nothing of such a cluster listens.
    """
    from ray._common.network_utils import get_localhost_ip
    from ray._private.services import get_node_ip_address

    host, _, port = address.rpartition(":")
    if host not in ("localhost", get_localhost_ip()) or not port.isdecimal():
        return False
    return _listens(get_localhost_ip(), int(port)) and not _listens(get_node_ip_address(), int(port))


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=ANSWER_S).close()
    except (OSError, OverflowError):
        return False
    return True


WITNESS = """
import select, socket, sys
gcs, raylet, every_s, silent, lost = sys.argv[1:]
host, _, port = gcs.rpartition(":")
def head_answers():
    try:
        socket.create_connection((host.strip("[]"), int(port)), 3).close()
        return True
    except OSError:
        return False
was_there = True
while not select.select([sys.stdin], [], [], float(every_s))[0]:
    is_there = head_answers()
    if was_there and not is_there:
        print(silent, file=sys.stderr, flush=True)
    was_there = is_there
if sys.stdin.read() != "done":
    try:
        socket.socket(socket.AF_UNIX).connect(raylet)
        is_lost = not head_answers()
    except OSError:
        is_lost = True
    if is_lost:
        print(lost, file=sys.stderr)
"""


@contextmanager
def _witnessed(joined: dict[str, str], named: str) -> Iterator[None]:
    """Inside, another process watches the cluster, since Ray's core ends this one silently when that was lost.

    It says at once that the head does not answer, for whose return Ray waits for a minute.
    """
    messages = [
        f"\n{named}: the cluster's head does not answer; if it does not come back within a minute, this command ends",
        f"error: {named}: the cluster, or its node on this machine, was lost; give the same command again",
    ]
    places = [joined["gcs_address"], joined["raylet_socket_name"]]
    witness = subprocess.Popen(
        [sys.executable, "-ISc", WITNESS, *places, str(WATCH_S), *messages],
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is not for it
    )
    try:
        yield
    finally:
        witness.communicate(b"done")


def check_cluster() -> None:
    """`check_answers` of the cluster that is to be joined, if one is.

    For a command whose own handlers of signals begin a stop: called before they are set, Ctrl-C ends the wait at once.
    """
    import ray

    address = cluster_address()
    if address is not None and not ray.is_initialized():
        check_answers(address)


def check_answers(address: str) -> None:
    """Ask whether there is a cluster that can be joined. Takes milliseconds, or seconds where nothing answers.

    Raises:
        UserError: there is none, it does not let us in, or it is another version of Ray or Python.
    """
    named = f"RAY_ADDRESS={address if address.isprintable() else repr(address)}"
    logging.getLogger("ray").setLevel(logging.ERROR)
    with _talking_to(address):
        host, port = _resolved(address, named)
    check_token()
    try:
        socket.create_connection((host.strip("[]"), port), timeout=ANSWER_S).close()
    except (OSError, UnicodeError, OverflowError) as error:
        asked = (
            "" if address.endswith(f"{host}:{port}") else f" at {host}:{port}, where Ray would look for it"
        )
        raise UserError(
            f"{named} does not answer{asked} ({first_line(error)}); start that cluster, or unset RAY_ADDRESS"
        ) from None
    _check_version(json.loads(_metadata(f"{host}:{port}", named) or b"{}"), named)


def _resolved(address: str, named: str) -> tuple[str, int]:
    """Host and port, as `ray.init` takes them."""
    from ray._private import services
    from ray._private.authentication import authentication_token_setup

    if address == "auto":  # then Ray takes a token of the user's by itself
        authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    elif address.startswith(("http://", "https://")):
        raise UserError(
            f"{named} is no address of a cluster, but of a dashboard; give HOST:PORT (HOST:6379), or hand the command "
            "to the dashboard (hrm-ray submit --address URL -- COMMAND), or unset it"
        )
    elif "://" in address:
        raise UserError(f"{named} is no address of a cluster; give HOST:PORT (HOST:6379), or unset it")
    elif not HOST_PORT.fullmatch(address):
        raise UserError(f"{named} is no address; give HOST:PORT (HOST:6379), or unset it")
    try:
        host, _, port = str(services.canonicalize_bootstrap_address(address)).rpartition(":")
        return host, int(port)
    except ConnectionError:
        raise UserError(f"{named}: no Ray runs on this machine; start one, or unset RAY_ADDRESS") from None


def _metadata(place: str, named: str) -> bytes:
    """What the cluster says of itself, as JSON. Raises UserError if it is none, or does not tell us."""
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
    from ray.exceptions import AuthenticationError

    messages: Any = gcs_service_pb2  # made when it is imported
    request = messages.InternalKVGetRequest(key=b"CLUSTER_METADATA", namespace=b"cluster")
    try:  # by gRPC itself: Ray's client waits for minutes in its core, where no signal is heard
        with init_grpc_channel(place, [("grpc.enable_http_proxy", 0)]) as channel:
            service = gcs_service_pb2_grpc.InternalKVGcsServiceStub(channel)
            return service.InternalKVGet(request, timeout=ANSWER_S).value
    except AuthenticationError as error:
        raise no_token(named, error) from None
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNAUTHENTICATED:
            raise refused(named) from None
        raise UserError(
            f"{named} answers, but not as Ray does ({error.code().name}); give the port of `ray start --head` "
            "(6379 if it was given none), or unset RAY_ADDRESS"
        ) from None


def check_token() -> None:
    """Raise UserError if the token that Ray is to send cannot be sent; its core would end this process."""
    from ray._private.authentication.authentication_utils import is_token_auth_enabled
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]
    from ray.exceptions import AuthenticationError

    if not is_token_auth_enabled():
        return
    try:
        headers = AuthenticationTokenLoader.instance().get_token_for_http_header().values()
        can_be_sent = all(value.isascii() and value.isprintable() for value in headers)
    except AuthenticationError:  # there is none, which is for others to say
        return
    except UnicodeDecodeError:
        can_be_sent = False
    if not can_be_sent:
        raise UserError(
            "the token for Ray, of RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token, holds something "
            "else than printable ASCII; set the cluster's token there"
        )


def no_token(named: str, error: BaseException) -> UserError:
    """What to say where Ray is to send a token, and finds none here; `error` is its own."""
    reason = str(error).partition(". ")[0]
    return UserError(
        f"{named}: {reason}; set RAY_AUTH_TOKEN to the cluster's token, or RAY_AUTH_TOKEN_PATH to a file that holds "
        "it, or RAY_AUTH_MODE=disabled if it has none"
    )


def refused(named: str) -> UserError:
    """What to say where a cluster does not take our token, or asks for one and we sent none."""
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    if is_token_auth_enabled():
        return UserError(
            f"{named} refuses our token: set the cluster's token (RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH), or "
            "RAY_AUTH_MODE=disabled if it has none"
        )
    return UserError(
        f"{named} asks for a token: set RAY_AUTH_MODE=token and the cluster's token (RAY_AUTH_TOKEN or "
        "RAY_AUTH_TOKEN_PATH)"
    )


def _check_version(metadata: dict[str, str], named: str) -> None:
    """Raise UserError if a cluster of these versions cannot be joined by ours."""
    from ray._private.utils import check_version_info, compute_version_info

    try:
        check_version_info(metadata, "here")
    except KeyError:  # `ray.init` will tell
        return
    except RuntimeError:
        version, python = compute_version_info()
        raise UserError(
            f"{named} runs ray {metadata['ray_version']} on Python {metadata['python_version']}, this is ray "
            f"{version} on Python {python}; install the cluster's versions here"
        ) from None


# A private Ray


@contextmanager
def _private(object_store_bytes: int | None, options: dict[str, Any]) -> Iterator[None]:
    """Inside, a new Ray runs on this machine; at the end all of it is removed, but its logs if Ray has failed."""
    import ray

    folder = _new_folder()
    keep_logs = False
    try:
        with ExitStack() as stack:
            stack.enter_context(_own_token())
            stack.callback(ray.shutdown)
            _start(
                address="local",
                include_dashboard=False,
                object_store_memory=object_store_bytes,
                _temp_dir=f"{folder}/s",  # Ray makes it open to all, within the closed one
                _system_config={"enable_metrics_collection": False},  # its page asks for no token
                **options,
            )
            yield
    except RayFailed as error:
        keep_logs = True
        told = RayFailed(f"{error}; Ray's logs are kept in {folder}/logs")
        for note in notes(error):
            told.add_note(note.replace(_logs_of(folder), f"{folder}/logs"))
        raise told from error.__cause__
    finally:
        _remove(folder, keep_logs)


def _start(**options: Any) -> None:
    """`ray.init`, once more where a part of it was not ready in time.

    A busy machine or a slow disk may need longer for the first imports than Ray waits, which is 15 s. Raises RayFailed.
    """
    import ray

    before = set(psutil.Process().children())
    for is_last in [False] * (STARTS - 1) + [True]:
        try:
            with _handlers_kept(), _on_loopback(), _deaf_to_hangups():
                ray.init(**options)
            return
        except Exception as error:
            for started in set(psutil.Process().children()) - before:  # Ray knows them no more
                started.kill()
            if is_last or "timed out" not in str(error):
                raise RayFailed(f"Ray cannot be started here: {_last_line(error)}") from error


def _new_folder() -> Path:
    """An empty folder for a Ray's files, which only this user can enter.

    Raises:
        UserError: none can be made, or its path is too long for Ray's sockets.
    """
    of_ray = os.environ.get("RAY_TMPDIR")
    base = Path(of_ray or ("/tmp" if sys.platform == "darwin" else tempfile.gettempdir())).absolute()
    named = f"RAY_TMPDIR={of_ray}" if of_ray else f"TMPDIR={base}"
    longest = f"{base}/hrm-12345678/s{SOCKET.format(pid=os.getpid())}"
    if (excess := len(os.fsencode(longest)) - SOCKET_BYTES) > 0:
        raise UserError(
            f"{named} is too long by {excess} bytes for Ray's sockets; set RAY_TMPDIR=/tmp, or another short path"
        )
    try:
        return Path(tempfile.mkdtemp(prefix="hrm-", dir=base))
    except OSError as error:
        raise UserError(
            f"{named}: Ray's files cannot be there ({error.strerror}); set RAY_TMPDIR to a folder that can be written"
        ) from None


def _remove(folder: Path, keep_logs: bool) -> None:
    """Remove the folder of a Ray that has been shut down; its processes may still be about to end."""
    if keep_logs:
        with suppress(OSError):  # it did not come so far
            Path(_logs_of(folder)).rename(folder / "logs")
    doomed = folder / "s" if keep_logs else folder
    deadline = time.monotonic() + REMOVE_S
    while doomed.exists() and time.monotonic() < deadline:
        shutil.rmtree(doomed, ignore_errors=True)
        if doomed.exists():
            time.sleep(0.1)


def _logs_of(folder: Path) -> str:
    """Where the logs of a private Ray lie while it runs."""
    return str((folder / "s/session_latest").resolve() / "logs")


@contextmanager
def _own_token() -> Iterator[None]:
    """Inside, Ray asks for a token that nobody else knows and that is written nowhere, unless the user has decided.

    Ray's own is in a file in the user's home, which others may be able to read, and which changes what a later
    `ray start` does.
    """
    if "RAY_AUTH_MODE" in os.environ:
        check_token()
        yield
        return
    with environment({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}, _reload_token):
        yield


def _reload_token() -> None:
    """Let Ray look at its environment again."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def environment(values: Mapping[str, str], changed: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Inside, the environment has `values`; `changed` is called whenever it has changed."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    changed()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        changed()


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Inside, `ray.init` starts a Ray on 127.0.0.1, which is what it does by itself on macOS and Windows alone.

    The agent gets a free port: a head that is started on this machine needs the usual one, to run jobs. And under
    `uv run` Ray would copy the current folder to its workers, which are on this machine anyway.
    """
    from ray._private import parameter, ray_constants

    with (
        _talking_on_loopback(),
        _changed(
            (ray_constants, "RAY_ENABLE_UV_RUN_RUNTIME_ENV", False),
            (parameter, "RayParams", partial(parameter.RayParams, dashboard_agent_listen_port=0)),
        ),
    ):
        yield


@contextmanager
def _talking_on_loopback() -> Iterator[None]:
    """Inside, Ray takes 127.0.0.1 for the address of this machine."""
    from ray._private import ray_constants

    with _changed((ray_constants, "ENABLE_RAY_CLUSTER", False)):
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, a Ray that is joined does not write to standard output what has gone wrong in it, such as that a worker
    died: whoever waits for that worker is told anyway."""
    from ray._private import worker

    with _changed((worker, "listen_error_messages", lambda *_: None)):
        yield


@contextmanager
def _changed(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """Inside, these attributes (of an object, a name, a value) are other ones."""
    before = [(module, name, getattr(module, name)) for module, name, _ in changes]
    for module, name, value in changes:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


@contextmanager
def _deaf_to_hangups() -> Iterator[None]:
    """Inside, processes are started that live on when the terminal is closed, as long as this process wants them.

    Ray does the same for Ctrl-C. A hangup that comes now is received afterwards.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# Signals


@contextmanager
def _unwinding_on_signals() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP end this process by an exception, so that what it began is ended too.

    Whoever handles or ignores one of them goes on doing so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, lambda received, frame: sys.exit(128 + received))
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """A caller who handles SIGTERM goes on doing so, while `ray.init` runs too.

    It would replace the handler by one of its own, and its core sets another below Python's, which passes the signal
    on to Python's but aborts the process if that has not ended it after three seconds.
    """
    ours = signal.getsignal(signal.SIGTERM)
    if ours in (signal.SIG_DFL, None) or threading.current_thread() is not threading.main_thread():
        yield
        return
    from ray._private import utils

    alarm = signal.getitimer(signal.ITIMER_REAL)
    install = utils.set_sigterm_handler
    utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = install
        signal.signal(signal.SIGTERM, ours)  # above what the core has set
        # Not the alarm by which it aborts, if a signal has come already.
        signal.setitimer(signal.ITIMER_REAL, *alarm)


def _last_line(error: BaseException) -> str:
    """The most telling line of what Ray raises: the last of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(reversed(str(error).strip().rstrip(".").splitlines()), type(error).__name__)
