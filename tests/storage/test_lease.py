"""A run on object storage is held by one process, whatever the network does."""

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from hrm_ray.config.schema import TrainConfig
from hrm_ray.errors import UserError
from hrm_ray.remote import StorageError
from hrm_ray.storage import lock
from hrm_ray.storage.lock import NAME, Lease, LeaseLost
from hrm_ray.storage.storage import Storage
from hrm_ray.training.checkpoint import FOLDER, finished, newest_whole, step_name, write_manifest
from hrm_ray.training.driver import run_folder
from hrm_ray.training.hooks import Hooks
from hrm_ray.training.loop import TrainingLoop
from hrm_ray.world import World
from tests.toy import toy_config, toy_dataset


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Leases that change hands in seconds."""
    monkeypatch.setattr(lock, "RENEW_S", 0.3)
    monkeypatch.setattr(lock, "TAKE_OVER_S", 3.0)
    monkeypatch.setattr(lock, "LOOK_S", 0.05)


def go_silent(lease: Lease) -> None:
    """As if its process were killed: nothing is renewed, and nothing let go."""
    lease._closed.set()
    lease._thread.join()
    lease._closed.clear()


def written(folder: Storage) -> dict:
    return json.loads(folder.read(NAME))


def test_one_holder_after_the_other(s3):
    folder = Storage(s3("run"))
    first = folder.lock(owner="a")
    assert isinstance(first, Lease) and first.weakness is None and first.generation == 1
    with pytest.raises(
        UserError, match=r"another process is training .*; stop it, .* \(process \d+ on .* has its"
    ):
        folder.lock(owner="b")
    with pytest.raises(UserError, match="mine"):
        folder.lock(owner="b", taken="mine", wait_s=0)
    first.close()
    first.close()
    assert written(folder)["released"]
    second = folder.lock(owner="b", wait_s=0)
    assert second.generation > first.generation
    second.close()


def test_a_holder_that_is_gone_is_followed_and_writes_no_more(s3):
    folder, said = Storage(s3("run")), []
    first = folder.lock(owner="a")
    held = folder.held_by(first)
    held.write("x", b"1")
    (held / "inside").write("x", b"1")
    go_silent(first)
    started = time.monotonic()
    second = folder.lock(owner="b", say=said.append)
    assert time.monotonic() - started >= lock.TAKE_OVER_S - 0.1
    (line,) = said
    assert "waiting 3 s, in case it is still at work" in line
    time.sleep(lock.TAKE_OVER_S)  # now its own clock says so too
    for write in (held.write, (held / "inside").write):
        with pytest.raises(
            LeaseLost, match=r"process .* has taken over .*; this process ends without writing"
        ):
            write("x", b"2")
    with pytest.raises(LeaseLost):
        held.delete_file("x")
    assert folder.read("x") == b"1" and (folder / "inside").read("x") == b"1"
    first.close()
    folder.held_by(second).write("x", b"3")
    second.close()


def test_workers_of_one_owner_follow_each_other_at_once(s3):
    folder = Storage(s3("run"))
    lost = folder.lock(owner="a")
    go_silent(lost)
    started = time.monotonic()
    folder.lock(owner="a").close()
    assert time.monotonic() - started < lock.TAKE_OVER_S


def test_of_many_at_once_one_wins(s3):
    folder = Storage(s3("run"))

    def take(number: int) -> Lease | None:
        try:
            return folder.lock(owner=str(number), wait_s=0)
        except UserError:
            return None

    for _ in range(5):
        with ThreadPoolExecutor(8) as pool:
            taken = [lease for lease in pool.map(take, range(8)) if lease]
        (winner,) = taken
        winner.check()
        winner.close()


def test_a_storage_that_ignores_conditions_is_said(s3, s3_proxy, tmp_path):
    s3_proxy.fault = lambda method, path: "unconditional" if NAME in path else None
    unlocked = Storage(s3("run")).lock()
    assert "cannot keep other processes off (it ignores the conditions" in unlocked.weakness
    toy_dataset(tmp_path / "data")
    events = []
    config = TrainConfig(**{**toy_config(tmp_path / "data", tmp_path), "storage": s3("runs"), "max_steps": 2})
    TrainingLoop(config, run_folder(config), World(), Hooks(event=events.append)).train()
    assert any(entry["event"] == "unlocked" for entry in events)


def faulty(kind: str, times: int):
    """Every write of the lease fails so often, then goes through."""
    left = Counter()

    def fault(method: str, path: str) -> str | None:
        if method != "PUT" or NAME not in path:
            return None
        left["all"] += 1
        return kind if left["all"] % (times + 1) else None

    return fault


@pytest.mark.parametrize("kind", ["error", "drop", "lost", "twice"])
def test_a_network_that_fails_takes_no_lease_away(s3, s3_proxy, kind):
    folder = Storage(s3("run"))
    s3_proxy.fault = faulty(kind, 1)
    lease = folder.lock(owner="a")
    until = time.monotonic() + 2 * lock.TAKE_OVER_S
    while time.monotonic() < until:
        lease.check()
        time.sleep(0.05)
    with pytest.raises(UserError, match="another process is training"):
        folder.lock(owner="b", wait_s=0)
    lease.close()


def test_a_write_that_was_never_answered_is_found_again(s3, s3_proxy):
    """Not even after the client has asked again and again: the next renewal starts from what is there."""
    folder = Storage(s3("run"))
    lease = folder.lock(owner="a")
    s3_proxy.fault = lambda method, path: "lost" if method == "PUT" else "drop"
    with pytest.raises(StorageError):
        lease._renew()
    s3_proxy.fault = lambda method, path: None
    lease._renew()
    lease.check()
    lease.close()
    with pytest.raises(LeaseLost, match="was let go of by this process"):
        lease.check()


def test_a_storage_out_of_reach_stops_the_writing_until_it_is_back(s3, s3_proxy):
    folder = Storage(s3("run"))
    lease = folder.lock(owner="a")
    s3_proxy.fault = lambda method, path: "drop" if NAME in path else None
    lease.check()  # it was renewed a moment ago
    threading.Event().wait(lock.TAKE_OVER_S)
    with pytest.raises(StorageError, match="check the address, the network and the credentials"):
        lease.check()
    s3_proxy.fault = lambda method, path: None
    lease.check()
    lease.close()


def test_an_unreadable_lease_is_waited_for_and_replaced(s3):
    folder = Storage(s3("run"))
    folder.write(NAME, b"\xff not JSON")
    lease = folder.lock(owner="a")
    assert lease.generation == 1 and written(folder)["owner"] == "a"
    lease.close()


# Runs


@pytest.fixture
def config(tmp_path, s3):
    toy_dataset(tmp_path / "data")
    return {**toy_config(tmp_path / "data", tmp_path, checkpoint_interval=2), "storage": s3("runs")}


def trained(config: dict, **hooks) -> TrainingLoop:
    parsed = TrainConfig(**config)
    trainer = TrainingLoop(parsed, run_folder(parsed), World(), Hooks(**hooks))
    trainer.train()
    return trainer


def test_a_run_that_was_taken_over_ends_without_writing(config):
    """Its driver sleeps after step 5, another one continues the run to its end meanwhile."""
    run, other = run_folder(TrainConfig(**config)), []

    def stop() -> None:
        if not other:
            go_silent(trainer._lock)
            other.append(trained({**config, "max_steps": 12}))

    parsed = TrainConfig(**config)
    asks = iter(range(100))
    trainer = TrainingLoop(parsed, run, World(), Hooks(stop=lambda: stop() if next(asks) == 5 else None))
    with pytest.raises(LeaseLost):
        trainer.train()
    assert other[0].state.global_step == 12
    newest = finished(run)[-1].manifest
    assert newest.global_step == 12 and newest.generation > 1
    assert json.loads(run.read("summary.json"))["global_step"] == 12
    steps = [json.loads(line)["global_step"] for line in run.read("metrics.jsonl").decode().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 12


def test_what_a_driver_wrote_that_slept_through_its_lease_is_not_the_newest(config):
    first = trained({**config, "max_steps": 8})
    run = run_folder(first.config)
    late = finished(run)[-1]  # written by it after another had taken over at an earlier step
    for checkpoint in finished(run)[:-1]:
        write_manifest(checkpoint.folder, checkpoint.manifest.model_copy(update={"generation": 7}))
    assert finished(run)[-1].manifest.generation == 7
    newest = newest_whole(run, lambda event, what: None)
    assert newest is not None and newest.step < late.step
    again = trained({**config, "max_steps": 10})
    assert again.state.global_step == 10
    assert [c.step for c in finished(run)][-1] == 10 and finished(run)[-1].manifest.generation >= 7
    assert step_name(late.step) in (run / FOLDER).folders()


@pytest.mark.long
def test_a_killed_driver_is_followed_by_the_same_command(config, monkeypatch):
    """Two real processes, with the real times: the second is refused, and takes over when the first is killed."""
    monkeypatch.undo()
    words = [
        f"data={config['data_path']}",
        f"storage={config['storage']}",
        *(
            "run_name=toy",
            "scaling=local",
            "device=cpu",
            "compile=false",
            "global_batch_size=8",
            "epochs=100000",
        ),
        *("lr_warmup_steps=0", "eval_interval=null", "checkpoint_interval=5", "tensorboard=false"),
        *(f"arch.{key}={value}" for key, value in config["arch"].items() if key != "name"),
    ]
    command = [sys.executable, "-m", "hrm_ray", "train", *words]
    run = Storage(config["storage"]) / "toy"
    first = subprocess.Popen([*command, "max_steps=100000"], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while len(finished(run)) < 2:
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        second = subprocess.run([*command, "max_steps=100000"], capture_output=True, text=True, timeout=120)
        assert second.returncode == 2 and "another process is training" in second.stderr
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()
    step = finished(run)[-1].step
    third = subprocess.run([*command, f"max_steps={step + 10}"], capture_output=True, text=True, timeout=200)
    assert third.returncode == 0, third.stderr
    assert (
        "waiting 30 s" in third.stderr and f"continues from step {step}" in run.read("events.jsonl").decode()
    )
    assert finished(run)[-1].step == step + 10


# The storage behind an address, for who can write under a condition; nothing is sent


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("s3://b/runs/x", {"bucket": "b", "region": "eu-west-1"}),
        (
            "s3://b/x?endpoint_override=minio:9000&scheme=http",
            {"bucket": "b", "region": "eu-west-1", "endpoint": "http://minio:9000"},
        ),
        ("s3://b/x?anonymous=true", {"bucket": "b", "region": "eu-west-1", "skip_signature": "true"}),
        (
            "s3://b/x?force_virtual_addressing=true",
            {"bucket": "b", "region": "eu-west-1", "virtual_hosted_style_request": "true"},
        ),
        ("gs://b/x", {"bucket": "b"}),
        ("abfs://c@acc.dfs.core.windows.net/x", {"account_name": "acc", "container_name": "c"}),
    ],
)
def test_addresses_mean_the_same_as_for_pyarrow(uri, expected, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "from the environment")
    store = lock.store_of(uri, SimpleNamespace(region="eu-west-1"))
    assert store.config == expected
    assert store.prefix == uri.partition("://")[2].partition("?")[0].partition("/")[2]


def test_keys_of_a_profile(tmp_path, monkeypatch):
    """obstore itself does not look for them."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "work")
    (tmp_path / "credentials").write_text(
        "[default]\naws_access_key_id = 1\n[work]\naws_access_key_id = 2\naws_secret_access_key = %3\n"
    )
    found = lock.store_of("s3://b/x", SimpleNamespace(region=None)).config
    assert (found["access_key_id"], found["secret_access_key"]) == ("2", "%3")
    monkeypatch.setenv("AWS_PROFILE", "missing")
    assert "access_key_id" not in lock.store_of("s3://b/x", SimpleNamespace(region=None)).config


@pytest.mark.parametrize("uri", ["hdfs://h/x", "abfs://c@acc/x"])
def test_storages_that_cannot_write_under_a_condition_are_known(uri):
    with pytest.raises(lock.Unconditional):
        lock.store_of(uri, SimpleNamespace())
