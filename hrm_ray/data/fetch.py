"""Datasets of other filesystems (s3://, gs://, ...), copied to this machine once a node.

The copies are bounded: those that were not used for the longest time make room for a new one. A process that uses one
holds a shared lock until it ends, so that nobody deletes it meanwhile.
"""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO

from pyarrow import fs as pafs

from hrm_ray.cache import cache_bytes, cache_dir
from hrm_ray.data.files import delete_matching, sha256, write_durably, writing
from hrm_ray.data.format import OUR_FILES, File, parse_manifest
from hrm_ray.errors import UserError
from hrm_ray.manifest import MANIFEST
from hrm_ray.remote import filesystem_of, reaching

_COPY_AGAIN = "copy the dataset there again"
_used: dict[Path, IO[str]] = {}  # entries that this process uses, with their locks


def local_root(path: str | Path) -> Path:
    """Where the dataset lies on this machine: `path` itself, or the cached copy of a URI.

    Raises:
        UserError: a URI of unknown scheme, unreachable, or without a dataset.
    """
    if "://" not in str(path):
        return Path(path)
    filesystem, inner = filesystem_of(str(path), f"cannot read dataset {path}")
    if isinstance(filesystem, pafs.LocalFileSystem):
        return Path(inner)
    return _cached(filesystem, inner.rstrip("/"), str(path))


def _cached(filesystem: pafs.FileSystem, folder: str, uri: str) -> Path:
    """Copy a remote dataset into the cache, once a node however many processes ask at the same time."""
    try:
        content = b"".join(_chunks(filesystem, f"{folder}/{MANIFEST}", uri))
    except FileNotFoundError:
        raise UserError(f"{uri} has no {MANIFEST}: no dataset, or its build did not finish") from None
    manifest = parse_manifest(content, f"{uri}: {MANIFEST}", _COPY_AGAIN)
    # Named by content: a rebuilt dataset at the same address is another entry.
    target = cache_dir() / "datasets" / hashlib.sha256(content).hexdigest()[:32]
    if target in _used and target.is_dir():
        return target
    with writing(target, "set HRM_RAY_CACHE to another folder"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock_of(target).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_dir():
                aside = target.with_suffix(".partial")
                delete_matching(aside, OUR_FILES)
                _make_room(target, sum(entry.bytes for entry in manifest.files))
                for entry in manifest.files:
                    _fetch(filesystem, folder, entry, aside, uri)
                write_durably(aside / MANIFEST, content)
                aside.rename(target)
            use = _use_of(target).open("a")
            fcntl.flock(use, fcntl.LOCK_SH)
            os.utime(_use_of(target))
            _used[target] = use
    return target


def _lock_of(entry: Path) -> Path:
    """The file that is locked by who makes or deletes an entry of the cache."""
    return entry.with_name(f"{entry.name.removesuffix('.partial')}.lock")


def _use_of(entry: Path) -> Path:
    """The file that is locked, by several at a time, by who uses an entry; its time is that of the last use."""
    return entry.with_name(f"{entry.name.removesuffix('.partial')}.use")


def _make_room(target: Path, num_bytes: int) -> None:
    """Delete other entries of the cache, the longest unused ones first, until so much more fits its bound.

    Raises:
        UserError: it does not, even without all that nobody uses; then nothing is deleted.
    """
    most = cache_bytes()
    with (target.parent / "room.lock").open("a") as room, ExitStack() as stack:
        fcntl.flock(room, fcntl.LOCK_EX)  # one process at a time deletes
        sizes = {path: _size(path) for path in target.parent.iterdir() if path.is_dir()}
        excess, doomed = sum(sizes.values()) + num_bytes - most, []
        for path in sorted(sizes, key=_last_use):
            if excess <= 0:
                break
            try:
                for file in (_lock_of(path), _use_of(path)):
                    fcntl.flock(stack.enter_context(file.open("a")), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # somebody makes it, or uses it
                continue
            doomed.append(path)
            excess -= sizes[path]
        if excess > 0:
            raise UserError(
                f"the copies of datasets in {target.parent} would take {(most + excess) / 1e9:.3g} GB, more than "
                f"HRM_RAY_CACHE_GB={most / 1e9:g}; raise it, or set HRM_RAY_CACHE to another folder"
            )
        for path in doomed:
            delete_matching(path, OUR_FILES)
            with suppress(OSError):  # something else is in it
                path.rmdir()


def _size(folder: Path) -> int:
    """Bytes of what is in a folder; it may be renamed meanwhile."""
    found = 0
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):
            found += file.stat().st_size
    return found


def _last_use(entry: Path) -> float:
    use = _use_of(entry)
    return use.stat().st_mtime if use.exists() else 0.0


def _fetch(filesystem: pafs.FileSystem, folder: str, entry: File, root: Path, uri: str) -> None:
    """Copy one file of the remote dataset `uri` to the folder `root`."""
    local = root / entry.file
    local.parent.mkdir(parents=True, exist_ok=True)
    try:
        with local.open("wb") as copy:
            copy.writelines(_chunks(filesystem, f"{folder}/{entry.file}", uri))
    except FileNotFoundError:
        raise UserError(f"{uri}: {entry.file} is missing; {_COPY_AGAIN}") from None
    if sha256(local) != entry.sha256:
        raise UserError(f"{uri}: {entry.file} is damaged: its SHA-256 is not the manifest's; {_COPY_AGAIN}")


def _chunks(filesystem: pafs.FileSystem, path: str, uri: str) -> Iterator[bytes]:
    """The content of a file of the remote dataset `uri`. Raises FileNotFoundError, StorageError."""
    with reaching(uri, f"cannot read dataset {uri}"), filesystem.open_input_stream(path) as stream:
        while chunk := stream.read(1 << 22):
            yield chunk
