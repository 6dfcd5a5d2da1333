"""Files of a run on a local folder or any pyarrow filesystem, whole or not there at all.

Methods raise OSError where the storage says no: of a remote one a StorageError, which is one line for the user.
"""

import errno
import os
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote, unquote

from pyarrow import fs as pafs

from hrm_ray.errors import UserError
from hrm_ray.remote import filesystem_of, reaching, unreachable
from hrm_ray.storage.lock import FileLock, Lease, Lock, Unconditional, Unlocked, store_of

if TYPE_CHECKING:
    from obstore.store import ObjectStore

Kind = Literal["file", "folder", "other"]
ASIDE = r"\.[0-9a-f]{8}\.tmp"  # what `write` adds to a name until the file is whole


class Storage:
    """A folder, given as a local path or a URI (s3://, gs://, file://, ...).

    Names are relative to it, with forward slashes.
    """

    def __init__(self, where: str | Path):
        text = str(where)
        self._is_uri = "://" in text
        uri = text if self._is_uri else Path(text).absolute().as_uri()
        self._fs, self._root = filesystem_of(uri, f"storage {text}")
        self._where = text if self._is_uri else str(Path(text).absolute())
        self._lock = Lock()

    def __str__(self) -> str:
        return self._where

    def __truediv__(self, name: str) -> "Storage":
        folder, options = self._parts
        return Storage(f"{folder}/{quote(name) if self._is_uri else name}{options}").held_by(self._lock)

    @property
    def name(self) -> str:
        """The folder's own name."""
        name = self._parts[0].rpartition("/")[2]
        return unquote(name) if self._is_uri else name

    @property
    def parent(self) -> "Storage":
        """The folder that holds this one."""
        folder, options = self._parts
        return Storage(f"{folder.rpartition('/')[0] or '/'}{options}")

    @property
    def _parts(self) -> tuple[str, str]:
        """The address without a slash at its end, and its options: those of a URI follow a question mark."""
        if not self._is_uri:
            return self._where.rstrip("/"), ""
        folder, mark, query = self._where.partition("?")
        return folder.rstrip("/"), mark + query

    def create(self) -> None:
        """Make the folder, if need be."""
        with self._reaching():
            self._fs.create_dir(self._root, recursive=True)

    def _reaching(self) -> AbstractContextManager[None]:
        """Around everything that pyarrow does on a remote storage."""
        return nullcontext() if self.local_path else reaching(self._where, f"storage {self}")

    @property
    def local_path(self) -> Path | None:
        """The folder itself if it is on a local filesystem."""
        return Path(self._root) if isinstance(self._fs, pafs.LocalFileSystem) else None

    @property
    def _has_folders(self) -> bool:
        """Whether a file needs a folder to be in; on an object store its name is all there is."""
        return self._fs.type_name not in ("s3", "gcs", "abfs")

    def write(self, name: str, content: bytes | Iterable[bytes | memoryview]) -> None:
        """Make the file `name`: readers see all of it or none, also after a power cut.

        Args:
            content: all of it, or its pieces in turn. On a remote storage, a file may stay cut short where making a
                piece fails.
        """
        pieces = [content] if isinstance(content, bytes) else content
        self._lock.check()
        path = f"{self._root}/{name}"
        if self.local_path is not None and Path(path).is_symlink():
            path = os.path.realpath(path)  # a user's link stays; what it points to is written
        if self._has_folders:
            with self._reaching():
                self._fs.create_dir(path.rpartition("/")[0], recursive=True)
        if self.local_path is None:  # object stores publish on close
            with self._reaching(), self._fs.open_output_stream(path) as stream:
                for piece in pieces:
                    stream.write(piece)
            return
        aside = Path(f"{path}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            with _naming(path), aside.open("wb") as file:
                for piece in pieces:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
            _sync_folder(aside.parent)
        finally:
            aside.unlink(missing_ok=True)

    def append(self, name: str, text: str) -> None:
        """Add to the end of the file `name`; on storage that cannot append, by writing the whole file again."""
        if self.local_path is None:
            self.write(name, (self.read(name) or b"") + text.encode())
            return
        path = self.local_path / name
        with _naming(path), path.open("a") as stream:
            stream.write(text)

    def sync(self, name: str) -> None:
        """Make a local file last through a power cut."""
        with Path(self._root, name).open("rb") as stream:
            os.fsync(stream.fileno())

    def read(self, name: str) -> bytes | None:
        """The content of the file `name`, or None if there is none.

        Raises:
            OSError: something else has that name, or it may not be read.
        """
        try:
            with self.opened(name) as stream:
                return stream.read()
        except FileNotFoundError:
            return None

    @contextmanager
    def opened(self, name: str) -> Iterator[Any]:
        """The file `name`, to be read from its start. Raises as `read` does, and FileNotFoundError."""
        if self.local_path is not None:
            path = self.local_path / name
            if path.exists() and not path.is_file():  # to open a pipe would wait for its writer
                raise OSError(errno.EINVAL, "is not a file", str(path))
        with self._reaching(), self._fs.open_input_stream(f"{self._root}/{name}") as stream:
            yield stream

    def lock(
        self,
        wait_s: float = 20,
        taken: str | None = None,
        *,
        owner: str | None = None,
        say: Callable[[str], object] = lambda text: None,
    ) -> Lock:
        """Keep other processes off this folder until the lock is closed or this process ends.

        Args:
            wait_s: how long to wait for another process, since the workers of a killed driver live on for some
                seconds. On a remote storage any time but 0 means: until it is clear whether its holder lives.
            taken: the message if another process has it.
            owner: for whom; on a remote storage, one process after another of the same owner may take it.
            say: told once, if there is a long wait.

        Raises:
            UserError: another process has it, or something else is in its place.
        """
        taken = taken or f"another process is training {self}; stop it, or choose another run_name="
        if self.local_path is not None:
            self.check_places(files=["lock"])
            self.local_path.mkdir(parents=True, exist_ok=True)
            return FileLock(self.local_path / "lock", wait_s, taken)
        try:
            return Lease(
                self.object_store(),
                str(self),
                owner=owner or uuid.uuid4().hex,
                waits=wait_s > 0,
                taken=taken,
                say=say,
            )
        except Unconditional as why:
            return Unlocked(
                f"{self} cannot keep other processes off ({why}); see to it that only one trains here"
            )

    def object_store(self) -> "ObjectStore":
        """This folder for obstore, which can write under a condition. Raises Unconditional if it does not know it."""
        return store_of(self._where, self._fs)

    def check_held(self) -> None:
        """Ask the lock that this folder is held by; raises as it does."""
        self._lock.check()

    def held_by(self, lock: Lock) -> "Storage":
        """The same folder, for who holds it: everything that is written through it asks the lock first."""
        held = copy(self)
        held._lock = lock
        return held

    @property
    def free_bytes(self) -> int | None:
        """Room on the disk; None if the storage does not say."""
        return shutil.disk_usage(self.local_path).free if self.local_path else None

    def set_aside(self, word: str) -> "Storage":
        """Rename the folder to NAME-WORD-N, with N one more than any that is there; returns it under its new name.

        What has its name may also be a file or a link.

        Raises:
            UserError: it is not on a local filesystem.
        """
        if self.local_path is None:
            raise UserError(
                f"{self} cannot be renamed on this storage; move it away, or choose another run_name="
            )
        numbers = numbered(self.parent.entries(), f"{self.name}-{word}-")
        aside = f"{self.name}-{word}-{max(numbers, default=0) + 1}"
        self.local_path.rename(self.local_path.with_name(aside))
        return self.parent / aside

    def sizes(self) -> dict[str, int]:
        """Bytes of the files directly inside, by name."""
        selector = pafs.FileSelector(self._root, allow_not_found=True)
        with self._reaching():
            entries = self._fs.get_file_info(selector)
        return {entry.base_name: entry.size for entry in entries if entry.type == pafs.FileType.File}

    def files(self) -> dict[str, int]:
        """Bytes of all files inside, however deep, by their names in this folder."""
        selector = pafs.FileSelector(self._root, allow_not_found=True, recursive=True)
        with self._reaching():
            entries = self._fs.get_file_info(selector)
        inside = len(self._root.rstrip("/")) + 1
        return {entry.path[inside:]: entry.size for entry in entries if entry.type == pafs.FileType.File}

    def create_file(self, name: str, content: bytes) -> bool:
        """Make the file `name` of a remote storage if there is none; returns whether it has this content now.

        Where the storage knows no conditions, another process may do the same between a look and the write.
        """
        import obstore
        from obstore import exceptions

        self._lock.check()
        try:
            store = self.object_store()
        except Unconditional:
            if (found := self.read(name)) is None:
                self.write(name, content)
            return found in (None, content)
        try:
            obstore.put(store, name, content, mode="create")
        except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
            return self.read(name) == content  # written by an earlier try, of which no answer came
        except (exceptions.BaseError, OSError) as error:
            raise unreachable(f"{self}/{name}", error) from None
        return True

    def exists(self) -> bool:
        with self._reaching():
            return self._fs.get_file_info(self._root).type == pafs.FileType.Directory

    def folders(self) -> list[str]:
        """Names of the folders directly inside."""
        selector = pafs.FileSelector(self._root, allow_not_found=True)
        with self._reaching():
            entries = self._fs.get_file_info(selector)
        return sorted(entry.base_name for entry in entries if entry.type == pafs.FileType.Directory)

    def entries(self) -> dict[str, Kind]:
        """What lies directly inside, by name; a link is neither a file nor a folder. Nothing, if there is no folder."""
        if self.local_path is None:
            with self._reaching():
                found = self._fs.get_file_info(pafs.FileSelector(self._root, allow_not_found=True))
            kinds: dict[Any, Kind] = {pafs.FileType.File: "file", pafs.FileType.Directory: "folder"}
            return {entry.base_name: kinds.get(entry.type, "other") for entry in found}
        try:
            with os.scandir(self.local_path) as entries:
                return {entry.name: _kind(entry) for entry in entries}
        except FileNotFoundError:
            return {}

    def delete_if_empty(self) -> None:
        """Remove the folder itself if nothing is in it."""
        if self.local_path is not None:
            with suppress(OSError):  # it is not empty, is a link, or is gone
                self.local_path.rmdir()
        elif not self.entries():
            with suppress(FileNotFoundError), self._reaching():
                self._fs.delete_dir(self._root)

    def delete_file(self, name: str) -> None:
        """Remove the file `name`, if it is there."""
        self._lock.check()
        with suppress(FileNotFoundError), self._reaching():
            self._fs.delete_file(f"{self._root}/{name}")

    def sweep(self, names: Collection[str]) -> None:
        """Remove what killed processes left of writing `names` to a local folder. No other process may write there."""
        if self.local_path is None:
            return
        left = re.compile(f"({'|'.join(map(re.escape, names))}){ASIDE}")
        for name, kind in self.entries().items():
            if kind == "file" and left.fullmatch(name):
                self.delete_file(name)

    def check_places(self, *, files: Iterable[str] = (), folders: Iterable[str] = ()) -> None:
        """Make sure that a local folder, and what is to be written in it, can be.

        Raises:
            UserError: something else has one of the names, or it may not be read and written.
        """
        if self.local_path is None:
            return
        _check_place(self.local_path, is_folder=True)
        for name in files:
            _check_place(self.local_path / name, is_folder=False)
        for name in folders:
            _check_place(self.local_path / name, is_folder=True)


def numbered(names: Iterable[str], prefix: str) -> list[int]:
    """The numbers behind `prefix` in those of `names` that are it and a number, in ascending order."""
    matches = (re.fullmatch(rf"{re.escape(prefix)}([0-9]+)", name) for name in names)
    return sorted(int(match[1]) for match in matches if match)


def _kind(entry: os.DirEntry) -> Kind:
    if entry.is_file(follow_symlinks=False):
        return "file"
    return "folder" if entry.is_dir(follow_symlinks=False) else "other"


def _check_place(path: Path, *, is_folder: bool) -> None:
    what = "folder" if is_folder else "file"
    mend = "move it away, or choose another run_name="
    if not path.exists():
        if path.is_symlink():
            raise UserError(f"{path} is a link to nothing, where a {what} is to be; {mend}")
    elif not (path.is_dir() if is_folder else path.is_file()):
        raise UserError(f"{path} is not a {what}; {mend}")
    elif not os.access(path, os.R_OK | os.W_OK | (os.X_OK if is_folder else 0)):
        raise UserError(
            f"{path}: no permission to read and write it; allow that, or choose another run_name="
        )


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """What the disk says no to while a file is written names the file, as it does by itself where one is opened."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)
        raise


def _sync_folder(folder: Path) -> None:
    """Make renames in it last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_full(error: OSError) -> bool:
    """Whether a write failed because the disk, the user's quota or the limit on file sizes left no space."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
