"""What becomes metrics, and that the dashboard shows all of it and nothing else."""

import json
import re
from pathlib import Path

import pytest

from hrm_ray import prometheus
from hrm_ray.prometheus import GAUGES, OF_RECORDS, of_record
from hrm_ray.training.loop import Hooks

DASHBOARD = json.loads((Path(__file__).parents[1] / "cluster/grafana.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def test_a_record_of_a_step():
    record = {
        "global_step": 10,
        "epoch": 0.2,
        "train/loss": 1.5,
        "time/step_s": 0.5,
        "time/data_wait_s": 0.01,
    }
    assert of_record(record, examples_per_step=256) == {
        "hrm_ray_global_step": 10.0,
        "hrm_ray_train_loss": 1.5,
        "hrm_ray_step_seconds": 0.5,
        "hrm_ray_data_wait_seconds": 0.01,
        "hrm_ray_examples_per_second": 512.0,
    }
    assert of_record({"global_step": 3, "eval/exact_accuracy": 0.25}, 8) == {
        "hrm_ray_global_step": 3.0,
        "hrm_ray_exact_accuracy_ratio": 0.25,
    }
    assert {*OF_RECORDS.values()} <= {*GAUGES}


def test_the_hooks_are_called_as_before(monkeypatch):
    told, seen = {}, []
    monkeypatch.setattr(
        prometheus, "set_gauge", lambda name, value, **tags: told.update({(name, *tags.values()): value})
    )
    hooks = Hooks(report=seen.append, saved=seen.append)
    assert prometheus.observed(hooks, "run", 8, 2) is hooks and not told  # on a private Ray
    monkeypatch.setenv(prometheus.VARIABLE, "1")
    observed = prometheus.observed(hooks, "run", 8, 2)
    observed.report({"global_step": 5, "time/step_s": 2.0})
    observed.saved(5)
    assert seen == [{"global_step": 5, "time/step_s": 2.0}, 5]
    assert told["hrm_ray_workers", "run"] == 2 and told["hrm_ray_examples_per_second", "run"] == 4
    assert told["hrm_ray_last_checkpoint_timestamp_seconds", "run"] > 1.7e9
    assert prometheus.wanted(True) == {prometheus.VARIABLE: "1"} and prometheus.wanted(False) == {}


def test_the_dashboard_shows_every_gauge_and_no_other():
    queries = [target["expr"] for panel in PANELS for target in panel["targets"]]
    shown = set(re.findall(r"\bray_(hrm_ray_\w+)", " ".join(queries)))
    assert shown == set(GAUGES)
    for query in queries:
        if "hrm_ray" in query:
            tag = "sweep" if re.search("trials|sweep_best", query) else "run"
            assert f'{{{tag}=~"${tag}"}}' in query


def test_the_dashboard_can_be_imported():
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids)) and DASHBOARD["schemaVersion"] >= 39
    sources = re.findall(r'"uid": "([^"]*)"', json.dumps(PANELS))
    assert set(sources) == {"${datasource}"}
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert set(variables) == {"datasource", "run", "sweep"}
    for tag in ("run", "sweep"):
        (metric,) = re.findall(rf"label_values\(ray_(\w+), {tag}\)", variables[tag]["definition"])
        assert tag in GAUGES[metric][0]
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in PANELS]
    assert len(places) == len(set(places)) and all(
        p["gridPos"]["x"] + p["gridPos"]["w"] <= 24 for p in PANELS
    )


@pytest.mark.parametrize("name", GAUGES)
def test_names_are_as_prometheus_asks(name):
    tags, meaning = GAUGES[name]
    assert re.fullmatch(r"hrm_ray_[a-z_]+", name) and tags and meaning[0].isupper()
    assert "Time" not in meaning or name.endswith("_seconds")
