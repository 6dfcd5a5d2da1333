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


def cache_bytes() -> float:
    """How much of other machines' data is kept: HRM_RAY_CACHE_GB, in GB of 10^9 bytes, by default 100."""
    given = os.environ.get("HRM_RAY_CACHE_GB") or "100"
    try:
        found = float(given) * 1e9
    except ValueError:
        found = -1.0
    if not found > 0:
        raise UserError(f"HRM_RAY_CACHE_GB={given} is no number of GB above 0; set it, or unset it for 100")
    return found
