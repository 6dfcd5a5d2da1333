"""Optuna's journal on an object storage, which cannot append to a file: one small object an entry.

Entries are numbered. Each is written under the next number, on the condition that nobody has written there yet; who is
second takes the number after it. So all processes read the same entries in the same order, and none is lost.
"""

import json
import time
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from optuna.storages.journal import BaseJournalBackend

from hrm_ray.errors import UserError, first_line
from hrm_ray.remote import StorageError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

LOOK_S = 1.0  # how often it is asked whether another process has written
CONFLICTS = 5  # after which writing an entry is given up
AT_ONCE = 32  # entries that are read at the same time


class ObjectJournal(BaseJournalBackend):
    """The journal whose entries are the objects of `store`.

    Args:
        store: of the folder of the entries.
        where: it, for messages.
    """

    def __init__(self, store: "ObjectStore", where: str):
        self._store, self._where = store, where
        self._logs: list[dict[str, Any]] = []
        self._num_entries = 0
        self._looked_at = -LOOK_S

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write an entry. Raises StorageError."""
        identity, num_conflicts = uuid.uuid4().hex, 0
        content = json.dumps({"id": identity, "logs": logs}, separators=(",", ":")).encode()
        while not self._created(content):
            found = self._read_next()
            if identity in found:  # it was written before, and no answer came
                return
            num_conflicts += not found  # as S3 answers where two write at the same time
            if num_conflicts > CONFLICTS:
                raise StorageError(
                    f"{self._where}: entry {self._num_entries} can be neither written nor read"
                )
        self._num_entries += 1
        self._logs.extend(logs)

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        """The logs of all entries from that number on. Raises StorageError, or UserError for a damaged entry."""
        now = time.monotonic()
        if now - self._looked_at > LOOK_S:
            self._read_next()
            self._looked_at = now
        return iter(self._logs[log_number_from:])

    def _created(self, content: bytes) -> bool:
        """Whether the next entry could be written; not if there is one."""
        import obstore
        from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

        try:
            obstore.put(self._store, _name(self._num_entries), content, mode="create")
            return True
        except (AlreadyExistsError, PreconditionError):
            return False
        except (BaseError, OSError) as error:
            raise StorageError(f"{self._where}: {first_line(error)}") from None

    def _read_next(self) -> list[str]:
        """Read what has come since; returns the identities of the entries."""
        found: list[str] = []
        with ThreadPoolExecutor(AT_ONCE) as pool:
            at_once = 1  # there is seldom more, but in the beginning
            while True:
                numbers = range(self._num_entries, self._num_entries + at_once)
                for content in pool.map(self._content, numbers):
                    if content is None:
                        return found
                    found.append(self._take(content))
                at_once = AT_ONCE

    def _content(self, number: int) -> bytes | None:
        import obstore
        from obstore.exceptions import BaseError

        try:
            return bytes(obstore.get(self._store, _name(number)).bytes())
        except FileNotFoundError:
            return None
        except (BaseError, OSError) as error:
            raise StorageError(f"{self._where}: {first_line(error)}") from None

    def _take(self, content: bytes) -> str:
        try:
            entry = json.loads(content)
            identity, logs = entry["id"], entry["logs"]
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f"{self._where}/{_name(self._num_entries)} is damaged; restore it from a copy, or choose another "
                "run_name="
            ) from None
        self._logs.extend(logs)
        self._num_entries += 1
        return identity


def _name(number: int) -> str:
    return f"{number:08d}.json"
