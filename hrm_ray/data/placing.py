"""Where a dataset is built, and how it comes to a URI: whole or not at all.

An object storage cannot rename a folder. So a dataset for a URI is built on this machine's disk, checked there, and
copied; its manifest, without which nothing is a dataset, comes last, and only if there is none. While it is built and
copied, a lease keeps other builds off that place (see `training.lock`). A finished dataset that could not be copied
stays on the disk: the same command again copies it.
"""

import hashlib
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from hrm_ray.cache import cache_dir
from hrm_ray.data.files import delete_matching
from hrm_ray.data.format import OUR_FILES, UNFINISHED, Manifest, parse_manifest
from hrm_ray.data.shards import read_manifest
from hrm_ray.errors import UserError
from hrm_ray.manifest import MANIFEST
from hrm_ray.remote import StorageError

if TYPE_CHECKING:
    from hrm_ray.training.storage import Storage

AT_ONCE = 4  # files that are copied at the same time


def is_remote(out: str | Path) -> bool:
    """Whether `out` is a URI. Raises UserError for one of this machine's disk."""
    if str(out).startswith("file:"):
        raise UserError(f"out={out}: a local folder is given by its path; leave out file://")
    return "://" in str(out)


def manifest_at(out: str | Path) -> Manifest | None:
    """The manifest of the dataset in `out`, a folder or URI; None if there is none. Raises UserError, StorageError."""
    if not is_remote(out):
        folder = Path(out)
        return read_manifest(folder) if (folder / MANIFEST).is_file() else None
    content = _storage(out).read(MANIFEST)
    return (content and parse_manifest(content, f"{out}: {MANIFEST}", "give overwrite=true")) or None


@contextmanager
def placed(out: str | Path, *, overwrite: bool = False, show_progress: bool = True) -> Iterator[Path]:
    """Yields a local folder to build a dataset in; when the block ends without an error, the dataset is in `out`.

    Where `out` is local, that is the folder. Else the folder may hold the finished dataset of an earlier try.

    Raises:
        UserError: `out` holds something else, or another process is building there.
        StorageError: it cannot be reached.
    """
    if not is_remote(out):
        yield Path(out)
        return
    place = _storage(out)
    _check_replaceable(place, overwrite)
    lock = place.lock(taken=f"another process is building {out}; wait for it, or pick another out=", say=_say)
    try:
        if lock.weakness is not None:
            _say(f"warning: {out} cannot keep other builds off ({lock.weakness})")
        held = place.held_by(lock)
        staged = cache_dir() / "builds" / hashlib.sha256(str(out).encode()).hexdigest()[:16]
        yield staged
        try:
            _copy(staged, held, overwrite, show_progress)
        except StorageError as error:
            raise StorageError(
                f"{error}; the finished dataset is kept in {staged}, and the same command copies it"
            ) from None
        with suppress(OSError):  # it is in place
            delete_matching(staged, OUR_FILES)
            staged.rmdir()
    finally:
        lock.close()


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _storage(out: str | Path) -> "Storage":
    from hrm_ray.training.storage import Storage

    return Storage(out)


def _check_replaceable(place: "Storage", overwrite: bool) -> dict[str, int]:
    """The files in a place where a dataset is to be put; all are of a dataset, or of a build that has ended.

    Raises:
        UserError: something else is there, or a dataset without `overwrite`.
    """
    from hrm_ray.training.lock import NAME as LEASE

    files = place.files()
    files.pop(LEASE, None)
    if strange := [name for name in files if not OUR_FILES.fullmatch(name)]:
        raise UserError(f"out={place} holds {strange[0]}, which is not of a dataset; pick another out=")
    if MANIFEST in files and not overwrite:
        raise UserError(f"out={place} already holds another dataset; give another out=, or overwrite=true")
    if files and MANIFEST not in files and UNFINISHED not in files:
        raise UserError(f"out={place} is a folder with other things in it; pick another out=")
    return files


def _copy(staged: Path, place: "Storage", overwrite: bool, show_progress: bool) -> None:
    """Copy a finished dataset to `place`. Raises UserError, StorageError; then no dataset is there."""
    before = _check_replaceable(place, overwrite)  # somebody may have put something there meanwhile
    manifest = read_manifest(staged)
    place.write(UNFINISHED, b"")
    for name in sorted(
        before, key=lambda name: name != MANIFEST
    ):  # the manifest first: then it is no dataset
        if name != UNFINISHED:
            place.delete_file(name)
    total = sum(entry.bytes for entry in manifest.files)
    with (
        tqdm(total=total, desc="copy", unit="B", unit_scale=True, disable=not show_progress) as bar,
        ThreadPoolExecutor(AT_ONCE) as pool,
    ):

        def copy(name: str) -> None:
            content = (staged / name).read_bytes()
            place.write(name, content)
            bar.update(len(content))

        try:
            for done in [pool.submit(copy, entry.file) for entry in manifest.files]:
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # else all the others would be copied first
            raise
    there = place.files()
    if wrong := [entry.file for entry in manifest.files if there.get(entry.file) != entry.bytes]:
        raise StorageError(f"{place}: {wrong[0]} did not arrive whole")
    if not place.create_file(MANIFEST, (staged / MANIFEST).read_bytes()):
        raise UserError(f"another process has built another dataset in {place} meanwhile; pick another out=")
    with suppress(OSError):  # the dataset is whole without that, too
        place.delete_file(UNFINISHED)
