"""Sweeps on a real Ray: every trial once, bit-equal to the run that its words describe, whatever comes between."""

import csv
import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from hrm_ray.config.compose import train_config
from hrm_ray.errors import RunFailed, UserError
from hrm_ray.training import launch
from hrm_ray.training.checkpoint import finished
from hrm_ray.tuning import status
from hrm_ray.tuning.config import plain
from hrm_ray.tuning.study import trial_name, want
from hrm_ray.tuning.sweep import run_sweep, sweep_folder
from hrm_ray.tuning.view import View
from tests.tuning.toy_sweep import toy_sweep

pytestmark = pytest.mark.ray
WEIGHTS = "model.safetensors"


def rows_of(config) -> list[dict]:
    with (sweep_folder(config).local_path / "trials.csv").open() as file:
        return list(csv.DictReader(file))


def sha_of_weights(run) -> str:
    return finished(run)[-1].manifest.files[WEIGHTS].sha256


def retrained(row: dict, storage: Path) -> str:
    """SHA-256 of the weights that `hrm-ray train` has in the end with the words of a trial."""
    config = train_config([*shlex.split(row["words"]), f"storage={storage}", "scaling.mode=local"])
    torch.set_num_threads(1)
    launch.train(config, show_progress=False)
    return sha_of_weights(launch.run_folder(config))


def wait_for(condition, timeout_s: float = 200) -> None:  # a driver starts in 15 s, on a busy machine later
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)


def test_a_sweep_from_beginning_to_end(tmp_path, ray_cluster):
    config = toy_sweep(tmp_path)
    result = run_sweep(config)
    assert result.summary["finished"] and result.stopped_by is None
    assert sum(result.summary["states"].values()) == 6
    rows = rows_of(config)
    assert [int(row["number"]) for row in rows] == list(range(6))
    complete = [row for row in rows if row["state"] == "COMPLETE"]
    pruned = [row for row in rows if row["state"] == "PRUNED"]
    assert complete and pruned and len(complete) + len(pruned) == 6
    folder = sweep_folder(config)
    for row in complete:
        assert sha_of_weights(folder / trial_name(int(row["number"]))) == retrained(row, tmp_path / "again")
        assert row["steps"] == "40" and float(row["train_s"]) > 0
    for row in pruned:  # their checkpoints are not kept
        assert not finished(folder / trial_name(int(row["number"]))) and "pruned at step" in row["reason"]
        assert int(row["steps"]) < 40
    best = yaml.safe_load(folder.read("best.yaml"))
    assert best["values"]["eval/accuracy"] == max(float(row["eval/accuracy"]) for row in complete)
    assert best["command"] == f"hrm-ray train {shlex.join(best['words'])}"
    assert result.best["number"] == best["number"]
    summary = json.loads(folder.read("summary.json"))
    assert summary["spent"]["cpu_s"] > 0 and summary["estimate"]["step_s"] > 0

    # The same command has nothing left to do, and with more trials it goes on.
    before = (folder.local_path / "study.log").read_bytes()
    assert run_sweep(config).summary["states"] == result.summary["states"]
    more = run_sweep(config.model_copy(update={"num_trials": 7}))
    assert sum(more.summary["states"].values()) == 7
    assert (folder.local_path / "study.log").read_bytes().startswith(before)
    assert rows_of(config)[:6] == rows


@pytest.mark.long
def test_a_ray_train_run_with_the_words_of_a_trial_is_bit_equal(tmp_path, ray_cluster):
    config = toy_sweep(tmp_path, num_trials=1)
    run_sweep(config)
    (row,) = rows_of(config)
    again = train_config([*shlex.split(row["words"]), f"storage={tmp_path / 'again'}"])
    assert again.scaling.mode == "ray"
    launch.train(again, show_progress=False)
    assert sha_of_weights(launch.run_folder(again)) == sha_of_weights(sweep_folder(config) / trial_name(0))


