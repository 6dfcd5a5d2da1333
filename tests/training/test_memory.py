"""Too little memory is said in one line that tells what to do; the errors are the allocators' own."""

import json

import pytest
import torch

import hrm_ray
from hrm_ray.config.schema import TrainConfig
from hrm_ray.errors import UserError
from hrm_ray.models.act import ACT
from hrm_ray.training import launch
from tests.toy import ARCH, toy_config, toy_dataset

PETABYTE = 2**50


@pytest.fixture
def values(tmp_path) -> dict:
    toy_dataset(tmp_path / "data")
    return toy_config(tmp_path / "data", tmp_path / "runs")


def too_large(*args, **kwargs):
    torch.empty(PETABYTE, dtype=torch.uint8)


def out_of_gpu(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def out_of_cublas(*args, **kwargs):
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def test_a_model_without_room(values):
    config = TrainConfig(**values | {"arch": ARCH | {"hidden_size": 2**22}})
    with pytest.raises(
        UserError, match="memory for the model and a batch on cpu; use a smaller model"
    ) as info:
        launch.train(config, show_progress=False)
    assert info.value.exit_code == 2


@pytest.mark.parametrize("fails", [too_large, out_of_gpu, out_of_cublas])
@pytest.mark.parametrize(
    ("micro_batch_size", "said"),
    [
        (None, r"for 8 puzzle\(s\) at once on cpu; micro_batch_size=4 computes half of them at once"),
        (3, r"for 3 puzzle\(s\) at once on cpu; micro_batch_size=1 "),
        (512, r"for 8 puzzle\(s\) at once on cpu; micro_batch_size=4 "),
        (1, r"for 1 puzzle\(s\) at once on cpu; use a smaller model"),
    ],
)
def test_a_step_without_room(values, monkeypatch, fails, micro_batch_size, said):
    """The run goes on once it is mended."""
    config = TrainConfig(**values | {"micro_batch_size": micro_batch_size, "checkpoint_interval": 5})
    launch.train(config.model_copy(update={"max_steps": 5}), show_progress=False)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=said):
        patch.setattr(ACT, "forward", fails)
        launch.train(config, show_progress=False)
    events = (launch.run_folder(config).local_path / "events.jsonl").read_text().splitlines()
    last = json.loads(events[-1])
    assert last["event"] == "failed" and last["global_step"] == 6 and "not enough memory" in last["message"]
    summary, _ = launch.train(config.model_copy(update={"micro_batch_size": 2}), show_progress=False)
    assert summary["finished"] and summary["global_step"] == 20


def test_other_errors_are_left_as_they_are(values, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(ACT, "forward", fails)
    with pytest.raises(RuntimeError, match="a bug"):
        launch.train(TrainConfig(**values), show_progress=False)


@pytest.mark.parametrize("use", ["solve", "evaluate"])
def test_answers_without_room(values, monkeypatch, use):
    config = TrainConfig(**values)
    launch.train(config, show_progress=False)
    solver = hrm_ray.load(launch.run_folder(config).local_path, device="cpu")
    monkeypatch.setattr(ACT, "forward", too_large)
    with pytest.raises(UserError, match="for 7 puzzles at once on cpu; give a smaller batch_size"):
        if use == "solve":
            solver.solve(solver.questions(config.data_path), batch_size=7)
        else:
            solver.evaluate(config.data_path, batch_size=7)


def test_loading_without_room(values, monkeypatch):
    config = TrainConfig(**values)
    launch.train(config, show_progress=False)
    monkeypatch.setattr("hrm_ray.api.build_model", too_large)
    with pytest.raises(UserError, match="for the model on cpu; free some, or take another device"):
        hrm_ray.load(launch.run_folder(config).local_path, device="cpu")
