"""Datasets of other filesystems (s3://, gs://, ...), copied to this machine once a node."""

import fcntl
import hashlib
from collections.abc import Iterator
from pathlib import Path

from pyarrow import fs as pafs

from hrm_ray.cache import cache_dir
from hrm_ray.data.files import delete_matching, sha256, write_durably, writing
from hrm_ray.data.format import OUR_FILES, File, parse_manifest
from hrm_ray.errors import UserError
from hrm_ray.manifest import MANIFEST
from hrm_ray.remote import filesystem_of, reaching

_COPY_AGAIN = "copy the dataset there again"


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
    with writing(target, "set HRM_RAY_CACHE to another folder"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with (target.parent / f"{target.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_dir():
                aside = target.with_suffix(".partial")
                delete_matching(aside, OUR_FILES)
                for entry in manifest.files:
                    _fetch(filesystem, folder, entry, aside, uri)
                write_durably(aside / MANIFEST, content)
                aside.rename(target)
    return target


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
