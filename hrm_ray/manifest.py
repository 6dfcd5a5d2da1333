"""The manifest of a folder: JSON that tells whether a byte of it changed, because its last entry is its own digest.

Data sets and checkpoints name their files, sizes and SHA-256 in one; it is written last and makes the folder valid.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from hrm_ray.errors import UserError

MANIFEST = "manifest.json"


class Damaged(UserError):
    """A file that is not as it was written."""

    @property
    def what(self) -> str:
        """The message without its advice."""
        return str(self).rpartition("; ")[0]


def canonical(values: Mapping[str, Any]) -> bytes:
    """JSON without spaces and in sorted order: equal values give equal bytes."""
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()


def seal(values: Mapping[str, Any]) -> bytes:
    """The bytes of a manifest: readable JSON whose last entry is the SHA-256 of the rest."""
    digest = hashlib.sha256(canonical(values)).hexdigest()
    return (json.dumps({**values, "digest": digest}, indent=2) + "\n").encode()


def unseal(content: bytes, where: str, *, newest_format: int, mend: str) -> dict[str, Any]:
    """The values that `seal` made `content` of; `format_version` is among them.

    Args:
        where: what `content` is, for the message.
        newest_format: the newest `format_version` that the caller reads.
        mend: what to do about a damaged one, for the message.

    Raises:
        Damaged: `content` is not byte for byte what `seal` returned.
        UserError: it is of a newer format.
    """
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise Damaged(f"{where} is damaged: no JSON object; {mend}")
    version = values.get("format_version")
    if type(version) is int and version > newest_format:  # its digest may be of another kind
        raise UserError(
            f"{where} has format {version}, this hrm_ray reads up to {newest_format}; upgrade hrm_ray"
        )
    if values.pop("digest", None) is None:
        raise Damaged(f"{where} is damaged: it has no digest; {mend}")
    if seal(values) != content:
        raise Damaged(f"{where} is damaged: changed after it was written; {mend}")
    return values
