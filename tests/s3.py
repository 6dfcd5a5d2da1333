"""An S3 server for tests: moto's, in this process, behind a proxy that can fail as networks and storages do."""

import http.client
import re
import threading
import urllib.parse
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from pyarrow import fs

KEY = "testing"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": KEY,
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",  # looking for credentials there takes seconds
}
PAGE = 100  # entries in one answer; S3 promises at most 1000
FAULTS = (
    "error",  # an answer 503, and nothing is done
    "drop",  # the connection is closed, and nothing is done
    "lost",  # it is done, and the connection is closed without an answer
    "twice",  # it is done twice, as by a network that repeats; the second answer is given
    "unconditional",  # its conditions are ignored, as some storages do
)
CONDITIONS = ("if-match", "if-none-match")
# moto looks whether a condition holds, and writes then; S3 does both at once.
AT_ONCE = threading.Lock()
BETWEEN_HOPS = ("connection", "transfer-encoding", "content-length", "expect", "te", "keep-alive")


def make_bucket(address: str, name: str) -> None:
    fs.S3FileSystem(endpoint_override=address, scheme="http", allow_bucket_creation=True).create_dir(name)


@cache
def moto() -> tuple[str, int]:
    """Host and port of moto's server, for all tests."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    return server.get_host_and_port()


class Server(ThreadingHTTPServer):
    """The proxy.

    Attributes:
        requests: method and path of every request so far.
        fault: what is wrong with a request, one of `FAULTS`, or None; given its method and path.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[str] = []
        self.fault: Callable[[str, str], str | None] = lambda method, path: None
        self.behind = moto()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server
    # One packet an answer: in two, the second would wait for the first one's acknowledgement.
    wbufsize = 1 << 20
    disable_nagle_algorithm = True

    def handle_expect_100(self) -> bool:
        going_on = super().handle_expect_100()
        self.wfile.flush()
        return going_on

    def log_message(self, *args) -> None:
        pass

    def _handle(self) -> None:
        content = self._body()
        path = urllib.parse.unquote(self.path)
        self.server.requests.append(f"{self.command} {path}")
        fault = self.server.fault(self.command, path)
        if f"Credential={KEY}/" not in self.headers.get("Authorization", ""):
            self._answer(403, _error("InvalidAccessKeyId", "The access key is not known."))
            return
        if fault == "error":
            self._answer(503, _error("SlowDown", "Please reduce your request rate."))
            return
        if fault == "drop":
            self.close_connection = True
            return
        status, headers, answer = self._forward(content, fault == "unconditional")
        if fault == "twice":
            status, headers, answer = self._forward(content)
        if fault == "lost":
            self.close_connection = True
            return
        self._answer(status, answer, headers)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            return b"".join(iter(self._chunk, b""))
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _chunk(self) -> bytes:
        """The next chunk of a body in chunks; the last one is empty."""
        size = int(self.rfile.readline().split(b";")[0], 16)
        content = self.rfile.read(size)
        self.rfile.readline()
        return content

    def _forward(self, content: bytes, unconditional: bool = False) -> tuple[int, list, bytes]:
        left_out = BETWEEN_HOPS + CONDITIONS * unconditional
        headers = {name: value for name, value in self.headers.items() if name.lower() not in left_out}
        path = re.sub("max-keys=[0-9]+", f"max-keys={PAGE}", self.path)
        connection = http.client.HTTPConnection(*self.server.behind, timeout=30)
        is_conditional = self.command == "PUT" and any(name.lower() in CONDITIONS for name in headers)
        try:
            with AT_ONCE if is_conditional else nullcontext():
                connection.request(
                    self.command, path, content, {**headers, "Content-Length": str(len(content))}
                )
                answer = connection.getresponse()
                return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _answer(self, status: int, content: bytes, headers: list = ()) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in BETWEEN_HOPS:
                self.send_header(name, value)
        length = {name.lower(): value for name, value in headers}.get("content-length")
        self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _error(code: str, message: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
