"""Filesystems behind an address: a URI of any that pyarrow knows (s3://, gs://, file://, ...).

What always holds: an address that is wrong, or a storage that does not answer or refuses, ends in one line, and
within seconds.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs as pafs

from hrm_ray.errors import TransientError, UserError, first_line

GOOGLE_RETRY_S = 20  # Google's client would go on trying for 15 minutes; S3's gives up after 6 s
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
}


class StorageError(TransientError, OSError):
    """A storage that does not answer, or refuses. An OSError too, for who can go on without the file."""

    exit_code = 2  # mostly a mistake in its name, or in what its owner may do


def filesystem_of(uri: str, what: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a URI and the path in it; `what` begins the message of an error.

    Raises:
        UserError: a URI that holds a password.
        StorageError: of unknown scheme, or options; for some schemes, a storage that cannot be reached.
    """
    with reaching(uri, what):
        address = urlsplit(uri)
        if address.password is not None:
            raise UserError(
                f"{address.scheme}://...@{address.hostname}{address.path}: keep keys out of the address, which is "
                f"written into the run's files; set {credentials_of(uri)}"
            )
        if address.scheme in ("gs", "gcs") and "retry_limit_seconds=" not in address.query:
            uri += f"{'&' if address.query else '?'}retry_limit_seconds={GOOGLE_RETRY_S}"
        if address.scheme == "s3" and "allow_delayed_open=" not in address.query:
            # Then a small file is one request, and not the three of an upload in parts.
            uri += f"{'&' if address.query else '?'}allow_delayed_open=true"
        return pafs.FileSystem.from_uri(uri)


@contextmanager
def reaching(uri: str, what: str) -> Iterator[None]:
    """Turns what pyarrow says of a storage into one line, which begins with `what`; a missing file stays one."""
    try:
        yield
    except (UserError, FileNotFoundError):
        raise
    except (pa.ArrowException, ValueError, OSError, ImportError) as error:
        raise unreachable(what, error, uri) from None


def unreachable(what: str, error: BaseException, uri: str | None = None) -> StorageError:
    """What a storage said, with what to look at; `what` begins the message, and is the address where none is given."""
    return StorageError(
        f"{what}: {first_line(error)}; check the address, the network and the credentials "
        f"({credentials_of(uri or what)})"
    )


def credentials_of(uri: str) -> str:
    """What a user sets to be let in there."""
    return CREDENTIALS.get(uri.partition("://")[0], "see pyarrow.fs.FileSystem.from_uri")
