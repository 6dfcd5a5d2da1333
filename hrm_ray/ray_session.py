"""A Ray to work on: the cluster we are part of, or a private one on this machine, kept quiet."""

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def ray_session(object_store_bytes: int | None = None) -> Iterator[None]:
    """Inside, `ray` is initialised; what was started here is shut down at the end.

    RAY_ADDRESS (which Ray sets in jobs) names a cluster to join. Without it a private cluster is started on this
    machine, so that a stray one is never joined by accident; `object_store_bytes` bounds its shared memory.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the coming default; silences a warning
    import ray

    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with _sigterm_handler_kept():
        if os.environ.get("RAY_ADDRESS"):
            ray.init(**quiet)
        else:
            ray.init(
                address="local", include_dashboard=False, object_store_memory=object_store_bytes, **quiet
            )
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _sigterm_handler_kept() -> Iterator[None]:
    """`ray.init` installs a handler of its own for SIGTERM; a caller who has one keeps it, in the meantime too."""
    if signal.getsignal(signal.SIGTERM) in (signal.SIG_DFL, None):
        yield
        return
    from ray._private import utils

    install = utils.set_sigterm_handler
    utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = install
