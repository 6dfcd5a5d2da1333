"""The workers' side of the conversation with the driver, with a clock and a channel of our own."""

import json
from unittest.mock import Mock

import pytest
from ray.experimental import internal_kv

from hrm_ray.config.schema import TrainConfig
from hrm_ray.errors import NonFiniteLoss, OutOfMemory, RunFailed, UserError
from hrm_ray.training import ray_train
from hrm_ray.training.channel import Channel
from hrm_ray.training.driver import Driver
from hrm_ray.training.hooks import Progress
from hrm_ray.training.ray_train import TimeLimits
from hrm_ray.world import World


class FakeChannel:
    def __init__(self):
        self.values = {}
        self.num_looks = 0
        self.num_added = 0

    def put(self, key, value):
        self.values[key] = value

    def get(self, key):
        self.num_looks += 1
        return self.values.get(key)

    def add(self, key, value):
        self.num_added += 1
        self.values.setdefault(f"added {key}", []).append(value)

    def taken(self, key):
        return self.values.pop(f"added {key}", [])


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


class Listens(Driver):
    wants_reports = True

    def __init__(self, reason=None):
        super().__init__(TrainConfig(data_path="data"))
        self.told = []
        self.stop = Mock(reason=lambda: reason)

    def report(self, record):
        self.told.append(record)


def watch_run(channel, driver, monkeypatch, limits=None, while_waiting=lambda num_polls: None):
    """What comes of a run that does not end by itself."""
    polls = []

    def wait(refs, timeout):
        polls.append(timeout)
        while_waiting(len(polls))
        assert len(polls) < 100
        return [], refs

    monkeypatch.setattr("ray.wait", wait)
    look_ahead = Mock(asks_to_save=lambda driver: False, has_room_for_least=lambda: True)
    return ray_train._watch_run(Mock(), channel, driver, look_ahead, limits or TimeLimits(None, None, 0.0))


def test_every_record_reaches_who_listens_once_and_in_order(monkeypatch):
    channel, driver = FakeChannel(), Listens()
    hooks = ray_train.worker_hooks(channel, World(), wants_reports=True)
    records = [{"global_step": step} for step in range(7)]

    def work(num_polls):
        for record in records[2 * num_polls - 2 : 2 * num_polls]:
            hooks.report(record)
        if num_polls == 4:
            channel.put("summary", {"finished": True})

    assert watch_run(channel, driver, monkeypatch, while_waiting=work) == {"finished": True}
    assert driver.told == records


def test_what_a_lost_worker_wrote_follows_the_news_of_those_in_its_place(monkeypatch):
    """Also if the driver was so busy that it hears of everything at once."""
    monkeypatch.setattr(ray_train, "last_words", lambda name: f"{name} wrote last")
    channel, driver, said = FakeChannel(), Listens(), []
    driver.say = said.append
    for place in ("step 0", "step 5"):
        channel.add("events", {"event": "started", "num_workers": 1, "message": f"continues after {place}"})
        channel.add("events", {"event": "lost", "worker": {"name": f"the worker from {place}"}})
    channel.put("summary", {})
    watch_run(channel, driver, monkeypatch)
    assert said == ["workers were lost or added: continues after step 5", "the worker from step 0 wrote last"]
    assert driver.last_words == "the worker from step 5 wrote last"


def test_nothing_is_sent_to_who_does_not_listen():
    channel = FakeChannel()
    ray_train.worker_hooks(channel, World()).report({"global_step": 1})
    assert channel.num_added == 0


@pytest.mark.parametrize(
    "error", [NonFiniteLoss("it diverged"), OutOfMemory("full"), RunFailed("lost"), UserError("wrong")]
)
def test_a_failure_is_of_the_same_kind_for_the_driver(monkeypatch, tmp_path, error):
    channel = FakeChannel()
    monkeypatch.setattr(ray_train, "Channel", lambda name: channel)
    context = Mock(get_world_rank=lambda: 1, get_world_size=lambda: 2, get_local_rank=lambda: 1)
    monkeypatch.setattr("ray.train.get_context", lambda: context)
    monkeypatch.setattr(ray_train, "TrainingLoop", Mock(side_effect=error))
    monkeypatch.setattr(ray_train, "check_seen", Mock())
    config = TrainConfig(data_path="data").model_dump(mode="json")
    with pytest.raises(type(error)):
        ray_train._worker({"channel": "c", "cpus": 1, "config": config, "storage": str(tmp_path)})
    with pytest.raises(type(error), match=str(error)) as info:
        watch_run(channel, Listens(), monkeypatch)
    assert info.type is type(error)


def test_workers_that_are_gone_are_not_waited_for_in_a_lent_group_that_is_to_be_free(monkeypatch, clock):
    channel, driver = FakeChannel(), Listens(reason="trial")
    driver.num_workers = 2
    beats = []

    def work(num_polls):
        clock.now += 1
        if num_polls <= 30:  # they are there, but their step is long
            channel.put("beat", num_polls // 5)
            beats.append(clock.now)

    summary = watch_run(channel, driver, monkeypatch, TimeLimits(None, 8.0, 0.0), work)
    assert summary["stop_reason"] == "trial" and not summary["finished"]
    assert channel.values["stop"] == "trial"
    assert 8 < clock.now - beats[-1] <= 9


@pytest.fixture
def store(monkeypatch):
    """The cluster's, as far as a channel uses it."""
    values = {}
    monkeypatch.setattr(
        internal_kv, "_internal_kv_put", lambda key, value, overwrite: values.update({key: value})
    )
    monkeypatch.setattr(internal_kv, "_internal_kv_get", values.get)
    monkeypatch.setattr(internal_kv, "_internal_kv_del", values.pop)
    monkeypatch.setattr(
        internal_kv, "_internal_kv_list", lambda prefix: [k for k in values if k.startswith(prefix)]
    )
    return values


def test_what_is_taken_is_gone_and_of_others_nothing(store):
    channel, other = Channel("run"), Channel("run-2")
    for number in range(12):
        channel.add("events", number)
    channel.add("reports", "of another kind")
    other.add("events", "of another run")
    assert channel.taken("events") == list(range(12))
    channel.add("events", 12)
    assert channel.taken("events") == [12]
    assert channel.taken("events") == []
    assert sorted(map(json.loads, store.values())) == ["of another kind", "of another run"]
