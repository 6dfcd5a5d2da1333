"""Fixtures shared by all tests."""

import logging
import os
import signal
import uuid

import pytest
import torch

from tests import s3 as s3_server

# Where tests are started by nohup it is ignored, and what is tested ignores it too.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# The models here are small: more threads gain nothing, and lose much where other processes want the cores too.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

# Private clusters of tests; set before Ray is imported anywhere.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# Never those of who runs the tests; set before Ray starts, for its workers.
os.environ.update(s3_server.ENVIRONMENT)


@pytest.fixture(scope="session")
def ray_cluster():
    """A real Ray on this machine with two CPUs, for all tests of the session that want one."""
    import ray

    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
    )
    yield
    ray.shutdown()


@pytest.fixture
def s3_proxy():
    """What stands before the S3 server of a test."""
    proxy = s3_server.Server()
    yield proxy
    proxy.close()


@pytest.fixture
def s3(s3_proxy):
    """The URI of a new folder on a local S3 server, as a function of what lies in it: `s3("runs")`."""
    bucket = f"bucket-{uuid.uuid4().hex[:8]}"
    s3_server.make_bucket(s3_proxy.address, bucket)
    return lambda name: f"s3://{bucket}/{name}?endpoint_override={s3_proxy.address}&scheme=http"
