"""Keeping a folder to one process: a lock of the operating system on a local one, a lease on an object storage.

A lease is a small file, `lease.json`, that is written only under a condition: "if there is none", or "if it is still
the one that I read". Its holder writes it again every `RENEW_S`. Somebody else who sees it unchanged for
`TAKE_OVER_S`, by their own clock, replaces it; whoever held it is refused at the next renewal, and before that begins
to write nothing once its own clock says that the time is over. `generation` grows with every holder: checkpoints carry
it, so that one of a process that slept through all this never counts as the newest. What a lease cannot stop is a write
that has begun, or that of another worker than the first, which holds nothing: it ends soon after the first.

obstore writes it, since pyarrow's filesystems cannot write under a condition.
"""

import configparser
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from pyarrow import fs as pafs

from hrm_ray.errors import RunFailed, UserError, first_line
from hrm_ray.remote import StorageError, unreachable

if TYPE_CHECKING:
    from obstore import UpdateVersion
    from obstore.store import ObjectStore

NAME = "lease.json"
RENEW_S = 10.0
TAKE_OVER_S = 30.0
LOOK_S = 1.0  # how often somebody who waits looks
SAFE = 0.8  # of TAKE_OVER_S, after which its holder writes nothing before it has renewed it
ANSWER_S = 5.0  # how long the storage may take
POLL_S = 0.2


class Lock:
    """That this process holds a folder; until `close`, or its end.

    Attributes:
        generation: number of its holders so far; 0 where they are not counted.
        weakness: why other processes may write there all the same; None if they cannot.
    """

    generation = 0
    weakness: str | None = None

    def check(self) -> None:
        """To be called before every write. Raises LeaseLost, or StorageError if nobody can tell."""

    def close(self) -> None:
        """Let go of it. May be called again."""


class Unlocked(Lock):
    """Of a storage that can hold no lease."""

    def __init__(self, weakness: str):
        self.weakness = weakness


class LeaseLost(RunFailed):
    """Another process has taken the folder over."""


class FileLock(Lock):
    """A lock of the operating system on the file `path`.

    Raises:
        UserError: with the message `taken`, if another process has it for `wait_s` seconds more.
    """

    def __init__(self, path: Path, wait_s: float, taken: str):
        self._file: IO[str] = path.open("a")  # not "w": what is in it stays
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    self._file.close()
                    raise UserError(taken) from None
                time.sleep(POLL_S)

    def close(self) -> None:
        self._file.close()


