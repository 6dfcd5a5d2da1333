"""What is inside a file, however it was saved: text in any usual encoding, packed with gzip, bzip2, xz or zip.

The content decides, not the name: Windows writes .CSV, and browsers unpack or rename what they download. A path may
lead into a zip file (`puzzles.zip/train.csv`).
"""

import bz2
import codecs
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

import pyarrow as pa

from hrm_ray.errors import UserError, first_line, shown

HEAD_BYTES = 1 << 18  # what is looked at to find out how a file is written

_ZIP = b"PK\x03\x04", b"PK\x05\x06"  # the latter is empty
_PACKED: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
_MAX_LAYERS = 4  # a zip in a gzip in a zip in ...
_MARKS = {
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
_CONTROLS = bytes(set(range(32)) - set(b"\t\n\r\f\x1a"))  # \x1a ends a file of DOS


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns whatever a damaged file can raise into a UserError that names `path`."""
    try:
        yield
    except (pa.ArrowException, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's; those of readers have none
            raise
        reason = shown(first_line(error), 200)
        raise UserError(f"{path} is damaged, or cut short: {reason}; fetch or write it again") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply") from None


@contextmanager
def open_unpacked(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked.

    Raises:
        UserError: a zip that holds several files (or a spreadsheet), or one that is packed too often.
    """
    file, member = split_member(path)
    with ExitStack() as stack:
        stream: Any = stack.enter_context(file.open("rb"))
        for _ in range(_MAX_LAYERS):
            magic = stream.peek(8)
            if magic.startswith(_ZIP):
                archive = stack.enter_context(zipfile.ZipFile(stream))
                try:
                    stream = stack.enter_context(archive.open(member or _only_member(path, archive)))
                except (NotImplementedError, RuntimeError) as error:  # an unknown method, a password
                    raise UserError(
                        f"{path}: {first_line(error)}; unpack it, and name the file in it"
                    ) from None
                member = None
                continue
            unpack = next((unpack for start, unpack in _PACKED.items() if magic.startswith(start)), None)
            if unpack is None:
                yield stream
                return
            stream = stack.enter_context(unpack(stream))
        raise UserError(f"{path} is packed more than {_MAX_LAYERS} times; unpack it")


def split_member(path: Path) -> tuple[Path, str | None]:
    """The file on the disk, and the name inside it where `path` leads into a zip file."""
    for parent in path.parents:
        if parent.is_file() and zipfile.is_zipfile(parent):
            return parent, path.relative_to(parent).as_posix()
    return path, None


def is_file(path: Path) -> bool:
    """Whether `path` names a file, on the disk or in a zip file."""
    file, member = split_member(path)
    return path.is_file() or (member is not None and member in members(file))


def members(path: Path) -> list[str]:
    """The names of the files in a zip; none if `path` is no zip file."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return []
    with reading(path), zipfile.ZipFile(path) as archive:
        return _files_in(archive)


def _files_in(archive: zipfile.ZipFile) -> list[str]:
    names = [info.filename for info in archive.infolist() if not info.is_dir()]
    return [
        name for name in names if not name.startswith("__MACOSX/") and not Path(name).name.startswith(".")
    ]


def _only_member(path: Path, archive: zipfile.ZipFile) -> str:
    names = _files_in(archive)
    if {"[Content_Types].xml", "content.xml"} & set(names):
        raise UserError(f"{path} is a spreadsheet or a document; save its puzzles as CSV")
    if len(names) != 1:
        if not names:
            raise UserError(f"{path} holds no files")
        some = ", ".join(shown(name) for name in names[:5]) + ", ..." * (len(names) > 5)
        raise UserError(f"{path} holds {len(names)} files ({some}); name one, as {path}/{shown(names[0])}")
    return names[0]


def encoding_of(path: Path, head: bytes) -> str:
    """The encoding of a text that begins with `head`. Raises UserError if it is no text."""
    for mark, encoding in _MARKS.items():
        if head.startswith(mark):
            return encoding
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a pointer of Git LFS, not the file itself; run: git lfs pull")
    zeros = [head[first::2].count(0) for first in (0, 1)]
    half = len(head) // 2
    if half > 1 and max(zeros) > 0.9 * half and min(zeros) == 0:
        return "utf-16-be" if zeros[0] else "utf-16-le"
    num_controls = len(head) - len(head.translate(None, _CONTROLS))
    if any(zeros) or num_controls > 3 + len(head) // 100:
        raise UserError(
            f"{path} is no text file, and no JSON, Parquet, gzip or zip file; save the puzzles as CSV or text"
        )
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # the last character may be cut
    except UnicodeDecodeError:
        return "cp1252"  # of Windows; others differ in remarks only
    return "utf-8-sig"


@contextmanager
def open_text(path: Path, encoding: str) -> Iterator[IO[str]]:
    """The text of a file, lines ending in ``\\n``. Bytes that are none in the encoding are replaced."""
    with open_unpacked(path) as stream, io.TextIOWrapper(stream, encoding, errors="replace") as text:
        yield text


@contextmanager
def open_utf8(path: Path, encoding: str) -> Iterator[str | BinaryIO]:
    """The text of a file for a reader of UTF-8: where it lies as it is, its path, which reads fastest."""
    if not encoding.startswith("utf-8"):
        with open_text(path, encoding) as text:
            yield io.BytesIO(text.read().encode())
        return
    with open_unpacked(path) as stream:
        if isinstance(stream, io.BufferedReader) and path.is_file():
            yield str(path)
        else:
            yield stream
