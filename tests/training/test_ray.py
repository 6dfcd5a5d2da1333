"""Training under Ray Train, on a real local cluster, through the command line where a person would."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import Mock, call

import numpy as np
import psutil
import pytest
import torch
import yaml
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.worker_group import ExecutionGroup, WorkerGroup
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from hrm_ray import nodes, ray_session
from hrm_ray.config.schema import TrainConfig
from hrm_ray.errors import RunFailed, TransientError, UserError, notes
from hrm_ray.nodes import parsed
from hrm_ray.training import launch, ray_overrides, ray_train
from hrm_ray.training.checkpoint import finished
from tests.toy import toy_config, toy_dataset

pytestmark = pytest.mark.ray


@pytest.fixture
def config(tmp_path: Path) -> dict:
    toy_dataset(tmp_path / "data", num_train=59, num_identifiers=5)
    return toy_config(tmp_path / "data", tmp_path / "runs", ema=True)


def on_ray(num_workers: int) -> dict:
    return {"mode": "ray", "num_workers": num_workers, "cpus_per_worker": 1}


def last(config: TrainConfig):
    return finished(launch.run_folder(config))[-1]


def test_two_ray_workers_equal_the_bare_loop(config, ray_cluster):
    bare = TrainConfig(**config | {"run_name": "bare"})
    ray = TrainConfig(**config | {"run_name": "ray", "scaling": on_ray(2)})
    launch.train(bare, show_progress=False)
    summary, stopped_by = launch.train(ray, show_progress=False)
    assert stopped_by is None
    assert summary == json.loads((launch.run_folder(ray).local_path / "summary.json").read_text())
    assert summary["global_step"] == 20 and summary["finished"]
    expected = last(bare).tensors("model.safetensors")
    for name, tensor in last(ray).tensors("model.safetensors").items():
        np.testing.assert_allclose(tensor, expected[name], rtol=1e-4, atol=2e-5)


def test_a_loss_that_is_not_finite_ends_the_run_without_retries(config, ray_cluster):
    bad = TrainConfig(**config | {"lr": 1e30, "lr_warmup_steps": 0, "scaling": on_ray(2)})
    with pytest.raises(RunFailed, match=r"not finite at step \d+ on rank \d"):
        launch.train(bad, show_progress=False)


def test_a_model_without_room_ends_the_run_without_retries(config, ray_cluster):
    config |= {"arch": config["arch"] | {"hidden_size": 2**22}, "scaling": on_ray(1)}
    with pytest.raises(UserError, match="not enough memory for the model") as info:
        launch.train(TrainConfig(**config), show_progress=False)
    assert info.value.exit_code == 2


class KillOnce(launch.Driver):
    """Kills a process of the run after step 7, once: the worker, or `victim`. Notes the environment that it had."""

    def __init__(self, config, victim="RayTrainWorker"):
        super().__init__(config)
        self.victim, self.environment = victim, None

    def progress(self, progress):
        if self.environment is None and progress.step >= 7:
            ours = psutil.Process().children(recursive=True)
            found = [p for p in ours if self.victim in "".join(p.cmdline())]
            process = max(found, key=psutil.Process.create_time)  # the run before may still be ending
            self.environment = process.environ()
            process.kill()


@pytest.mark.parametrize("victim", ["RayTrainWorker", "ray::Controller"])
def test_what_is_killed_and_not_to_be_replaced_ends_the_run_in_one_line(config, ray_cluster, victim):
    """And nothing stays reserved."""
    import ray

    config |= {"scaling": on_ray(1), "max_steps": 400, "epochs": 200, "failure": {"max_failures": 0}}
    lost = TrainConfig(**config)
    with pytest.raises(
        RunFailed, match=r"Ray Train failed: .*; the same command continues from the last"
    ) as e:
        ray_train.train_on_ray(lost, launch.run_folder(lost), KillOnce(lost, victim))
    assert "\n" not in str(e.value)
    if victim == "RayTrainWorker":
        assert "died without an exception" in str(e.value) and notes(e.value)[0].startswith(
            "worker 0 (process "
        )
    _wait_for(lambda: ray.available_resources().get("CPU") == 2)


def test_another_ray_is_refused_before_it_trains(monkeypatch):
    monkeypatch.delattr(DataParallelTrainer, "_initialize_and_run_controller")
    monkeypatch.setattr(DataParallelTrainer, "fit", None)
    with pytest.raises(UserError, match=r"starts runs in another way than ray 2\.60; install that"):
        ray_overrides.NonblockingTrainer(lambda: None).start()


def test_what_ray_does_not_understand_is_said_in_one_line(config, ray_cluster, monkeypatch):
    monkeypatch.setenv("RAY_TRAIN_CALLBACKS", "no.such.Callback")
    with pytest.raises(RunFailed, match=r"Ray Train failed: .*no\.such\.Callback"):
        launch.train(TrainConfig(**config | {"scaling": on_ray(1)}), show_progress=False)


def test_a_killed_worker_is_replaced_and_nothing_is_lost(config, ray_cluster):
    """SIGKILL to a worker in the middle: the run ends like the undisturbed one, bit for bit."""
    scaling = on_ray(1)
    whole = TrainConfig(
        **config | {"run_name": "whole", "scaling": scaling, "max_steps": 60, "epochs": 30, "log_interval": 4}
    )
    launch.train(whole, show_progress=False)
    config |= {
        "run_name": "killed",
        "scaling": scaling,
        "max_steps": 60,
        "epochs": 30,
        "checkpoint_interval": 5,
        "log_interval": 4,
    }
    killed = TrainConfig(**config)
    driver = KillOnce(killed)
    ray_train.train_on_ray(killed, launch.run_folder(killed), driver)
    assert driver.environment, "the worker was never killed"
    assert driver.environment["MALLOC_ARENA_MAX"] == "1"  # so that it keeps memory, on a CPU
    assert last(killed).manifest.files == last(whole).manifest.files
    assert [_untimed(r) for r in _records(killed)] == [_untimed(r) for r in _records(whole)]


def test_when_the_session_of_a_run_ends_nothing_in_the_process_uses_it(config, ray_cluster, monkeypatch):
    """A call that comes while Ray shuts down ends the process, one after it starts a new Ray."""
    ours, found = set(threading.enumerate()), []

    @contextmanager
    def session():
        yield True
        found.extend(set(threading.enumerate()) - ours)

    monkeypatch.setattr(ray_session, "ray_session", session)
    launch.train(TrainConfig(**config | {"scaling": on_ray(1)}), show_progress=False)
    assert last(TrainConfig(**config)).manifest.global_step == 20
    assert not found


@dataclass
class DiesWhileJoining(ray_overrides.Joined):
    """Kills a worker while the first process group is formed: number 1 before, or `joining` when all are to join."""

    marker: str = ""
    joining: int | None = None

    @property
    def backend_cls(self):
        return DyingBackend


class DyingBackend(ray_overrides.JoinsWhereNeeded):
    def on_start(self, worker_group, backend_config):
        marker, victim = Path(backend_config.marker), backend_config.joining
        if not marker.exists():
            marker.touch()
            if victim is None:
                _kill(worker_group, 1)
            else:
                worker_group = KillsWhileTheyJoin(worker_group, victim)
        super().on_start(worker_group, backend_config)


@dataclass
class KillsWhileTheyJoin:
    """A group of workers, one of which is killed when all have been told to join."""

    group: ExecutionGroup
    victim: int

    def __getattr__(self, name):
        return getattr(self.group, name)

    def __len__(self):
        return len(self.group)

    def execute_single_async(self, rank, *told, **more):
        joined = self.group.execute_single_async(rank, *told, **more)
        if rank == len(self) - 1:
            _kill(self.group, self.victim)
        return joined


def _kill(worker_group, rank: int) -> None:
    os.kill(worker_group.get_workers()[rank].metadata.pid, signal.SIGKILL)


class DiesWhenRead:
    """Kills whichever worker reads it, for the first `times`, which is when it is told to train."""

    def __init__(self, folder: Path, times: int):
        self.folder, self.times = folder, times

    def __setstate__(self, state: dict):
        self.__dict__ = state
        if "RayTrainWorker" not in "".join(psutil.Process().cmdline()):
            return
        for number in range(self.times):
            with suppress(FileExistsError):
                (self.folder / f"killed-{number}").touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)


def _train_with(_: DiesWhenRead, parameters: dict) -> dict:
    return ray_train._worker(parameters)


@pytest.mark.long
def test_a_worker_killed_as_it_is_told_to_train_is_replaced(config, ray_cluster, tmp_path, monkeypatch):
    """The two workers take the whole cluster; the other one already trains."""
    monkeypatch.setattr(ray_train, "_worker", partial(_train_with, DiesWhenRead(tmp_path, times=1)))
    summary, _ = launch.train(TrainConfig(**config | {"scaling": on_ray(2)}), show_progress=False)
    assert (tmp_path / "killed-0").exists() and summary["finished"]


@pytest.mark.long
def test_workers_that_die_whenever_they_are_told_to_train_end_the_run(
    config, ray_cluster, tmp_path, monkeypatch
):
    monkeypatch.setattr(ray_train, "_worker", partial(_train_with, DiesWhenRead(tmp_path, times=100)))
    config |= {"scaling": on_ray(1), "failure": {"max_failures": 1}}
    with pytest.raises(RunFailed, match=r"Ray Train failed: .*; the same command continues") as info:
        launch.train(TrainConfig(**config), show_progress=False)
    assert "\n" not in str(info.value)
    assert len(list(tmp_path.glob("killed-*"))) == 2


@pytest.mark.parametrize(
    ("error", "is_formed", "raised"),
    [
        (RayActorError(), True, WorkerGroupError),
        (WorkerGroupStartupFailedError("one died"), False, WorkerGroupError),
        # What another worker says of a dead one's connection may come before its death is known.
        (RayTaskError("join", "connection closed by peer", RuntimeError()), True, WorkerGroupError),
        (RayTaskError("init", "a mistake", ValueError()), False, RayTaskError),
        (WorkerGroupStartupTimeoutError(2), False, WorkerGroupStartupTimeoutError),  # no room yet
        (OutOfMemoryError("one was killed"), True, WorkerGroupError),  # by Ray, because memory was short
        (OutOfMemoryError("one was killed"), False, WorkerGroupError),
        (ValueError("a mistake"), True, ValueError),
    ],
)
def test_what_a_failed_start_is_taken_for(monkeypatch, error, is_formed, raised):
    shut = []

    def start(group):
        raise error

    monkeypatch.setattr(WorkerGroup, "_start", start)
    monkeypatch.setattr(WorkerGroup, "has_started", lambda group: is_formed)
    monkeypatch.setattr(WorkerGroup, "shutdown", lambda group: shut.append(group))
    group = object.__new__(ray_overrides.Workers)
    with pytest.raises(raised):
        group._start()
    assert shut == [group] * is_formed


def test_a_node_that_was_taken_away_is_the_cause_of_a_failed_start(monkeypatch):
    """By which Ray tells that it does not count."""
    gone = RayActorError(preempted=True)

    def start(group):
        raise WorkerGroupStartupFailedError("one died") from gone

    monkeypatch.setattr(WorkerGroup, "_start", start)
    monkeypatch.setattr(WorkerGroup, "has_started", lambda group: False)
    with pytest.raises(WorkerGroupError) as info:
        object.__new__(ray_overrides.Workers)._start()
    assert list(info.value.worker_failures.values()) == [gone]


def test_a_group_is_shut_down_whatever_a_callback_meets(monkeypatch):
    def shutdown(group):
        raise OutOfMemoryError("one was killed")

    monkeypatch.setattr(WorkerGroup, "shutdown", shutdown)
    group = object.__new__(ray_overrides.Workers)
    group._worker_group_state = state = Mock()
    group._world_rank_to_ongoing_poll = {}
    group.shutdown()
    state.shutdown.assert_called_once_with()
    assert not group.has_started()


@pytest.mark.parametrize(
    ("error", "told"),
    [(TransientError("full"), None), (UserError("wrong"), {"message": "wrong", "exit_code": 2})],
)
def test_what_may_pass_is_not_told_to_the_driver_which_would_end_the_run(
    config, monkeypatch, tmp_path, error, told
):
    channel = Mock(get=Mock(return_value=None))
    monkeypatch.setattr(ray_train, "Channel", lambda name: channel)
    context = Mock(get_world_rank=lambda: 1, get_world_size=lambda: 2, get_local_rank=lambda: 1)
    monkeypatch.setattr("ray.train.get_context", lambda: context)
    monkeypatch.setattr(ray_train, "TrainingLoop", Mock(side_effect=error))
    monkeypatch.setattr(ray_train, "check_seen", Mock())
    values = TrainConfig(**config).model_dump(mode="json")
    with pytest.raises(type(error)):
        ray_train._worker(
            {
                "channel": "c",
                "cpus": torch.get_num_threads(),
                "config": values,
                "storage": str(tmp_path / "run"),
            }
        )
    assert channel.put.call_args_list == ([] if told is None else [call("failure", told)])


@pytest.mark.long
@pytest.mark.parametrize("joining", [None, 0, 1])
def test_a_worker_killed_while_the_workers_join_leaves_nothing_reserved(
    config, ray_cluster, tmp_path, monkeypatch, joining
):
    """The two workers take the whole cluster: another start has room only if the dead one gave back its own."""
    marker = tmp_path / "killed"
    dying = partial(DiesWhileJoining, marker=str(marker), joining=joining)
    monkeypatch.setattr(ray_overrides, "Joined", dying)
    summary, _ = launch.train(TrainConfig(**config | {"scaling": on_ray(2)}), show_progress=False)
    assert marker.exists() and summary["finished"]


@pytest.mark.long
def test_where_no_worker_comes_though_there_is_room_ray_is_joined_anew(config, tmp_path):
    """Whatever it is that Ray waits for. In a process of its own, whose Ray is private."""
    program = """
        import json, sys
        from functools import partial
        from ray.train.v2._internal.execution.controller import TrainController
        from hrm_ray.config.schema import TrainConfig
        from hrm_ray.training import ray_overrides, ray_train, launch
        from tests.training.test_ray import DiesWhileJoining
        marker, config = sys.argv[1], json.loads(sys.argv[2])
        ray_overrides.Controller = TrainController  # Ray's own, which keeps what the dead start had reserved
        ray_overrides.Joined, ray_train.COMING_S = partial(DiesWhileJoining, marker=marker), 8.0
        launch.train(TrainConfig(**config))
    """
    scaling = {"mode": "ray", "num_workers": 2, "cpus_per_worker": (os.cpu_count() or 2) // 2}
    config |= {"scaling": scaling, "watchdog_s": 16.0}
    words = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "killed"), json.dumps(config)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "no worker for 24 s although there is room: connecting to Ray again" in done.stderr
    assert last(TrainConfig(**config)).manifest.global_step == 20


def _records(config: TrainConfig) -> list[dict]:
    lines = (launch.run_folder(config).local_path / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def _untimed(record: dict) -> dict:
    return {key: value for key, value in record.items() if not key.startswith("time/")}


def command(config: dict, *more: str) -> list[str]:
    """The command line of `hrm-ray train` for a configuration."""
    flat = {**config, "arch": None, "scaling": None}
    words = [
        f"{key}={yaml.safe_dump(value).split(chr(10))[0]}" for key, value in flat.items() if value is not None
    ]
    words += [f"arch.{key}={value}" for key, value in config["arch"].items()]
    return [sys.executable, "-m", "hrm_ray.cli", "train", *words, *more]


@pytest.mark.parametrize(
    ("mode", "number"),
    [
        pytest.param("ray", signal.SIGINT, marks=pytest.mark.long),
        ("ray", signal.SIGHUP),
        ("local", signal.SIGINT),
        ("local", signal.SIGHUP),
    ],
)
def test_a_signal_stops_with_a_checkpoint_and_the_same_command_continues(config, mode, number):
    config |= {"epochs": 400, "max_steps": 2500, "eval_interval": 1000, "log_interval": 1}
    words = command(config, f"scaling={mode}", "scaling.num_workers=1")
    run = launch.run_folder(TrainConfig(**config)).local_path
    # A process group of its own, signalled whole: what Ctrl-C in a terminal does, and closing it.
    process = subprocess.Popen(words, start_new_session=True, stderr=subprocess.PIPE, text=True)
    try:
        _wait_for(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text(), process)
        os.killpg(process.pid, number)
        _, errors = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 128 + number, errors
    assert "the same command continues" in errors
    stopped_at = finished(launch.run_folder(TrainConfig(**config)))[-1].manifest.global_step
    assert 0 < stopped_at < 2500
    words = command(config | {"max_steps": stopped_at + 3}, f"scaling={mode}", "scaling.num_workers=1")
    again = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert f"continues after step {stopped_at}" in again.stderr
    steps = [r["global_step"] for r in _records(TrainConfig(**config)) if "train/loss" in r]
    assert steps == list(range(1, stopped_at + 4))


# Ray's core would abort the process three seconds after the signal.
SLOW_TO_STOP = """
import os, signal, time
from hrm_ray.ray_session import ray_session
signal.signal(signal.SIGTERM, lambda *received: print("asked to stop"))
with ray_session():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(4)
"""


def test_who_handles_sigterm_may_take_its_time():
    command = [sys.executable, "-c", SLOW_TO_STOP]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "asked to stop\n"), done.stderr


def _wait_for(condition, process=None) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert process is None or process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "nothing happened in 90 s"
        time.sleep(0.05)


def test_more_workers_than_the_machine_has_is_said_at_once(config, ray_cluster):
    many = TrainConfig(**config | {"scaling": on_ray(4)})
    with pytest.raises(UserError, match="needs 4 CPUs, this machine has 2; use fewer"):
        launch.train(many, show_progress=False)
    assert not launch.run_folder(many).exists()


@pytest.mark.parametrize(
    ("wish", "mend"),
    [
        (
            {"scaling": on_ray(1) | {"use_gpu": True}, "device": "auto"},
            "scaling.use_gpu=true needs a GPU .*; give scaling.use_gpu=false",
        ),
        ({"scaling": on_ray(2), "device": "cuda"}, "device=cuda needs a GPU .*; give device=auto"),
        ({"scaling": on_ray(1) | {"cpus_per_worker": 3}}, "needs 3 CPUs, .* use scaling.cpus_per_worker=2"),
    ],
)
def test_what_the_machine_has_not_is_said_with_what_mends_it(config, ray_cluster, wish, mend):
    with pytest.raises(UserError, match=mend):
        launch.train(TrainConfig(**config | wish), show_progress=False)


def test_time_is_up_although_no_worker_could_be_had(config, ray_cluster, monkeypatch):
    """A joined cluster that others have taken: the run waits, says so, and can be stopped meanwhile."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    monkeypatch.setattr(ray_train, "WAIT_S", 1.0)
    said = []
    monkeypatch.setattr(launch.Driver, "say", lambda self, text: said.append(text))
    others = placement_group([{"CPU": 1}])
    ray.get(others.ready())
    try:
        both = TrainConfig(**config | {"scaling": on_ray(2), "max_time_s": 6.0})
        summary, stopped_by = launch.train(both, show_progress=False)
    finally:
        remove_placement_group(others)
    assert stopped_by is None and summary["stop_reason"] == "max_time_s"
    assert not summary["finished"] and summary["global_step"] == 0
    assert said == [
        "waiting for 2 x (1 CPU): the cluster has room for 2, others have taken 1; Ctrl-C gives up"
    ]


