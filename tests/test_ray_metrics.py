"""What Prometheus is told of runs and sweeps: on a real cluster, as it fetches it."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from hrm_ray import ray_metrics
from hrm_ray.config.schema import TrainConfig
from hrm_ray.ray_metrics import OF_A_RUN, OF_A_SWEEP, RunMetrics, SweepMetrics
from hrm_ray.training.hooks import Hooks
from hrm_ray.tuning.config import plain
from tests.faults.nodes import Nodes
from tests.toy import toy_config, toy_dataset
from tests.training.test_ray import command
from tests.tuning.test_sweep import wait_for
from tests.tuning.toy_sweep import toy_sweep


@pytest.fixture
def handed_on(monkeypatch) -> dict:
    """The gauges that Ray has been given, by name and tags."""
    found: dict = {}

    class Gauge:
        def __init__(self, name, description, tag_keys):
            self.name, self.tag_keys = name, tag_keys
            assert description

        def set(self, value, tags):
            assert set(tags) == set(self.tag_keys)  # Ray refuses others
            found[self.name, tuple(tags[key] for key in self.tag_keys)] = value

    monkeypatch.setattr(ray_metrics, "_gauge", Gauge)
    return found


def test_a_record_sets_the_gauges_and_what_was_told_before_is_told_still(handed_on):
    record = {
        "global_step": 40,
        "epoch": 2.5,
        "train/loss": 1.5,
        "train/exact_accuracy": 0.25,
        "train/lr": 1e-4,
    }
    record |= {"time/step_s": 0.2, "time/data_wait_s": 0.05}
    told, saved = [], []
    config = TrainConfig(data_path="d", run_name="mine", global_batch_size=8, supervision_steps=2)
    with RunMetrics(config, "search", 3) as metrics:
        hooks = metrics.heard_by(
            Hooks(report=told.append, event=told.append, saved=lambda: saved.append(1), owner="me")
        )
        hooks.report(record)
        hooks.event({"event": "started", "num_workers": 5})
        hooks.report({"global_step": 41, "eval/exact_accuracy": 0.75, "train/loss": math.nan})
        hooks.saved()
    last_checkpoint = handed_on.pop(("hrm_ray_last_checkpoint_timestamp_seconds", ("mine", "search")))
    assert last_checkpoint == pytest.approx(ray_metrics.time.time(), abs=60)
    assert {name: value for (name, tags), value in handed_on.items() if tags == ("mine", "search")} == {
        "hrm_ray_restarts": 3,
        "hrm_ray_step_seconds": 0.2,
        "hrm_ray_data_wait_ratio": 0.25,
        "hrm_ray_examples_per_second": 80,
        "hrm_ray_global_step": 41,
        "hrm_ray_workers": 5,
        "hrm_ray_train_loss": 1.5,  # the last that a graph can show
        "hrm_ray_train_exact_accuracy_ratio": 0.25,
        "hrm_ray_eval_exact_accuracy_ratio": 0.75,
    }
    assert [entry.get("global_step") for entry in told] == [40, None, 41] and saved and hooks.owner == "me"


def test_gauges_are_repeated_until_the_end(handed_on, monkeypatch):
    monkeypatch.setattr(ray_metrics, "REPEAT_S", 0.001)
    with SweepMetrics("search") as metrics:
        metrics.trials({"RUNNING": 2, "PRUNED": 0})
        metrics.best({"eval/exact_accuracy": 0.5})
        expected = dict(handed_on)
        handed_on.clear()  # as Ray does
        wait_for(lambda: len(handed_on) == 3)
        assert handed_on == expected
    assert expected == {
        ("hrm_ray_trials", ("search", "running")): 2,
        ("hrm_ray_trials", ("search", "pruned")): 0,
        ("hrm_ray_best_value", ("search", "eval/exact_accuracy")): 0.5,
    }
    assert not metrics._thread.is_alive()


def test_names_say_their_units_as_prometheus_asks():
    units = ("seconds", "ratio", "per_second")
    counted = {"global_step", "workers", "restarts", "train_loss", "trials", "best_value"}  # have none
    for name in {**OF_A_RUN, **OF_A_SWEEP}:
        prefix, own = name[:8], name[8:]
        assert prefix == "hrm_ray_" and (own.endswith(units) or own in counted), name


DASHBOARD = json.loads((Path(__file__).parents[1] / "cluster/grafana.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def test_the_dashboard_shows_every_metric_and_no_other():
    asked = " ".join(target["expr"] for panel in PANELS for target in panel["targets"])
    assert set(re.findall(r"\bray_(hrm_ray_\w+)", asked)) == {*OF_A_RUN, *OF_A_SWEEP}
    others = set(re.findall(r"\bray_\w+", asked)) - {f"ray_{name}" for name in {**OF_A_RUN, **OF_A_SWEEP}}
    reporter = Path(find_spec("ray.dashboard.modules.reporter.reporter_agent").origin).read_text()
    for name in others:  # those of Ray itself
        assert f'"{name.removeprefix("ray_")}"' in reporter, name


def test_the_dashboard_is_one_that_grafana_takes():
    assert DASHBOARD["schemaVersion"] >= 39 and DASHBOARD["uid"] and "id" not in DASHBOARD
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["query"] == "prometheus"
    source = {"type": "prometheus", "uid": "${datasource}"}
    for panel in PANELS:
        refs = [target["refId"] for target in panel["targets"]]
        assert panel["title"] and refs and len(refs) == len(set(refs))
        assert all(place["datasource"] == source for place in [panel, *panel["targets"]]), panel["title"]
    named = set(re.findall(r"\$\{?(\w+)", json.dumps(PANELS)))
    assert named == set(variables)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:  # none lies upon another
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert at["x"] + at["w"] <= 24 and not cells & taken
        taken |= cells


# On a cluster


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    root = Path(tempfile.mkdtemp(prefix="hrm"))
    found = Nodes(root / "n")
    found.start()
    found.add()
    found.add()
    yield found
    found.end()
    shutil.rmtree(root, ignore_errors=True)


SAMPLE = re.compile(r"ray_(hrm_ray_\w+)\{(.*)\} (\S+)")


def scraped(nodes: Nodes) -> dict[tuple[str, str], float]:
    """Our gauges as all nodes give them to Prometheus, by name and our own tags."""
    found = {}
    for info in nodes.infos():
        url = f"http://{info.node_manager_address}:{info.metrics_export_port}/metrics"
        with suppress(OSError):  # the agent comes some seconds after its node
            text = urllib.request.urlopen(url, timeout=10).read().decode()
            for name, tags, value in SAMPLE.findall(text):
                own = re.findall(r'(run|sweep|state|metric)="([^"]+)"', tags)
                found[name, ",".join(map("=".join, own))] = float(value)
    return found


def started(words: list[str], nodes: Nodes) -> subprocess.Popen:
    return subprocess.Popen(
        words, env={**os.environ, "RAY_ADDRESS": nodes.address}, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(600)
def test_prometheus_gets_what_metrics_jsonl_holds_for_as_long_as_it_is_so(tmp_path, nodes):
    """Of a training, then of a sweep and its trials."""
    toy_dataset(tmp_path / "data")
    config = toy_config(tmp_path / "data", tmp_path / "runs", log_interval=20, checkpoint_interval=100)
    config |= {"epochs": 20000, "max_steps": 50000, "eval_interval": 10}
    driver = started(command(config, "scaling.num_workers=1", "scaling.cpus_per_worker=1"), nodes)
    try:
        of_run = "run=toy"

        def names() -> set[str]:
            assert driver.poll() is None, driver.stderr.read()
            return {name for name, tags in scraped(nodes) if tags == of_run}

        wait_for(lambda: names() == set(OF_A_RUN))
        values = {name: value for (name, _), value in scraped(nodes).items()}
        records = [*map(json.loads, (tmp_path / "runs/toy/metrics.jsonl").read_text().splitlines())]
    finally:
        driver.send_signal(signal.SIGTERM)
        driver.communicate(timeout=120)
    for key, name in ray_metrics.RECORDED.items():
        assert values[name] in [record[key] for record in records if key in record], name
    rates = [8 / record["time/step_s"] for record in records if "time/step_s" in record]
    assert values["hrm_ray_examples_per_second"] in rates
    assert 0 < values["hrm_ray_data_wait_ratio"] < 1
    assert (values["hrm_ray_workers"], values["hrm_ray_restarts"]) == (1, 0)
    checkpoints = [file.stat().st_mtime for file in tmp_path.glob("runs/toy/checkpoints/*/manifest.json")]
    assert values["hrm_ray_last_checkpoint_timestamp_seconds"] > min(checkpoints) - 300
    wait_for(lambda: not scraped(nodes))  # it has ended: nothing looks as if it went on

    sweep = toy_sweep(tmp_path, pruner=None, num_trials=3, train={"max_steps": 50000, "epochs": 20000})
    file = tmp_path / "toy.yaml"
    file.write_text(
        yaml.safe_dump({**{k: v for k, v in plain(sweep).items() if v is not None}, "pruner": "none"})
    )
    driver = started([sys.executable, "-m", "hrm_ray.cli", "tune", str(file)], nodes)
    try:

        def running() -> bool:
            assert driver.poll() is None, driver.stderr.read()
            found = scraped(nodes)
            trials = {tags for name, tags in found if name == "hrm_ray_step_seconds"}
            return trials == {f"run=trial-000{n},sweep=toy" for n in (0, 1)} and (
                found.get(("hrm_ray_trials", "state=running,sweep=toy")) == 2
            )

        wait_for(running)
        assert scraped(nodes)["hrm_ray_trials", "state=complete,sweep=toy"] == 0
    finally:
        driver.send_signal(signal.SIGTERM)
        driver.communicate(timeout=120)
