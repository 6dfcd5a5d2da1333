"""Runs and datasets on object storage, over the wire: a local S3 server, the client a user has."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import hrm_ray
from hrm_ray import remote
from hrm_ray.cli import main
from hrm_ray.config.schema import TrainConfig
from hrm_ray.data.shards import open_dataset
from hrm_ray.errors import UserError
from hrm_ray.remote import StorageError
from hrm_ray.storage.storage import Storage
from hrm_ray.training.checkpoint import finished
from hrm_ray.training.driver import run_folder
from hrm_ray.training.hooks import Hooks
from hrm_ray.training.launch import train
from hrm_ray.training.loop import TrainingLoop
from hrm_ray.world import World
from tests.s3 import PAGE
from tests.toy import ARCH, toy_config, toy_dataset


def run(config: dict, hooks: Hooks | None = None) -> TrainingLoop:
    parsed = TrainConfig(**config)
    trainer = TrainingLoop(parsed, run_folder(parsed), World(), hooks or Hooks())
    trainer.train()
    return trainer


def records(folder: Storage) -> list[dict]:
    lines = folder.read("metrics.jsonl").decode().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


def assert_same_run(folder: Storage, undisturbed: Storage) -> None:
    """Equal bytes of weights, moments, averages and carry; equal reports, each once."""
    a, b = finished(folder)[-1].manifest, finished(undisturbed)[-1].manifest
    assert (a.global_step, a.files) == (b.global_step, b.files)
    assert records(folder) == records(undisturbed)
    assert json.loads(folder.read("summary.json"))["finished"]


def refusal(call) -> str:
    """The one line that `call` ends in; within seconds, not minutes of retries."""
    started = time.monotonic()
    with pytest.raises(UserError) as raised:
        call()
    assert time.monotonic() - started < 45
    (line,) = str(raised.value).splitlines()
    return line


@pytest.fixture
def config(tmp_path):
    toy_dataset(tmp_path / "data", num_identifiers=5)
    return toy_config(tmp_path / "data", tmp_path / "runs", ema=True)


# Storage


def test_write_read_list_delete(s3):
    folder = Storage(s3("a/run"))
    assert not folder.exists() and folder.folders() == [] and folder.read("x") is None
    folder.write("one/x", b"1")
    folder.write("one/x", b"2")
    (folder / "two").write("y", b"3")
    assert folder.read("one/x") == b"2" and (folder / "one").read("x") == b"2"
    assert folder.exists() and folder.folders() == ["one", "two"]
    assert (folder / "two").name == "two" and Storage(s3("a")).folders() == ["run"]
    (folder / "one").delete_if_empty()
    assert folder.folders() == ["one", "two"] and (folder / "one").entries() == {"x": "file"}
    (folder / "one").delete_file("x")
    (folder / "one").delete_if_empty()
    assert folder.folders() == ["two"] and folder.read("one/x") is None
    (folder / "three").create()
    assert (folder / "three").exists()


def test_a_small_file_is_one_request(s3, s3_proxy):
    folder = Storage(s3("runs"))
    s3_proxy.requests.clear()
    folder.write("a/b/x", b"1")
    assert [request.partition("/runs")[0][:3] for request in s3_proxy.requests] == ["PUT"]


def test_a_file_of_several_parts(s3):
    content = os.urandom(25_000_000)
    folder = Storage(s3("runs"))
    folder.write("big", content)
    assert folder.read("big") == content


def test_more_folders_than_one_answer_lists(s3):
    folder = Storage(s3("runs"))
    names = [f"step-{number:08d}" for number in range(PAGE + 20)]
    for name in names:
        folder.write(f"checkpoints/{name}/x", b"")
    assert (folder / "checkpoints").folders() == names


# Runs


@pytest.mark.parametrize(("asked", "step"), [(11, 8), (14, 11)])
def test_continued_equals_undisturbed_on_a_local_folder(config, s3, asked, step):
    """Stopped in the evaluation after step 8, and after step 11."""
    asks = iter(range(1, 100))
    on_s3 = {**config, "storage": s3("runs"), "log_interval": 1}
    first = run(on_s3, Hooks(stop=lambda: "asked" if next(asks) == asked else None))
    assert first.state.global_step == step
    assert not json.loads(first.run.read("summary.json"))["finished"]
    second = run(on_s3)
    undisturbed = run({**config, "log_interval": 1})
    assert_same_run(second.run, undisturbed.run)
    assert len(finished(second.run)) == len(finished(undisturbed.run))
    solver = hrm_ray.load(str(second.run))
    metrics, _ = solver.evaluate(config["data_path"])
    assert metrics["accuracy"] == pytest.approx(finished(second.run)[-1].manifest.metrics["eval/accuracy"])


def test_whichever_write_fails_the_same_command_goes_on(tmp_path, s3, monkeypatch):
    """Each write of a run fails once: what was reported stays, nothing twice, and the run ends as if undisturbed."""
    toy_dataset(tmp_path / "data", num_train=24, num_test=8)
    small = {**ARCH, "hidden_size": 16, "puzzle_emb_ndim": 16}
    config = toy_config(
        tmp_path / "data", tmp_path / "runs", epochs=2, max_steps=6, log_interval=1, arch=small
    )
    writes, write = [], Storage.write

    def failing_write(folder, name, content):
        writes.append(name)
        if len(writes) == fails_at:
            raise StorageError("the network is down")
        write(folder, name, content)

    monkeypatch.setattr(Storage, "write", failing_write)
    fails_at = 0
    undisturbed = run({**config, "storage": s3("runs"), "run_name": "whole"})
    for number, name in enumerate(list(writes), start=1):
        writes.clear()
        fails_at = number
        disturbed = {**config, "storage": s3("runs"), "run_name": f"fails-at-{number}"}
        with pytest.raises(UserError):
            run(disturbed)
        assert len(writes) >= number, name
        fails_at = 0
        assert_same_run(run(disturbed).run, undisturbed.run)


@pytest.mark.ray
@pytest.mark.long
def test_two_ray_workers_stop_and_go_on(config, s3, ray_cluster):
    scaling = {"mode": "ray", "num_workers": 2, "cpus_per_worker": 1}
    values = {**config, "storage": s3("runs"), "scaling": scaling}
    train(TrainConfig(**{**values, "max_steps": 8}), show_progress=False)
    longer = TrainConfig(**values)
    summary, _ = train(longer, show_progress=False)
    assert summary["global_step"] == 20 and summary["finished"]
    undisturbed = run(config)
    expected = finished(undisturbed.run)[-1].tensors("model.safetensors")
    last = finished(run_folder(longer))[-1]
    assert last.manifest.world_size == 2
    for name, tensor in last.tensors("model.safetensors").items():
        np.testing.assert_allclose(tensor, expected[name], rtol=1e-4, atol=2e-5)
    # A report closes the first run at step 8, where the undisturbed one evaluates and so reports too.
    steps = [r["global_step"] for r in records(run_folder(longer))]
    assert steps == [r["global_step"] for r in records(undisturbed.run)]


# Datasets


@pytest.fixture
def remote_data(tmp_path, s3, monkeypatch):
    """A dataset copied to S3, and where it lies."""
    monkeypatch.setenv("HRM_RAY_CACHE", str(tmp_path / "cache"))
    toy_dataset(tmp_path / "data")
    folder = Storage(s3("data/toy"))
    for file in (tmp_path / "data").rglob("*"):
        if file.is_file():
            folder.write(str(file.relative_to(tmp_path / "data")), file.read_bytes())
    return folder


def test_training_reads_a_remote_dataset(remote_data, tmp_path):
    local = run(toy_config(tmp_path / "data", tmp_path / "runs", run_name="local"))
    other = run({**toy_config(tmp_path / "data", tmp_path / "runs"), "data_path": str(remote_data)})
    assert_same_run(other.run, local.run)


def test_a_damaged_remote_dataset_is_refused(remote_data):
    shard, other = "train/shard-00000.arrow", "train/shard-00001.arrow"
    content, manifest = remote_data.read(shard), remote_data.read("manifest.json")
    remote_data.write(shard, remote_data.read(other))
    said = refusal(lambda: open_dataset(str(remote_data)))
    assert f"{remote_data}: {shard} is damaged: " in said and said.endswith("copy the dataset there again")
    remote_data.write(shard, content)
    remote_data.write("manifest.json", manifest[:-2])
    assert "manifest.json is damaged: " in refusal(lambda: open_dataset(str(remote_data)))
    remote_data.write("manifest.json", manifest)
    for name in (remote_data / "test").entries():
        (remote_data / "test").delete_file(name)
    assert "test/shard-00000.arrow is missing" in refusal(lambda: open_dataset(str(remote_data)))


def test_no_room_for_the_copy(remote_data, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HRM_RAY_CACHE", str(tmp_path / "file"))
    said = refusal(lambda: open_dataset(str(remote_data)))
    assert said.startswith(f"cannot write to {tmp_path}/file/") and "set HRM_RAY_CACHE" in said


# What is wrong is told in one line


def calls(uri: str) -> dict:
    return {
        "folders": lambda: Storage(uri).folders(),
        "exists": lambda: Storage(uri).exists(),
        "read": lambda: Storage(uri).read("x"),
        "write": lambda: Storage(uri).write("x", b""),
        "create": lambda: Storage(uri).create(),
        "delete": lambda: Storage(uri).delete_file("x"),
        "dataset": lambda: open_dataset(uri),
    }


@pytest.mark.parametrize("call", calls(""))
def test_wrong_credentials(s3, monkeypatch, call):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "wrong")
    said = refusal(calls(s3("runs"))[call])
    assert "ACCESS_DENIED" in said or "INVALID_ACCESS_KEY_ID" in said
    assert "check the address, the network and the credentials (AWS_ACCESS_KEY_ID" in said


CLOSED = "s3://bucket/runs?endpoint_override=127.0.0.1:9&scheme=http"


def test_a_port_where_nobody_listens():
    with ThreadPoolExecutor(8) as pool:  # each takes the seconds of its retries
        said = list(pool.map(refusal, (calls(CLOSED)[call] for call in ("folders", "read", "dataset"))))
    assert all("NETWORK_CONNECTION" in line for line in said)


def test_a_google_bucket_out_of_reach(monkeypatch):
    monkeypatch.setattr(remote, "GOOGLE_RETRY_S", 1)  # not given, it is 15 minutes
    where = "gs://anonymous@bucket/runs?endpoint_override=127.0.0.1:9&scheme=http"
    assert "GOOGLE_APPLICATION_CREDENTIALS" in refusal(Storage(where).folders)


def test_a_bucket_that_is_not_there(s3):
    uri = s3("runs").replace("s3://", "s3://no-")
    assert "NO_SUCH_BUCKET" in refusal(lambda: Storage(uri).write("x", b""))
    assert "has no manifest.json" in refusal(lambda: open_dataset(uri))


def test_the_command_line_says_it_in_one_line(config, capsys):
    data = f"data={config['data_path']}"
    words = ["experiment=sudoku_4x4", "scaling=local", "lr_warmup_steps=0", data, f"storage={CLOSED}"]
    assert main(["train", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "NETWORK_CONNECTION" in line


def test_keys_do_not_belong_into_the_address():
    for call in (Storage, open_dataset):
        said = refusal(lambda call=call: call("s3://someone:secret@bucket/runs"))
        assert "keep keys out of the address" in said and "secret" not in said.lower().replace(
            "aws_secret", ""
        )
