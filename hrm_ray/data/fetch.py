"""Datasets of other filesystems (s3://, gs://, ...), copied to this machine once a node.

The copies are bounded: those that were not used for the longest time make room for a new one. A process that uses one
holds a shared lock on it until it ends, so that nobody deletes it meanwhile.
"""

import fcntl
import hashlib
import os
from collections.abc import Iterator
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
        lock = _lock_of(target).open("a")
        while True:  # a lock cannot be made weaker without letting go of it for a moment
            fcntl.flock(lock, fcntl.LOCK_SH)
            if target.is_dir():
                break
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_dir():
                aside = target.with_suffix(".partial")
                delete_matching(aside, OUR_FILES)
                _make_room(target, sum(entry.bytes for entry in manifest.files))
                for entry in manifest.files:
                    _fetch(filesystem, folder, entry, aside, uri)
                write_durably(aside / MANIFEST, content)
                aside.rename(target)
        os.utime(_lock_of(target))
        _used[target] = lock
    return target


def _lock_of(entry: Path) -> Path:
    """The file that is locked by who uses or makes an entry of the cache; its time is that of the last use."""
    return entry.with_name(f"{entry.name.removesuffix('.partial')}.lock")


def _make_room(target: Path, num_bytes: int) -> None:
    """Delete other entries of the cache, the longest unused ones first, until so much more fits its bound.

    Raises:
        UserError: it does not, even without all that nobody uses.
    """
    most = cache_bytes()
    others = [path for path in target.parent.iterdir() if path.is_dir() and path != target]
    sizes = {path: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in others}
    for path in sorted(others, key=lambda path: _last_use(_lock_of(path))):
        if sum(sizes.values()) + num_bytes <= most:
            return
        with _lock_of(path).open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            delete_matching(path, OUR_FILES)
            path.rmdir()
            del sizes[path]
    if (needed := sum(sizes.values()) + num_bytes) > most:
        raise UserError(
            f"the copies of datasets in {target.parent} would take {needed / 1e9:.3g} GB, more than "
            f"HRM_RAY_CACHE_GB={most / 1e9:g}; raise it, or set HRM_RAY_CACHE to another folder"
        )


def _last_use(lock: Path) -> float:
    return lock.stat().st_mtime if lock.exists() else 0.0


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
