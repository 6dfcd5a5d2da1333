"""Files: written whole or not at all, hashed, and what the disk says no to."""

import hashlib
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from hrm_ray.errors import UserError, first_line


class HashingFile:
    """A file that computes the SHA-256 of what is written to it."""

    def __init__(self, path: Path):
        self._file = path.open("wb")
        self._hash = hashlib.sha256()
        self.size = 0
        self.closed = False

    def write(self, data: Any) -> int:
        self._hash.update(data)
        self._file.write(data)
        size = memoryview(data).nbytes
        self.size += size
        return size

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        if not self.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self.closed = True

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


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