def test_a_cluster_that_does_not_grow_is_not_waited_for(config, ray_cluster, monkeypatch):
    import ray

    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    for wish, said in (
        (
            {"scaling": on_ray(4)},
            r"needs 4 x \(1 CPU\), each on one node, the cluster has room for 2: it has 1 node",
        ),
        (
            {"scaling": on_ray(1) | {"use_gpu": True}, "device": "auto"},
            "use_gpu=true needs .*, the cluster has 0",
        ),
    ):
        with pytest.raises(UserError, match=said):
            launch.train(TrainConfig(**config | wish), show_progress=False)


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        ({"num_workers": 4}, (1, True)),
        ({"num_workers": 12}, (1, True)),
        ({"num_workers": 13}, (8, False)),  # it has no GPU for each; two workers on each of 8 nodes
        ({"num_workers": 2, "use_gpu": False}, (16, False)),
        ({"num_workers": [1, 32], "use_gpu": False}, (4, False)),
        ({"num_workers": 4, "cpus_per_worker": 3}, (3, True)),
    ],
)
def test_what_a_worker_takes_follows_from_what_a_cluster_without_workers_can_have(
    config, monkeypatch, wish, expected
):
    grows = parsed(yaml.safe_load((Path(__file__).parents[2] / "cluster/aws.yaml").read_text()))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    answers = Mock(return_value=[{"Alive": True, "Resources": {nodes.ON_HEAD: 1.0}}])
    monkeypatch.setattr("ray.nodes", answers)
    config |= {"global_batch_size": 64, "device": "auto"}
    wanted = TrainConfig(**config | {"scaling": {"mode": "ray", **wish}})
    assert ray_train.resources_of(wanted, grows) == expected
    answers.assert_called_once_with()  # of two answers, each could be right, but not both
