"""Trials of two workers, which Ray Train starts in the placement group that Ray Tune has reserved."""

import json
import shlex
import time
from contextlib import suppress

import psutil
import pytest
import ray

from hrm_ray.config.compose import train_config
from hrm_ray.errors import OutOfMemory, RunFailed
from hrm_ray.training import launch
from hrm_ray.training.checkpoint import finished
from hrm_ray.tuning import workers
from hrm_ray.tuning.study import trial_name, want
from hrm_ray.tuning.sweep import run_sweep, sweep_folder
from hrm_ray.tuning.view import View
from tests.training.processes import start
from tests.training.test_workers import _worker
from tests.tuning.toy_sweep import toy_sweep

pytestmark = pytest.mark.ray
TWO = {"num_workers": 2, "cpus": 1}
FREE_S = 10.0  # a trial that is over has given back everything after so long


def processes(name: str) -> list[psutil.Process]:
    """Those of Ray's actors of this class."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            if f"ray::{name}" in "".join(process.cmdline()):
                found.append(process)
    return found


def all_is_free() -> bool:
    there = [p for name in ("RayTrainWorker", "Controller", "Trial") for p in processes(name)]
    return not there and ray.available_resources().get("CPU") == 2


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def wait_for(condition, timeout_s: float = FREE_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)


class Disturbs(View):
    """Calls what is given for a trial, once, as soon as it has trained for some steps."""

    def __init__(self, **acts):
        self.acts = {int(name.removeprefix("trial_")): act for name, act in acts.items()}

    def show(self, study, live, spent):
        for trial in live:
            if trial.step >= 8 and trial.number in self.acts:
                self.acts.pop(trial.number)(trial)


def weights(run) -> str:
    return finished(run)[-1].manifest.files["model.safetensors"].sha256


def events(run, kind: str) -> list[dict]:
    entries = map(json.loads, run.read("events.jsonl").decode().splitlines())
    return [entry for entry in entries if entry["event"] == kind]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_trials_of_two_workers_are_bit_equal_to_two_processes_whatever_is_killed(tmp_path, ray_cluster):
    """Of the first trial a worker, of the second the actor that started its workers."""
    killed, left = [], []

    def kill_worker(trial):
        killed.append(max(processes("RayTrainWorker"), key=psutil.Process.create_time))
        killed[-1].kill()

    def kill_actor(trial):
        left.extend(processes("RayTrainWorker") + processes("Controller"))
        killed.extend(processes("Trial"))
        killed[-1].kill()

    config = toy_sweep(
        tmp_path,
        space={"keep_last": [2, 3, 4]},  # the same training in all
        sampler="grid",
        num_trials=None,
        pruner=None,
        keep="all",
        train={"max_steps": 60, "epochs": 60},
        resources=TWO,
    )
    result = run_sweep(config, view=Disturbs(trial_0=kill_worker, trial_1=kill_actor))
    wait_for(all_is_free)
    assert result.summary["states"] == {"COMPLETE": 3, "PRUNED": 0, "FAIL": 0, "RUNNING": 0}
    assert len(killed) == 2 and len(left) == 3 and not any(is_alive(process) for process in left)
    runs = [sweep_folder(config) / trial_name(number) for number in range(3)]
    assert [len(events(run, "started")) for run in runs] == [2, 2, 1]
    again = train_config([*shlex.split(result.trials[2]["words"]), f"storage={tmp_path / 'again'}"])
    assert again.scaling.num_workers == 2
    start(_worker, 2, again.model_dump(mode="json"))  # without Ray, since that starts in a second
    summary = launch.last_summary(launch.run_folder(again))
    for run, row in zip(runs, result.trials, strict=True):
        assert weights(run) == weights(launch.run_folder(again))
        assert row["eval/accuracy"] == summary["best"]["eval/accuracy"]


@pytest.mark.long
def test_a_trial_that_is_over_frees_everything_for_the_next(tmp_path, ray_cluster):
    """One that is stopped, with a checkpoint, one that cannot train, and one that ends, in the same actor."""
    points = [(400, 1e-3), (20, 1e30), (20, 1e-3)]
    config = toy_sweep(
        tmp_path,
        space={"max_steps": [20, 400], "lr": [1e-3, 1e30]},
        try_first=[{"max_steps": steps, "lr": lr} for steps, lr in points],
        num_trials=3,
        pruner=None,
        keep="all",
        train={"lr_warmup_steps": 0, "epochs": 200},
        resources=TWO,
    )
    config = config.model_copy(update={"train": tuple(w for w in config.train if "max_steps" not in w)})
    folder = sweep_folder(config)
    asked = []

    def stop(trial):
        asked.append(time.time())
        want(folder, config, stop=[trial.number])

    result = run_sweep(config, view=Disturbs(trial_0=stop))
    wait_for(all_is_free)
    stopped, diverged, whole = result.trials
    assert stopped["state"] == "PRUNED" and stopped["reason"] == "stopped by hand"
    assert diverged["state"] == "FAIL" and "not finite" in diverged["reason"]
    assert whole["state"] == "COMPLETE" and whole["steps"] == 20
    run = folder / trial_name(0)
    (end,) = events(run, "stopped")
    assert end["time"] - asked[0] < FREE_S
    assert finished(run)[-1].manifest.global_step == end["global_step"] < 400


@pytest.mark.parametrize(
    ("cause", "raised"),
    [("the node was running low on memory", OutOfMemory), ("connection closed by peer", RunFailed)],
)
def test_a_worker_that_lacked_memory_refuses_the_point(tmp_path, monkeypatch, cause, raised):
    def train_on_ray(*arguments):
        raise RunFailed("Ray Train gave up") from Exception(cause)

    monkeypatch.setattr(workers, "train_on_ray", train_on_ray)
    monkeypatch.setattr("ray.util.get_current_placement_group", lambda: "group")
    config = train_config(["data=there", f"storage={tmp_path}"])
    with pytest.raises(raised):
        workers.train_in_reservation(config, launch.run_folder(config), *[lambda *told: None] * 3)