def test_points_that_cannot_train_fail_with_their_reason_and_do_not_stop_the_sweep(tmp_path, ray_cluster):
    space = {"lr": [1e-3, 1e30], "arch.num_heads": [2, 3]}
    config = toy_sweep(
        tmp_path, space=space, sampler="grid", num_trials=None, pruner=None, train={"ema": "true"}
    )
    words = [w for w in config.train if "num_heads" not in w and "warmup" not in w]
    config = config.model_copy(update={"train": (*words, "lr_warmup_steps=0")})
    result = run_sweep(config)
    by_point = {(row["lr"], row["arch.num_heads"]): row for row in rows_of(config)}
    assert len(by_point) == 4 and result.summary["finished"]
    assert by_point["0.001", "2"]["state"] == "COMPLETE"
    diverged = by_point["1e+30", "2"]
    assert diverged["state"] == "FAIL" and "not finite" in diverged["reason"]
    for lr in ("0.001", "1e+30"):
        refused = by_point[lr, "3"]
        assert refused["state"] == "FAIL" and "is not a multiple of arch.num_heads=3" in refused["reason"]
        assert not (sweep_folder(config).local_path / trial_name(int(refused["number"]))).exists()


def test_three_alike_failures_of_another_kind_stop_the_sweep(tmp_path, ray_cluster):
    """Such as folders of trials in which nothing can be written."""
    config = toy_sweep(tmp_path, num_trials=9)
    folder = sweep_folder(config).local_path
    left = [folder / trial_name(number) for number in range(9)]

    class InTheWay(View):
        def outline(self, *about):
            for path in left:
                path.write_text("a file")

        def say(self, line):
            """A file has just been renamed: somebody makes a folder where the run is to write a file."""
            for path in left:
                if not path.exists():
                    (path / "lock").mkdir(parents=True)

    with pytest.raises(RunFailed, match=r"3 trials failed with the same error: .*; fix it") as info:
        run_sweep(config, view=InTheWay())
    assert "\n" not in str(info.value)
    rows = rows_of(config)
    assert 3 <= len([row for row in rows if row["state"] == "FAIL"]) <= 4 and len(rows) <= 5


