"""Where this package keeps what it can make or fetch again."""

import os
from pathlib import Path

from hrm_ray.errors import UserError


def cache_dir() -> Path:
    """HRM_RAY_CACHE, by default ~/.cache/hrm_ray. A UserError where there is no home."""
    try:
        return Path(os.environ.get("HRM_RAY_CACHE") or "~/.cache/hrm_ray").expanduser()
    except RuntimeError:
        raise UserError("there is no home folder to keep files in; set HRM_RAY_CACHE to a folder") from None
