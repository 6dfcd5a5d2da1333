"""Where this package keeps what it can make or fetch again."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """HRM_RAY_CACHE, by default ~/.cache/hrm_ray."""
    return Path(os.environ.get("HRM_RAY_CACHE") or "~/.cache/hrm_ray").expanduser()
