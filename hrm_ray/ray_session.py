"""A Ray to work on: the cluster we are part of, or a private one on this machine, kept quiet."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def ray_session(
    object_store_bytes: int | None = None, env_vars: dict[str, str] | None = None
) -> Iterator[bool]:
    """Inside, `ray` is initialised; what was started here is shut down at the end. Yields whether it was.

    RAY_ADDRESS (which Ray sets in jobs) names a cluster to join. Without it a private cluster is started on this
    machine, so that a stray one is never joined by accident; `object_store_bytes` bounds its shared memory. `env_vars`
    are set in all its workers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the coming default; silences a warning
    import ray

    if ray.is_initialized():
        yield False
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if env_vars:
        quiet["runtime_env"] = {"env_vars": env_vars}
    with _sigterm_handler_kept():
        if os.environ.get("RAY_ADDRESS"):
            ray.init(**quiet)
        else:
            ray.init(
                address="local", include_dashboard=False, object_store_memory=object_store_bytes, **quiet
            )
    try:
        yield True
    finally:
        ray.shutdown()


@contextmanager
def _sigterm_handler_kept() -> Iterator[None]:
    """A caller who handles SIGTERM goes on doing so, while `ray.init` runs too.

    It would replace the handler by one of its own, and its core sets another below Python's, which passes the signal
    on to Python's but aborts the process if that has not ended it after three seconds.
    """
    ours = signal.getsignal(signal.SIGTERM)
    if ours in (signal.SIG_DFL, None) or threading.current_thread() is not threading.main_thread():
        yield
        return
    from ray._private import utils

    alarm = signal.getitimer(signal.ITIMER_REAL)
    install = utils.set_sigterm_handler
    utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = install
        signal.signal(signal.SIGTERM, ours)  # above what the core has set
        signal.setitimer(
            signal.ITIMER_REAL, *alarm
        )  # not the one by which it aborts, if a signal has come already
