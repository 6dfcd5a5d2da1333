"""The workers' side of the conversation with the driver, with a clock and a channel of our own."""

import pytest

from hrm_ray.training import ray_train
from hrm_ray.training.loop import Progress
from hrm_ray.training.world import World


class FakeChannel:
    def __init__(self):
        self.values = {}
        self.num_looks = 0

    def put(self, key, value):
        self.values[key] = value

    def get(self, key):
        self.num_looks += 1
        return self.values.get(key)


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

    monkeypatch.setattr(ray_train.time, "monotonic", lambda: Clock.now)
    return Clock


def progress(step):
    return Progress(step, 1000, "eval", "cpu", {})


def test_a_wish_to_stop_is_seen_although_progress_is_told_in_between(clock):
    channel = FakeChannel()
    hooks = ray_train.worker_hooks(channel, World())
    assert not hooks.stop()
    channel.put("stop", True)
    for step in range(3):  # an evaluation: ask, compute for long, tell
        clock.now += 10
        hooks.progress(progress(step))
        if hooks.stop():
            return
    raise AssertionError("never stopped")


def test_the_channel_is_not_flooded(clock):
    channel = FakeChannel()
    hooks = ray_train.worker_hooks(channel, World())
    for step in range(100):
        hooks.stop()
        hooks.progress(progress(step))
        clock.now += ray_train.POLL_S / 10
    assert channel.num_looks <= 11
    assert channel.values["progress"]["step"] >= 89


def test_only_the_first_worker_looks():
    channel = FakeChannel()
    channel.put("stop", True)
    assert not ray_train.worker_hooks(channel, World(rank=1, size=2)).stop()
    assert channel.num_looks == 0