class Lease(Lock):
    """A lease on a folder of an object storage, renewed by a thread.

    Args:
        store: of the folder.
        where: the folder, for messages.
        owner: who asks. A lease of the same owner is taken over at once: of a worker that was lost, say.
        waits: whether to wait for a holder that may be gone; it is told apart by its renewals.
        taken: the message if there is another holder.
        say: told once, if there is need to wait.

    Raises:
        UserError: another process holds it.
        Unconditional: the storage does not respect conditions.
        StorageError: it does not answer.
    """

    def __init__(
        self,
        store: "ObjectStore",
        where: str,
        *,
        owner: str,
        waits: bool,
        taken: str,
        say: Callable[[str], object],
    ):
        self._store, self._where, self._owner = store, where, owner
        self._holder = uuid.uuid4().hex
        self._beat = 0
        self._lost_to: str | None = None
        self._writing = threading.Lock()
        self._closed = threading.Event()
        self._version = self._take(waits, taken, say)
        self._check_conditions()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        if self._closed.is_set():
            raise LeaseLost(f"{self._where} was let go of by this process, which writes no more")
        if self._lost_to is None and _now() - self._renewed_at > SAFE * TAKE_OVER_S:
            self._renew()
        if self._lost_to is not None:
            raise LeaseLost(
                f"{self._lost_to} has taken over {self._where}; this process ends without writing"
            )

    def close(self) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        self._thread.join()
        if self._lost_to is None:
            with suppress(StorageError):  # then it ends by itself
                self._renew(released=True)

    # Taking it

    def _take(self, waits: bool, taken: str, say: Callable[[str], object]) -> "UpdateVersion":
        seen: UpdateVersion | None = None
        seen_at = 0.0
        while True:
            found = self._read()
            if found is None:
                content: dict[str, Any] = {}
                version: UpdateVersion | None = None
            else:
                content, version = found
            age = _now() - seen_at if seen is not None and version == seen else 0.0
            is_free = (
                version is None
                or content.get("released") is True
                or content.get("owner") == self._owner
                or age > TAKE_OVER_S
            )
            if is_free:
                before = content.get("generation")
                self.generation = (before if isinstance(before, int) else 0) + 1
                try:
                    return self._write(version)
                except _Refused:  # somebody was faster
                    time.sleep(LOOK_S)
                    continue
            if not waits or (seen is not None and version != seen):  # it was renewed: its holder lives
                raise UserError(f"{taken} ({_holder(content)} has its {NAME})")
            if seen is None:
                seen, seen_at = version, _now()
                say(
                    f"{self._where} was last held by {_holder(content)}; waiting {TAKE_OVER_S:g} s, in case it is "
                    "still at work"
                )
            time.sleep(LOOK_S)

    def _check_conditions(self) -> None:
        """Ask the storage itself, since some accept a condition and ignore it."""
        old = self._version
        self._renew()
        for stale in (None, old):
            try:
                self._version = self._write(stale)
            except _Refused:
                continue
            raise Unconditional("it ignores the conditions of a write")

    # Keeping it

    def _keep(self) -> None:
        while not self._closed.wait(RENEW_S) and self._lost_to is None:
            try:
                self._renew()
            except StorageError:  # it may answer the next time; `check` minds how long that takes
                continue

    def _renew(self, released: bool = False) -> None:
        """Write it again, or learn that it is lost. Raises StorageError."""
        with self._writing:
            for _ in range(2):
                try:
                    self._version = self._write(self._version, released)
                    return
                except _Refused as refused:
                    if refused.version is None or not refused.is_of(self._holder):
                        self._lost_to = refused.holder
                        return
                    # An earlier write of this process, of which no answer came.
                    self._version = refused.version
            raise StorageError(f"{self._where}/{NAME} can be neither written nor read")

    def _write(self, version: "UpdateVersion | None", released: bool = False) -> "UpdateVersion":
        """Write it, if it is still the `version`; None: if there is none. Raises _Refused, StorageError."""
        import obstore
        from obstore import exceptions

        self._beat += 1
        started = _now()
        content = {
            "holder": self._holder,
            "owner": self._owner,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "generation": self.generation,
            "beat": self._beat,
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "taken_over_after_s": TAKE_OVER_S,
            "released": released,
        }
        try:
            result = obstore.put(
                self._store, NAME, json.dumps(content, indent=1).encode(), mode=version or "create"
            )
        except (exceptions.AlreadyExistsError, exceptions.PreconditionError, FileNotFoundError) as error:
            if version is None and isinstance(error, FileNotFoundError):  # there is no such bucket
                raise unreachable(f"{self._where}/{NAME}", error) from None
            found = self._read()
            mine = (self._holder, self._beat)
            if found is None or (found[0].get("holder"), found[0].get("beat")) != mine:
                raise _Refused(found) from None
            self._renewed_at = started
            return found[1]  # it was written before, and no answer came
        except exceptions.NotSupportedError as error:
            raise Unconditional(first_line(error)) from None
        except (exceptions.BaseError, OSError) as error:
            raise unreachable(f"{self._where}/{NAME}", error) from None
        self._renewed_at = started
        return _version(result)

    def _read(self) -> "tuple[dict[str, Any], UpdateVersion] | None":
        import obstore
        from obstore import exceptions

        try:
            result = obstore.get(self._store, NAME)
            text = bytes(result.bytes())
        except FileNotFoundError:
            return None
        except (exceptions.BaseError, OSError) as error:
            raise unreachable(f"{self._where}/{NAME}", error) from None
        try:
            content = json.loads(text)
        except ValueError:
            content = {}
        return (content if isinstance(content, dict) else {}), _version(result.meta)


