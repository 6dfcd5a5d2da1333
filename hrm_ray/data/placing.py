"""Where a dataset is built, and how it comes to a URI: whole or not at all.

An object storage cannot rename a folder. So a dataset for a URI is built on this machine's disk, checked there, and
copied; its manifest, without which nothing is a dataset, comes last, and only if there is none. While it is built and
copied, a lease keeps other builds off that place (see `storage.lock`), and a lock those of this machine, also where
the storage can hold no lease. A finished dataset that could not be copied stays on the disk: the same command again
copies it. If that command never comes, another build deletes it after some days.
"""

import fcntl
import hashlib
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from tqdm import tqdm

from hrm_ray.cache import cache_dir
from hrm_ray.data.files import delete_matching, writing
from hrm_ray.data.format import OUR_FILES, UNFINISHED, Manifest, parse_manifest
from hrm_ray.data.shards import read_manifest
from hrm_ray.errors import UserError
from hrm_ray.manifest import MANIFEST
from hrm_ray.remote import StorageError
from hrm_ray.storage.lock import NAME as LEASE
from hrm_ray.storage.storage import Storage

AT_ONCE = 4  # files that are copied at the same time
KEPT_S = 7 * 24 * 3600.0  # how long a build that was not copied stays on the disk


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
    content = Storage(out).read(MANIFEST)
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
    place = Storage(out)
    _check_replaceable(place, overwrite)
    taken = f"another process is building {out}; wait for it, or pick another out="
    staged = cache_dir() / "builds" / hashlib.sha256(str(out).encode()).hexdigest()[:16]
    with writing(staged, "set HRM_RAY_CACHE to another folder"):
        staged.parent.mkdir(parents=True, exist_ok=True)
        own = _locked(staged)
    if own is None:
        raise UserError(taken)
    with own:
        _delete_old(staged.parent)
        with _copied(staged, place, overwrite, show_progress, taken):
            yield staged


@contextmanager
def _copied(staged: Path, place: Storage, overwrite: bool, show_progress: bool, taken: str) -> Iterator[None]:
    """Moves the dataset `staged` to `place` when the block has made it; a lease holds the place as long."""
    lock = place.lock(taken=taken, say=_say)
    try:
        if lock.weakness is not None:
            _say(f"warning: {place} cannot keep other builds off ({lock.weakness})")
        held = place.held_by(lock)
        yield
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


def _locked(staged: Path) -> IO[str] | None:
    """The lock of a build on this machine, until it is closed; None if another process has it."""
    lock = staged.with_name(f"{staged.name.partition('.')[0]}.lock").open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def _delete_old(builds: Path) -> None:
    """Delete builds that no process has worked on for `KEPT_S`."""
    for folder in builds.iterdir():
        with suppress(OSError):  # another process may do the same, or begin that build
            if not folder.is_dir() or time.time() - folder.stat().st_mtime < KEPT_S:
                continue
            if (lock := _locked(folder)) is not None:
                with lock:
                    delete_matching(folder, OUR_FILES)
                    folder.rmdir()


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _check_replaceable(place: Storage, overwrite: bool) -> dict[str, int]:
    """The files in a place where a dataset is to be put; all are of a dataset, or of a build that has ended.

    Raises:
        UserError: something else is there, or a dataset without `overwrite`.
    """
    files = place.files()
    files.pop(LEASE, None)
    if strange := [name for name in files if not OUR_FILES.fullmatch(name)]:
        raise UserError(f"out={place} holds {strange[0]}, which is not of a dataset; pick another out=")
    if MANIFEST in files and not overwrite:
        raise UserError(f"out={place} already holds another dataset; give another out=, or overwrite=true")
    if files and MANIFEST not in files and UNFINISHED not in files:
        raise UserError(f"out={place} is a folder with other things in it; pick another out=")
    return files


def _copy(staged: Path, place: Storage, overwrite: bool, show_progress: bool) -> None:
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
