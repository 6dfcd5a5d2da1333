"""A small S3 server for tests, in this process: what pyarrow's S3FileSystem asks for, kept in memory.

Not moto: its botocore holds python-dateutil below 3, which the pinned environment is past. The tests that use this
server pass with moto too: HRM_RAY_TEST_S3=HOST:PORT sends them to a server of that address.
"""

import os
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from pyarrow import fs

KEY = "testing"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": KEY,
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",  # looking for credentials there takes seconds
}
PAGE = 100  # entries in one answer; S3 promises at most 1000
ELSEWHERE = os.environ.get("HRM_RAY_TEST_S3")
XMLNS = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'


def make_bucket(address: str, name: str) -> None:
    fs.S3FileSystem(endpoint_override=address, scheme="http", allow_bucket_creation=True).create_dir(name)


class Server(ThreadingHTTPServer):
    """Attributes:
    buckets: name -> key -> content.
    uploads: id -> part number -> content, of uploads in several parts.
    requests: method and path of every request so far.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.buckets: dict[str, dict[str, bytes]] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.requests: list[str] = []
        self.lock = threading.Lock()
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
        url = urllib.parse.urlsplit(self.path)
        self.query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        bucket, _, self.key = urllib.parse.unquote(url.path).lstrip("/").partition("/")
        content = self._body()
        with self.server.lock:
            self.server.requests.append(f"{self.command} {self.path}")
            if f"Credential={KEY}/" not in self.headers.get("Authorization", ""):
                return self._fail(403, "InvalidAccessKeyId", "The access key is not known.")
            if self.command == "PUT" and not self.key:
                self.server.buckets.setdefault(bucket, {})
                return self._answer(200)
            if bucket not in self.server.buckets:
                return self._fail(404, "NoSuchBucket", "The bucket does not exist.")
            self.objects = self.server.buckets[bucket]
            return (self._of_key if self.key else self._of_bucket)(content)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b"".join(iter(self._chunk, b""))
        else:
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "aws-chunked" not in self.headers.get("Content-Encoding", ""):
            return content
        whole = b""
        while content:  # SIZE;signature CRLF bytes CRLF ...
            head, _, content = content.partition(b"\r\n")
            size = int(head.split(b";")[0], 16)
            if size == 0:
                break
            whole, content = whole + content[:size], content[size + 2 :]
        return whole

    def _chunk(self) -> bytes:
        """The next chunk of a body in chunks; the last one is empty."""
        size = int(self.rfile.readline().split(b";")[0], 16)
        content = self.rfile.read(size)
        self.rfile.readline()
        return content

    def _answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _xml(self, status: int, text: str) -> None:
        content = f'<?xml version="1.0" encoding="UTF-8"?>\n{text}'.encode()
        self._answer(status, content, Content_Type="application/xml")

    def _fail(self, status: int, code: str, message: str) -> None:
        self._xml(status, f"<Error><Code>{code}</Code><Message>{message}</Message></Error>")

    # Of a bucket

    def _of_bucket(self, content: bytes) -> None:
        if self.command == "HEAD":
            self._answer(200, x_amz_bucket_region="us-east-1")
        elif self.command == "GET":
            self._list()
        elif self.command == "POST" and "delete" in self.query:
            keys = [
                node.text or "" for node in ElementTree.fromstring(content).iter() if node.tag.endswith("Key")
            ]
            for key in keys:
                self.objects.pop(key, None)
            deleted = "".join(f"<Deleted><Key>{escape(key)}</Key></Deleted>" for key in keys)
            self._xml(200, f"<DeleteResult {XMLNS}>{deleted}</DeleteResult>")
        else:
            self._fail(501, "NotImplemented", self.command)

    def _list(self) -> None:
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter", "")
        page = min(PAGE, int(self.query.get("max-keys", PAGE)))
        entries: dict[str, str] = {}  # what sorts a page -> its XML
        for key in sorted(key for key in self.objects if key.startswith(prefix)):
            folder = key[len(prefix) :].partition(delimiter) if delimiter else (key, "", "")
            if folder[1]:
                name = prefix + folder[0] + delimiter
                entries[name] = f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"
            else:
                entries[key] = (
                    f"<Contents><Key>{escape(key)}</Key><Size>{len(self.objects[key])}</Size>"
                    "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
                )
        after = self.query.get("continuation-token", "")
        names = [name for name in sorted(entries) if name > after]
        more = len(names) > page
        token = f"<NextContinuationToken>{escape(names[page - 1])}</NextContinuationToken>" if more else ""
        shown = "".join(entries[name] for name in names[:page])
        about = f"<KeyCount>{len(names[:page])}</KeyCount><IsTruncated>{str(more).lower()}</IsTruncated>"
        self._xml(200, f"<ListBucketResult {XMLNS}>{about}{token}{shown}</ListBucketResult>")

    # Of an object

    def _of_key(self, content: bytes) -> None:
        if "uploadId" in self.query or "uploads" in self.query:
            self._upload(content)
        elif self.command in ("GET", "HEAD"):
            self._read()
        elif self.command == "PUT":
            self.objects[self.key] = content
            self._answer(200, ETag='"0"')
        elif self.command == "DELETE":
            self.objects.pop(self.key, None)
            self._answer(204)
        else:
            self._fail(501, "NotImplemented", self.command)

    def _read(self) -> None:
        content = self.objects.get(self.key)
        if content is None:
            self._fail(404, "NoSuchKey", "The key does not exist.")
            return
        status, bounds = 200, {}
        if self.command == "GET" and "Range" in self.headers:
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            stop = min(len(content), int(last) + 1)
            status, bounds = 206, {"Content_Range": f"bytes {first}-{stop - 1}/{len(content)}"}
            content = content[int(first) : stop]
        about = {"ETag": '"0"', "Last_Modified": "Thu, 01 Jan 2026 00:00:00 GMT", **bounds}
        self._answer(status, content, Content_Length=str(len(content)), **about)

    def _upload(self, content: bytes) -> None:
        """An object in several parts: begin, each part, end."""
        if "uploads" in self.query:
            name = f"upload-{len(self.server.requests)}"
            self.server.uploads[name] = {}
            about = f"<Key>{escape(self.key)}</Key><UploadId>{name}</UploadId>"
            self._xml(200, f"<InitiateMultipartUploadResult {XMLNS}>{about}</InitiateMultipartUploadResult>")
        elif self.command == "PUT":
            number = int(self.query["partNumber"])
            self.server.uploads[self.query["uploadId"]][number] = content
            self._answer(200, ETag=f'"{number}"')
        elif self.command == "POST":
            parts = self.server.uploads.pop(self.query["uploadId"])
            self.objects[self.key] = b"".join(parts[number] for number in sorted(parts))
            about = f'<Key>{escape(self.key)}</Key><ETag>"0"</ETag>'
            self._xml(200, f"<CompleteMultipartUploadResult {XMLNS}>{about}</CompleteMultipartUploadResult>")
        else:
            self.server.uploads.pop(self.query["uploadId"], None)
            self._answer(204)