class Unconditional(Exception):
    """A storage that cannot write under a condition."""


class _Refused(Exception):
    """The lease is not what it was when it was read; `holder` has it now."""

    def __init__(self, found: "tuple[dict[str, Any], UpdateVersion] | None"):
        super().__init__()
        self._content: dict[str, Any] = found[0] if found else {}
        self.version: UpdateVersion | None = found[1] if found else None
        self.holder = _holder(found[0]) if found else "somebody who deleted its lease"

    def is_of(self, holder: str) -> bool:
        return self._content.get("holder") == holder


def is_fresh(content: bytes | None) -> bool:
    """Whether somebody holds a lease, as far as the clocks of two machines can tell."""
    try:
        lease = json.loads(content or b"{}")
        age = datetime.now(UTC) - datetime.fromisoformat(lease["written"])
        return not lease["released"] and age < 2 * timedelta(seconds=lease["taken_over_after_s"])
    except (ValueError, KeyError, TypeError):
        return False


def _version(result: Any) -> "UpdateVersion":
    found: Any = {key: result[key] for key in ("e_tag", "version") if result.get(key)}
    return found


def _holder(content: dict[str, Any]) -> str:
    return f"process {content.get('pid', '?')} on {content.get('host', '?')}"


def _now() -> float:
    """Seconds, those included that this machine slept."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _of_profile() -> dict[str, str | None]:
    """The keys of the user's AWS profile, which obstore does not look for; nothing where the environment has keys."""
    if "AWS_ACCESS_KEY_ID" in os.environ:
        return {}
    profiles = configparser.ConfigParser(default_section="", interpolation=None)
    file = os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or Path.home() / ".aws/credentials"
    try:
        profiles.read(file)
        keys = profiles[os.environ.get("AWS_PROFILE") or "default"]
    except (KeyError, configparser.Error, OSError, UnicodeError, RuntimeError):  # a role of the machine, say
        return {}
    return {name: keys.get(f"aws_{name}") for name in ("access_key_id", "secret_access_key", "session_token")}


def store_of(uri: str, fs: pafs.FileSystem) -> "ObjectStore":
    """The storage behind a folder's address, for obstore.

    Args:
        uri: as pyarrow takes it; what its options say of the server holds here too.
        fs: pyarrow's filesystem of it, which has found out the region.

    Raises:
        Unconditional: of a kind that obstore does not know.
    """
    from obstore import exceptions
    from obstore.store import from_url

    address = urlsplit(uri)
    options = {key: values[-1] for key, values in parse_qs(address.query).items()}
    place = f"{address.scheme}://{address.hostname}{address.path}"
    if address.scheme in ("abfs", "abfss"):  # CONTAINER@ACCOUNT, or the account alone
        place = f"{address.scheme}://{address.netloc}{address.path}"
    settings: dict[str, Any] = {}
    endpoint = options.get("endpoint_override")
    scheme = options.get("scheme", "https")
    if address.scheme == "s3":
        settings = {"region": getattr(fs, "region", None), **_of_profile()}
        if endpoint:
            settings["endpoint"] = endpoint if "://" in endpoint else f"{scheme}://{endpoint}"
        if options.get("force_virtual_addressing") in ("true", "1"):
            settings["virtual_hosted_style_request"] = True
    elif address.scheme in ("gs", "gcs"):
        place = f"gs://{address.hostname}{address.path}"
        if endpoint:
            settings["base_url"] = f"{scheme}://{endpoint}"
    if options.get("anonymous") in ("true", "1"):
        settings["skip_signature"] = True
    build: Any = from_url  # its types want the kind of storage to be known
    try:
        return build(
            place,
            config={key: value for key, value in settings.items() if value is not None},
            client_options={
                "allow_http": scheme == "http",
                "timeout": f"{ANSWER_S:g}s",
                "connect_timeout": "3s",
            },
            retry_config={"max_retries": 4, "retry_timeout": timedelta(seconds=2 * ANSWER_S)},
        )
    except (exceptions.BaseError, ValueError, TypeError) as error:
        raise Unconditional(first_line(error)) from None
