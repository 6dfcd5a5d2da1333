"""What a run leaves beside its checkpoints."""

import json

import pytest
import yaml

from hrm_ray.config.schema import TrainConfig
from hrm_ray.training import launch
from tests.toy import toy_config, toy_dataset


@pytest.fixture
def config(tmp_path):
    toy_dataset(tmp_path / "data")
    return toy_config(tmp_path / "data", tmp_path / "runs")


def train(config: dict):
    parsed = TrainConfig(**config)
    summary, _ = launch.train(parsed, show_progress=False)
    return summary, launch.run_folder(parsed).local_path


def test_config_metrics_and_summary(config):
    summary, run = train(config)
    assert TrainConfig(**yaml.safe_load((run / "config.yaml").read_text())) == TrainConfig(**config)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    reported = {key for record in records for key in record}
    names = "loss lm_loss q_halt_loss q_continue_loss accuracy exact_accuracy q_halt_accuracy steps lr"
    assert {f"train/{name}" for name in names.split()} <= reported
    assert {f"eval/{name}" for name in ("accuracy", "exact_accuracy", "q_halt_accuracy", "steps")} <= reported
    assert {"time/step_s", "time/data_wait_s", "time/checkpoint_s"} <= reported
    assert summary == json.loads((run / "summary.json").read_text())
    assert summary["global_step"] == records[-1]["global_step"] == 20
    assert summary["final"]["eval/accuracy"] == records[-1]["eval/accuracy"]
    assert summary["best"]["eval/exact_accuracy"] == max(r.get("eval/exact_accuracy", 0) for r in records)
    assert summary["num_params"] == 57_794 and summary["train_s"] > 0


def test_tensorboard_files_hold_every_report_once_after_a_restart(config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train({**config, "tensorboard": True, "max_steps": 8})
    _, run = train({**config, "tensorboard": True})
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [5, 8, 10, 15, 16, 20]


def test_wandb_offline_needs_no_network(config, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "")
    _, run = train({**config, "wandb": "offline"})
    assert list(run.glob("wandb/offline-run-*/run-*.wandb"))


def test_storage_may_be_a_uri(config, tmp_path):
    summary, _ = train({**config, "storage": f"file://{tmp_path}/elsewhere"})
    assert (tmp_path / "elsewhere/toy/summary.json").exists()
    assert summary["checkpoint"].startswith("file://")


def test_a_finished_run_does_not_start_again(config, monkeypatch):
    summary, _ = train(config)
    monkeypatch.setattr(launch.Launch, "_here", None)
    assert train(config)[0] == summary
    assert "is finished at step 20" in launch.Launch(TrainConfig(**config)).announce()
