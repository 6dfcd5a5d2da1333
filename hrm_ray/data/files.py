"""Files: written whole or not at all, hashed, and what the disk says no to."""

import errno
import fcntl
import hashlib
import mmap
import os
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hrm_ray.errors import UserError, first_line

_DIRECT = getattr(os, "O_DIRECT", 0)  # not everywhere
_PAGE_BYTES = 4096  # what is read or written past the page cache begins at a multiple of it
_PIECE_BYTES = 1 << 20  # at once; the processor's cache holds it from the copy to the hash


class _PastCache:
    """An open file that is written or read past the page cache, in pieces, where the file system can do that.

    A file of gigabytes would push from the page cache what others read, and be copied once more; on a virtual machine
    which gets its memory page by page, that takes longer than the disk does.
    """

    def __init__(self, path: Path, flags: int):
        try:
            self._fd = os.open(path, flags | _DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._fd = os.open(path, flags, 0o666)
        # Of a mapping, since what goes past the page cache must begin at a page.
        self._piece = np.frombuffer(mmap.mmap(-1, _PIECE_BYTES), np.uint8)
        self.closed = False

    def _transfer(self, call: Callable[[int, Any], int], buffer: Any) -> int:
        """Read or write; returns how many bytes. Goes through the page cache from here on if it must."""
        try:
            return call(self._fd, buffer)
        except OSError as error:
            flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
            if error.errno != errno.EINVAL or not flags & _DIRECT:
                raise
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags & ~_DIRECT)
            return call(self._fd, buffer)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            os.close(self._fd)


class HashingFile(_PastCache):
    """A new file that computes the SHA-256 of what is written to it, and is on the disk when it is closed."""

    def __init__(self, path: Path):
        super().__init__(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._hash = hashlib.sha256()
        self._filled = 0
        self.size = 0

    def write(self, data: Any) -> None:
        """Bytes, or something else whose bytes lie one behind the other."""
        content = np.frombuffer(data, np.uint8)
        start = 0
        while start < len(content):
            part = content[start : start + _PIECE_BYTES - self._filled]
            self._piece[self._filled : self._filled + len(part)] = part
            start += len(part)
            self._filled += len(part)
            if self._filled == _PIECE_BYTES:
                self._drain()

    def _drain(self) -> None:
        self._hash.update(self._piece[: self._filled].data)
        self.size += self._filled
        left = self._piece[
            : -(-self._filled // _PAGE_BYTES) * _PAGE_BYTES
        ]  # whole pages; `close` cuts off the rest
        while len(left):
            left = left[self._transfer(os.write, left) :]
        self._filled = 0

    def close(self) -> None:
        try:
            if not self.closed:
                self._drain()
                os.ftruncate(self._fd, self.size)
                os.fsync(self._fd)
        finally:
            super().close()

    def hexdigest(self) -> str:
        """Of all that was written; asked for when the file is closed."""
        return self._hash.hexdigest()


class ComparingFile(_PastCache):
    """A file that is compared with what is "written" to it; `is_same` says, at the end, whether it holds just that."""

    def __init__(self, path: Path):
        super().__init__(path, os.O_RDONLY)
        self._left = self._piece[:0]  # of what has been read
        self.is_same = True

    def write(self, data: Any) -> None:
        """Bytes, or something else whose bytes lie one behind the other."""
        content = np.frombuffer(data, np.uint8)
        start = 0
        while start < len(content) and self.is_same:
            self._read()
            part = content[start : start + len(self._left)]
            self.is_same = bool(len(part)) and np.array_equal(part, self._left[: len(part)])
            self._left = self._left[len(part) :]
            start += len(part)

    def _read(self) -> None:
        if not len(self._left):
            self._left = self._piece[: self._transfer(os.readv, [self._piece])]

    def close(self) -> None:
        if not self.closed:
            self._read()
            self.is_same = self.is_same and not len(self._left)
        super().close()


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write which is at `path` whole or not at all: written aside, flushed to disk, renamed at the end."""
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")  # a name that nobody else has
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_durably(path: Path, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all."""
    with whole_file(path) as file:
        file.write(content)


def check_replaceable(file: Path, key: str, what: str, is_one: Callable[[Path], bool]) -> None:
    """Raise UserError unless `file` can be written without losing something else: it is not there, or `what`.

    Args:
        key: that gave the file, for the message.
        what: is written, such as "submission".
        is_one: whether an ordinary file that is there is `what`.
    """
    if file.is_dir():
        raise UserError(f"{key}={file} is a folder; give a file")
    if not file.parent.is_dir():
        raise UserError(f"{key}={file}: there is no folder {file.parent}")
    if os.path.lexists(file) and not (file.is_file() and is_one(file)):
        raise UserError(f"{key}={file} is there, and no {what}; move it away, or give another {key}=")


def delete_matching(root: Path, names: re.Pattern[str]) -> None:
    """Delete the files in a folder whose paths in it match `names`, and the folders in it that are empty then.

    What else is there stays, links too.
    """
    for path in sorted(root.rglob("*"), reverse=True):  # what is in a folder before the folder
        if path.is_symlink():
            continue
        if path.is_dir():
            with suppress(OSError):
                path.rmdir()
        elif names.fullmatch(path.relative_to(root).as_posix()):
            path.unlink()


@contextmanager
def writing(folder: Path, otherwise: str = "pick another out") -> Iterator[None]:
    """Turns what the disk says no to into a UserError that names `folder`."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UserError(f"cannot write to {folder}: {reason}; fix it, or {otherwise}") from None


def sha256(path: Path) -> str:
    """Of the content of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
