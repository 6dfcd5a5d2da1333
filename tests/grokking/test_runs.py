"""What real runs on equations say at their end: one that is stopped and goes on, and one without validation."""

import json

import pytest

from hrm_ray.config.schema import TrainConfig
from hrm_ray.data.pipeline import build
from hrm_ray.data.recipe import load_recipe
from hrm_ray.errors import UserError
from hrm_ray.grokking.history import FILE
from hrm_ray.grokking.read import read_run
from hrm_ray.grokking.verdict import judge
from hrm_ray.training import launch
from hrm_ray.training.hooks import Hooks
from hrm_ray.training.loop import TrainingLoop
from hrm_ray.world import World
from tests.toy import toy_config


def config(folder, **recipe) -> TrainConfig:
    build(load_recipe("modular", {"op": "+", "p": 5, **recipe}), folder / "data", show_progress=False)
    return TrainConfig(
        **toy_config(folder / "data", folder / "runs", max_steps=8, epochs=10, eval_interval_steps=2)
    )


def test_a_stopped_run_is_not_judged_for_good(tmp_path):
    values = config(tmp_path)
    reports: list[dict[str, float]] = []
    hooks = Hooks(
        report=reports.append, stop=lambda: "signal" if any("eval/loss" in r for r in reports) else None
    )
    stopped = TrainingLoop(values, launch.run_folder(values), World(), hooks).train()
    assert 2 <= stopped["global_step"] < 8 and not stopped["finished"]
    (text,) = stopped["conclusions"]
    assert text.startswith("did not learn so far") and text.endswith("Why that may be: it is not finished")
    run = read_run(str(tmp_path / "runs/toy"))
    assert judge(run.history, run.source).text == text
    ended, _ = launch.train(values, show_progress=False)
    assert ended["finished"] and "so far" not in ended["conclusions"][0]


def test_a_run_without_validation_says_so(tmp_path):
    summary, _ = launch.train(config(tmp_path, train_fraction=1), show_progress=False)
    assert summary["conclusions"] == [
        "this run has no validation equations, so whether it generalises is not known"
    ]
    folder = tmp_path / "runs/toy"
    assert json.loads((folder / FILE).read_text())["grokking_summary"]["outcome"] == "unknown"
    with pytest.raises(UserError, match="no validation equations"):
        read_run(str(folder))