def test_why_a_folder_cannot_be_made_is_said(tmp_path, ray_cluster, monkeypatch):
    """And not that a worker does not see it, which would end the sweep."""
    config = toy_sweep(tmp_path, num_trials=1, pruner=None)
    folder = sweep_folder(config).local_path / trial_name(0)
    make = Path.mkdir

    def mkdir(path, *args, **options):
        if path == folder:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        make(path, *args, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    run_sweep(config)
    (row,) = rows_of(config)
    assert (row["state"], row["reason"]) == ("FAIL", f"{folder}: Permission denied")


@pytest.mark.long
def test_data_that_are_gone_end_the_sweep_and_fail_no_trial(tmp_path, ray_cluster):
    config = toy_sweep(tmp_path, num_trials=3)

    class Removes(View):
        def outline(self, *about):
            (tmp_path / "data").rename(tmp_path / "elsewhere")

    with pytest.raises(UserError, match="data"):
        run_sweep(config, view=Removes())
    (tmp_path / "elsewhere").rename(tmp_path / "data")
    result = run_sweep(config)
    assert sum(result.summary["states"].values()) == 3 and result.summary["states"]["FAIL"] == 0


class Watching(View):
    """Calls `act` with the live trials, once, as soon as `when` says so."""

    def __init__(self, when, act):
        self.when, self.act, self.acted = when, act, False

    def show(self, study, live, spent):
        if not self.acted and self.when(live):
            self.acted = True
            self.act(study, live)


def training(live, step=1):
    return any(trial.step >= step for trial in live)


def actors() -> list[psutil.Process]:
    """Actors of trials at work."""
    ours = psutil.Process().children(recursive=True)
    return [p for p in ours if "ray::" in "".join(p.cmdline()) and "Trial." in "".join(p.cmdline())]


@pytest.mark.long
def test_a_worker_that_is_killed_is_replaced_and_its_trial_is_as_if_undisturbed(tmp_path, ray_cluster):
    killed = []

    def kill(study, live):
        for process in actors():
            killed.append(process.pid)
            process.kill()

    config = toy_sweep(tmp_path, num_trials=2, pruner=None, train={"max_steps": 120, "epochs": 60})
    result = run_sweep(config, view=Watching(lambda live: training(live, 8), kill))
    assert killed and result.summary["states"]["COMPLETE"] == 2
    for row in rows_of(config):
        run = sweep_folder(config) / trial_name(int(row["number"]))
        assert sha_of_weights(run) == retrained(row, tmp_path / "again")
    starts = [
        sum(
            '"started"' in line
            for line in (sweep_folder(config) / trial_name(n)).read("events.jsonl").decode().splitlines()
        )
        for n in range(2)
    ]
    assert max(starts) == 2


@pytest.mark.long
def test_a_worker_that_is_lost_too_often_fails_its_trial(tmp_path, ray_cluster):
    config = toy_sweep(
        tmp_path,
        num_trials=1,
        pruner=None,
        train={"max_steps": 400, "epochs": 200, "failure.max_failures": 0},
    )
    result = run_sweep(
        config, view=Watching(training, lambda study, live: [process.kill() for process in actors()])
    )
    (row,) = result.trials
    assert row["state"] == "FAIL" and "worker was lost" in row["reason"]


@pytest.mark.long
def test_a_trial_is_stopped_by_hand_and_the_sweep_goes_on(tmp_path, ray_cluster):
    config = toy_sweep(tmp_path, num_trials=3, pruner=None, train={"max_steps": 400, "epochs": 200})
    folder = sweep_folder(config)

    def stop(study, live):
        want(folder, config, stop=[live[0].number], settings={"num_trials": 2})

    result = run_sweep(config, view=Watching(training, stop))
    assert result.summary["states"] == {"COMPLETE": 1, "PRUNED": 1, "FAIL": 0, "RUNNING": 0}
    (stopped,) = [row for row in result.trials if row["state"] == "PRUNED"]
    assert stopped["reason"] == "stopped by hand"
    assert finished(folder / trial_name(stopped["number"]))  # its last checkpoint is kept


@pytest.mark.long
def test_a_budget_ends_the_sweep_well_and_a_larger_one_continues_it(tmp_path, ray_cluster):
    config = toy_sweep(
        tmp_path,
        num_trials=2,
        pruner=None,
        train={"max_steps": 300, "epochs": 150},
        budget={"cpu_hours": 3 / 3600},
    )
    with pytest.raises(
        UserError, match=r"estimated to take .*, more than budget\.cpu_hours=.*; lower num_trials"
    ):
        run_sweep(config)
    assert not sweep_folder(config).exists()
    result = run_sweep(config, yes=True)
    assert result.summary["stop_reason"] == "budget" and result.summary["states"]["RUNNING"] >= 1
    more = config.model_copy(update={"budget": config.budget.model_copy(update={"cpu_hours": 1.0})})
    assert run_sweep(more, given=["budget"]).summary["states"]["COMPLETE"] == 2
    for row in rows_of(config):
        run = sweep_folder(config) / trial_name(int(row["number"]))
        assert sha_of_weights(run) == retrained(row, tmp_path / "again")


@pytest.mark.long
def test_several_metrics_give_a_front(tmp_path, ray_cluster):
    metric = {"eval/accuracy": "maximize", "eval/learned_steps": "minimize"}
    result = run_sweep(toy_sweep(tmp_path, metric=metric, pruner=None, num_trials=3))
    assert result.summary["states"]["COMPLETE"] == 3
    assert 1 <= len(result.summary["best"]) <= 3
    best = result.best["values"]
    for row in result.trials:
        assert not (
            row["eval/accuracy"] > best["eval/accuracy"]
            and row["eval/learned_steps"] < best["eval/learned_steps"]
        )


@pytest.mark.long
def test_finalists_are_repeated_with_other_seeds(tmp_path, ray_cluster):
    config = toy_sweep(tmp_path, num_trials=2, pruner=None, repeat={"seeds": 2, "top": 1})
    result = run_sweep(config)
    (row,) = result.summary["repeat"]
    assert row["number"] == result.best["number"] and len(row["values"]) == 2
    assert row["mean"] == pytest.approx(sum(row["values"]) / 2)
    assert row["curse"] == pytest.approx(row["value"] - row["mean"])
    assert run_sweep(config).summary["repeat"] == result.summary["repeat"]  # from what lies there


@pytest.mark.long
def test_parts_of_a_gpu_are_shared_by_trials(tmp_path):
    """By what Ray is told: there is none here."""
    code = (
        "import ray, sys; from hrm_ray.tuning.execute import Growth, Slot, check_fits\n"
        "ray.init(address='local', num_cpus=2, num_gpus=1, include_dashboard=False, logging_level='ERROR')\n"
        "print(Slot(1, 1, 0.5).at_once(), Slot(1, 1, 1.0).at_once())\n"
        "from hrm_ray.errors import UserError\n"
        "try: check_fits(Slot(2, 1, 1.0), Growth())\n"
        "except UserError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250)
    assert done.stdout.splitlines()[0] == "2 1", done.stderr
    assert (
        "a trial needs 2 x (1 CPU and 1 GPU), this machine has no room for that: it has 1 node (2 CPU, 1 GPU)"
        in done.stdout
    )


# From another process, as a person does


def start(config_file: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "hrm_ray.cli", "tune", str(config_file), *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.fixture
def yaml_file(tmp_path) -> Path:
    config = toy_sweep(
        tmp_path,
        num_trials=4,
        run_name="toy",
        train={"max_steps": 120, "epochs": 60, "checkpoint_interval": 10},
    )
    file = tmp_path / "toy.yaml"
    values = {key: value for key, value in plain(config).items() if value is not None}
    file.write_text(yaml.safe_dump(values))
    return file


def states(folder: Path) -> list[str]:
    try:
        return [row["state"] for row in status.status(status_folder(folder))[2]]
    except UserError:
        return []


def status_folder(folder: Path):
    from hrm_ray.storage.storage import Storage

    return Storage(folder)


def test_a_killed_driver_is_followed_by_another_that_loses_nothing(tmp_path, yaml_file):
    folder = tmp_path / "sweeps" / "toy"
    first = start(yaml_file)
    wait_for(lambda: (folder / "trial-0001" / "checkpoints").exists() or first.poll() is not None)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert "RUNNING" in states(folder)
    second = start(yaml_file)
    out, err = second.communicate(timeout=200)
    assert second.returncode == 0, err
    rows = list(csv.DictReader((folder / "trials.csv").open()))
    assert len(rows) == 4 and {row["state"] for row in rows} <= {"COMPLETE", "PRUNED"}
    for row in rows:
        if row["state"] == "COMPLETE":
            run = status_folder(folder) / trial_name(int(row["number"]))
            assert sha_of_weights(run) == retrained(row, tmp_path / "again")
    assert "look at" in out


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_a_signal_stops_the_sweep_with_checkpoints_and_two_drivers_are_one_too_many(
    tmp_path, yaml_file, number
):
    folder = tmp_path / "sweeps" / "toy"
    first = start(yaml_file)
    metrics = folder / "trial-0000" / "metrics.jsonl"
    wait_for(lambda: (metrics.exists() and metrics.read_text()) or first.poll() is not None)
    os.kill(first.pid, number)
    out, err = first.communicate(timeout=250)
    assert first.returncode == 128 + number, err
    assert "Traceback" not in err and "the same command continues" in out
    assert "RUNNING" in states(folder)
    begun = [run.parent for run in folder.glob("trial-*/metrics.jsonl") if run.read_text()]
    assert begun and all(finished(status_folder(run)) for run in begun)  # others had no step yet
    assert not psutil.pid_exists(first.pid)
    lock = status_folder(folder).lock()
    second = start(yaml_file)
    out, err = second.communicate(timeout=250)
    lock.close()
    assert second.returncode == 2 and "another process is at work on the sweep" in err
