"""Sweeps measured, on toy data that are made here: what is lost between trials, what a sweep costs, what it survives.

    python -m benchmarks.tuning what=start       # from the end of a trial to the begin of the next, ours and Ray's way
    python -m benchmarks.tuning what=overhead    # CPU time of a sweep, and of the same trainings in a row
    python -m benchmarks.tuning what=kills       # the driver is killed at random moments and started again

`start`: both in one run, one trial at a time. Ray's own pattern is a trial that starts a `TorchTrainer`. `overhead`:
CPU time of all processes, after the first trial, which imports. `kills`: 20 times SIGKILL to the driver and all that
it started; then every trial is there once, and those that are complete have the weights of `hrm-ray train`.
"""

import csv
import json
import os
import random
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks import front
from hrm_ray.config.compose import train_config
from hrm_ray.errors import RunFailed
from hrm_ray.storage.storage import Storage
from hrm_ray.training import launch
from hrm_ray.training.checkpoint import finished
from hrm_ray.tuning.config import plain, sweep_config
from hrm_ray.tuning.study import trial_name
from hrm_ray.tuning.sweep import run_sweep
from tests.toy import ARCH, toy_dataset

STEPS = 60
SAMPLE_S = 0.1


def sweep_of(folder: Path, num_trials: int, steps: int = STEPS, **values: Any):
    """Trials of a small model, one after another unless said otherwise."""
    if not (folder / "data").exists():
        toy_dataset(folder / "data", num_train=256, num_test=32)
    train = {f"arch.{key}": value for key, value in ARCH.items()}
    train |= {"data": folder / "data", "global_batch_size": 32, "epochs": steps, "max_steps": steps}
    train |= {"eval_interval_steps": 20, "lr_warmup_steps": 4, "device": "cpu", "forward_dtype": "float32"}
    train |= {"tensorboard": "false", "log_interval": 10, "checkpoint_interval": 15}
    sweep = {
        "train": [f"{key}={value}" for key, value in train.items()],
        "space": {"lr": {"log": [1e-4, 1e-1]}},
        "metric": "eval/accuracy",
        "pruner": None,
        "max_concurrent": 1,
        "num_trials": num_trials,
        "storage": str(folder / "sweeps"),
        "run_name": "sweep",
    }
    return sweep_config({**sweep, **values})


def events(run: Storage, *names: str) -> list[float]:
    """When these happened, in seconds since the epoch."""
    lines = (run.read("events.jsonl") or b"").decode().splitlines()
    return [entry["time"] for entry in map(json.loads, lines) if entry["event"] in names]


def start(rounds: int) -> dict:
    """Seconds from the end of a trial to the begin of the next."""
    with tempfile.TemporaryDirectory() as aside:
        folder = Path(aside)
        config = sweep_of(folder, rounds + 2)
        run_sweep(config)
        runs = [Storage(config.storage) / "sweep" / trial_name(n) for n in range(rounds + 2)]
        spans = [(events(run, "started")[0], events(run, "finished")[0]) for run in runs]
        ours = [begin - end for (_, end), (begin, _) in pairwise(spans[1:])]
        theirs = _rays_pattern(folder, rounds + 2)
    return {
        "ours_s": front_numbers(ours),
        "torch_trainer_s": front_numbers(theirs),
        "rounds": rounds,
    }


def front_numbers(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 2), "most": round(max(values), 2)}


def _rays_pattern(folder: Path, num_trials: int) -> list[float]:
    """The same of trials that start a `TorchTrainer` each, from its last report to the next one's first line."""
    import logging

    import ray
    from ray import tune

    ray.init(
        address="local",
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
        resources={"trial_slot": 1},
    )
    try:
        times = folder / "times"
        times.mkdir()
        tune.run(
            _torch_trainer,
            config={"times": str(times), "lr": tune.loguniform(1e-4, 1e-1)},
            num_samples=num_trials,
            resources_per_trial=tune.PlacementGroupFactory([{"trial_slot": 1}]),
            storage_path=str(folder / "tune"),
            verbose=0,
        )
    finally:
        ray.shutdown()
    spans = sorted(tuple(map(float, file.read_text().split())) for file in times.iterdir())
    return [begin - end for (_, end), (begin, _) in pairwise(spans[1:])]


def _torch_trainer(config: dict[str, Any]) -> None:
    import ray.train
    import ray.train.torch
    from ray.tune.integration.ray_train import TuneReportCallback

    name = ray.tune.get_context().get_trial_id()
    ray.train.torch.TorchTrainer(
        _train_a_little,
        train_loop_config={**config, "name": name},
        scaling_config=ray.train.ScalingConfig(num_workers=1),
        run_config=ray.train.RunConfig(
            name=name, storage_path=f"{config['times']}-train", callbacks=[TuneReportCallback()]
        ),
    ).fit()


def _train_a_little(config: dict[str, Any]) -> None:
    import ray.train

    begun = time.time()
    time.sleep(1)
    ray.train.report({"lr": config["lr"]})
    Path(config["times"], config["name"]).write_text(f"{begun} {time.time()}")


