"""What a worker of Ray wrote last, to be shown when it has failed: nobody should have to look for its log.

A log is read where it lies. On this node that is the session's folder; a log of another node is asked for at the
cluster's dashboard, whose agents hand it out.
"""

import re
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hrm_ray.errors import shown

if TYPE_CHECKING:
    import requests

T = TypeVar("T")
NUM_LINES = 20  # that are shown
MAX_FRAMES = 8  # of a stack that begins with the innermost, as `faulthandler` prints it
TAIL_BYTES = 2**16  # that are read of a file
TAIL_LINES = 200  # that are asked for
ANSWER_S = 5  # how long the cluster may take to hand out a log of another node
WIDTH = 200  # of a line
KINDS = ("out", "err")
# What Ray writes itself (its marks for the driver, its own log, frames of its core), and lines without words.
NOISE = re.compile(
    r":(job_id|actor_name|task_name):|\[\d{4}-\d\d-\d\d [\d:,]+ \w \d+ \d+\] |Setting up process group for: |"
    r"Extension modules: |PC: @|\s+@\s|[\s^~]*$"
)
FRAME = re.compile(r'  File ".*", line \d+ in ')


def last_words(name: str, host: str, ip: str, pid: int) -> str:
    """The last lines of the log of a worker, below a line that says where the whole of it lies.

    Args:
        name: what it is called, such as "worker 0".
        host, ip: of its node.
        pid: of its process.
    """
    where = f"{name} (process {pid} on {host})"
    try:
        place, texts = _local(pid) if _is_here(ip) else _in_time(lambda: _remote(ip, pid))
    except Exception as error:  # of many kinds: there is no dashboard, the node is gone, the file too
        why = shown(str(error).strip().partition("\n")[0])
        return f"{where}: its log, among Ray's on that node, cannot be read from here ({why})"
    lines = _readable(*texts)
    if not lines:
        return f"{where} wrote nothing in its last moments; its log is {place}"
    return "\n".join([f"{where} wrote last, in {place}:", *(f"  {line}" for line in lines)])


def _is_here(ip: str) -> bool:
    import ray.util

    return ip == ray.util.get_node_ip_address()


def _in_time(call: Callable[[], T]) -> T:
    """What `call` returns. If that takes longer than `ANSWER_S`, it is left alone, and a TimeoutError is raised."""
    answer: Future[T] = Future()

    def ask() -> None:
        try:
            answer.set_result(call())
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=ask, name="log of a worker", daemon=True).start()
    try:
        return answer.result(ANSWER_S)
    except TimeoutError:
        raise TimeoutError(f"there was no answer in {ANSWER_S:g} s") from None


def _local(pid: int) -> tuple[str, list[str]]:
    """The path of a log on this node, and the ends of its two files."""
    import ray

    node: Any = ray._private.worker._global_node
    logs = Path(node.get_logs_dir_path())
    newest = _found(sorted(logs.glob(f"worker-*-{pid}.err"), key=lambda file: file.stat().st_mtime))
    return str(newest), [_tail(newest.with_suffix(f".{kind}")) for kind in KINDS]


def _tail(file: Path) -> str:
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - TAIL_BYTES))
        return stream.read().decode(errors="replace")


def _remote(ip: str, pid: int) -> tuple[str, list[str]]:
    """The name of a log on another node, and the ends of its two files."""
    kinds = _asked("", ip, glob=f"worker-*-{pid}.err").json()["data"]["result"]
    name = str(_found(name for names in kinds.values() for name in names))
    stem = name.removesuffix("err")
    texts = [_asked("/file", ip, filename=f"{stem}{kind}", lines=TAIL_LINES).text for kind in KINDS]
    return f"Ray's logs on that node, {name}", texts


def _found(names: Iterable[T]) -> T:
    """The last of them."""
    *_, last = [None, *names]
    if last is None:
        raise FileNotFoundError("there is none of that process")
    return last


def _asked(path: str, ip: str, **wanted: Any) -> "requests.Response":
    """What the dashboard says of the logs of a node. Not by `ray.util.state`, which may ask another cluster."""
    import requests
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled
    from ray._private.ray_constants import DASHBOARD_ADDRESS, KV_NAMESPACE_DASHBOARD
    from ray.experimental import internal_kv

    dashboard = internal_kv._internal_kv_get(DASHBOARD_ADDRESS, namespace=KV_NAMESPACE_DASHBOARD)
    if not dashboard:
        raise ConnectionError("the cluster has no dashboard")
    try:
        answer = requests.get(
            f"http://{dashboard.decode()}/api/v0/logs{path}",
            params={"node_ip": ip, "timeout": ANSWER_S, **wanted},
            headers=get_auth_headers_if_auth_enabled({}),
            timeout=2 * ANSWER_S,
        )
        answer.raise_for_status()
    except requests.RequestException:
        raise ConnectionError(f"the dashboard at {dashboard.decode()} does not have it") from None
    return answer


def _readable(out: str, err: str) -> list[str]:
    """The last lines without noise; what Ray Train has written to both files appears once."""
    said = err.splitlines()
    lines = [line for line in out.splitlines() if line not in set(said)] + said
    lines = [line for line, _ in groupby(line for line in lines if not NOISE.match(line))]
    return [shown(line, WIDTH) for line in _short_stacks(lines)][-NUM_LINES:]


def _short_stacks(lines: Iterable[str]) -> Iterable[str]:
    """Of each stack its innermost frames."""
    for is_stack, part in groupby(lines, key=lambda line: bool(FRAME.match(line))):
        found = list(part)
        yield from found[:MAX_FRAMES] if is_stack else found
        if is_stack and len(found) > MAX_FRAMES:
            yield f"  ... {len(found) - MAX_FRAMES} more"