def overhead(rounds: int) -> dict:
    """CPU seconds, beyond the first trial, of a sweep of `rounds` trials and of the same runs in one process."""
    used = {}
    with tempfile.TemporaryDirectory() as aside:
        folder = Path(aside)
        for name in ("sweep", "alone"):
            seconds = [_cpu_s_of(folder, name, count) for count in (1, rounds + 1)]
            used[name] = seconds[1] - seconds[0]
    return {
        "cpu_s": {name: round(seconds, 1) for name, seconds in used.items()},
        "overhead": round(used["sweep"] / used["alone"] - 1, 4),
        "rounds": rounds,
    }


def _cpu_s_of(folder: Path, name: str, count: int) -> float:
    """Of all processes of a command of its own."""
    config = sweep_of(folder, count, 400, run_name=f"{name}-{count}")
    file = folder / f"{name}-{count}.yaml"
    file.write_text(yaml.safe_dump(plain(config)))
    command = psutil.Popen(
        [sys.executable, "-m", "benchmarks.tuning", f"_{name}", str(file)], stdout=subprocess.DEVNULL
    )
    used: dict[int, float] = {}
    while command.poll() is None:  # Ray does not wait for all of its processes, so the system adds nothing up
        with suppress(psutil.Error):
            for process in [command, *command.children(recursive=True)]:
                with suppress(psutil.Error):
                    times = process.cpu_times()
                    used[process.pid] = times.user + times.system
        time.sleep(SAMPLE_S)
    if command.returncode:
        raise RunFailed(f"the command of {file} has failed")
    return sum(used.values())


def _alone(file: str) -> None:
    """The runs of a sweep that has ended, again, one after another."""
    import torch

    torch.set_num_threads(1)
    config = sweep_config(yaml.safe_load(Path(file).read_text()))
    swept = Path(config.storage) / str(config.run_name).replace("alone", "sweep") / "trials.csv"
    for row in csv.DictReader(swept.open()):
        words = [*shlex.split(row["words"]), f"storage={config.storage}-alone", "scaling.mode=local"]
        launch.train(
            train_config([*words, f"run_name={config.run_name}-{row['number']}"]), show_progress=False
        )


def kills(rounds: int) -> dict:
    """What came of a sweep whose driver was killed so often."""
    draws = random.Random(0)
    with tempfile.TemporaryDirectory() as aside:
        folder = Path(aside)
        config = sweep_of(
            folder,
            3 * rounds // 2,
            100,
            pruner={"name": "percentile", "percentile": 60.0},
            max_concurrent=2,
        )
        file = folder / "sweep.yaml"
        file.write_text(yaml.safe_dump(plain(config)))
        sweep = folder / "sweeps" / "sweep"
        lived = []
        while len(lived) < rounds:
            begun = time.monotonic()
            driver = _driver(file)
            limit = draws.uniform(6, 30)  # from its imports to several trials
            try:
                driver.wait(limit)
                break  # it has ended before
            except subprocess.TimeoutExpired:
                os.killpg(driver.pid, signal.SIGKILL)
                driver.wait()
                lived.append(round(time.monotonic() - begun, 1))
                print(f"killed after {lived[-1]} s ({len(lived)} of {rounds})", file=sys.stderr)
        last = _driver(file)
        if last.wait() != 0:
            raise RunFailed(f"the last command ended with {last.returncode}")
        rows = list(csv.DictReader((sweep / "trials.csv").open()))
        complete = [row for row in rows if row["state"] == "COMPLETE"]
        import torch

        torch.set_num_threads(1)
        differ = []
        for row in complete:
            words = [*shlex.split(row["words"]), f"storage={folder / 'again'}", "scaling.mode=local"]
            again = train_config(words)
            launch.train(again, show_progress=False)
            if _weights(launch.run_folder(again)) != _weights(
                Storage(sweep) / trial_name(int(row["number"]))
            ):
                differ.append(row["number"])
        states = {
            state: sum(row["state"] == state for row in rows)
            for state in ("COMPLETE", "PRUNED", "FAIL", "RUNNING")
        }
        return {
            "kills": len(lived),
            "lived_s": lived,
            "num_trials": config.num_trials,
            "rows": len(rows),
            "numbers_once": sorted(int(row["number"]) for row in rows) == list(range(config.num_trials or 0)),
            "states": states,
            "complete_with_other_weights": differ,
        }


def _driver(file: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "hrm_ray.cli", "tune", str(file)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _weights(run: Storage) -> str:
    return finished(run)[-1].manifest.files["model.safetensors"].sha256


def measure(what: str, rounds: int) -> dict:
    found = {"start": start, "overhead": overhead, "kills": kills}[what](rounds)
    return {"benchmark": f"tuning {what}", **found}


def tell(result: dict) -> str:
    return json.dumps({key: value for key, value in result.items() if key != "benchmark"}, indent=2)


def main() -> None:
    if sys.argv[1:2] == ["_alone"]:
        _alone(sys.argv[2])
    elif sys.argv[1:2] == ["_sweep"]:
        run_sweep(sweep_config(yaml.safe_load(Path(sys.argv[2]).read_text())))
    else:
        front.run(__doc__, measure, tell, {"what": ("start", "overhead", "kills"), "rounds": 20})


if __name__ == "__main__":
    main()
