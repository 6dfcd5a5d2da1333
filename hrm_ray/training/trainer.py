"""Runs the loop: in this process, or in the workers of Ray Train.

Thin on purpose. Checkpoints and resuming belong to the loop (Ray's own snapshot may lag behind them), so a worker
that Ray restarts simply goes on from the newest one. Progress, a wish to stop and a failure travel through the
cluster's key-value store, since `ray.train.report` is a barrier as slow as the controller's poll.

When Ray is about to restart the workers, because a node is being taken away or because there is room for more, the
driver asks for a checkpoint, so that little or no work is repeated.
"""

import json
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from tqdm import tqdm

from hrm_ray.config.schema import TrainConfig
from hrm_ray.data.shards import Dataset, open_dataset
from hrm_ray.errors import RunFailed, UserError
from hrm_ray.training.checkpoint import Checkpoint, finished
from hrm_ray.training.logging import SUMMARY_FILE
from hrm_ray.training.loop import Hooks, Progress, Trainer
from hrm_ray.training.plan import Plan
from hrm_ray.training.resume import misfit, resume_point, set_aside
from hrm_ray.training.state import check_weights_fit
from hrm_ray.training.storage import Storage
from hrm_ray.training.world import World

POLL_S = 0.25  # how often the driver and the first worker look at each other's messages
LOOK_AHEAD_S = 2.0  # how often the driver looks whether the workers will be restarted
SAVE_AHEAD_S = 10.0  # and how often it then asks for a checkpoint
RESIZE_INTERVAL_S = 30.0  # how often Ray looks for room for more workers
START_TIMEOUT_S = 15.0  # how long it waits for lost ones to come back before it starts fewer


class Channel:
    """Messages between the driver and the workers of one run, in the cluster's key-value store."""

    def __init__(self, name: str):
        self.name = name

    def put(self, key: str, value: Any) -> None:
        from ray.experimental import internal_kv

        internal_kv._internal_kv_put(self._key(key), json.dumps(value).encode(), overwrite=True)

    def get(self, key: str) -> Any:
        """The value last put, or None."""
        from ray.experimental import internal_kv

        content = internal_kv._internal_kv_get(self._key(key))
        return None if content is None else json.loads(content)

    def add(self, key: str, value: Any) -> None:
        """Add to the values under `key`."""
        self.put(f"{key}/{time.time_ns():020d}", value)

    def added(self, key: str, number: int) -> list[Any]:
        """The values added to `key`, in order, without the first `number`."""
        from ray.experimental import internal_kv

        keys = sorted(internal_kv._internal_kv_list(self._key(f"{key}/")))[number:]
        return [json.loads(internal_kv._internal_kv_get(each)) for each in keys]

    def _key(self, key: str) -> bytes:
        return f"hrm_ray/{self.name}/{key}".encode()


class ProgressBar:
    """One line on standard error: steps, loss, exact accuracy, examples a second, time left."""

    def __init__(self, global_batch_size: int):
        self._global_batch_size = global_batch_size
        self._bar: tqdm | None = None

    def show(self, progress: Progress) -> None:
        if self._bar is None:
            print(f"using {progress.setup}", file=sys.stderr)
            self._bar = tqdm(
                initial=progress.step,
                total=progress.last_step,
                unit="step",
                dynamic_ncols=True,
                mininterval=0.5 if sys.stderr.isatty() else 10,  # a log wants fewer lines than a screen
            )
        metrics = progress.metrics
        shown = {}
        if "train/loss" in metrics:
            shown["loss"] = f"{metrics['train/loss']:.3f}"
            shown["ex/s"] = f"{self._global_batch_size / metrics['time/step_s']:.0f}"
        if "eval/exact_accuracy" in metrics:
            shown["exact"] = f"{metrics['eval/exact_accuracy']:.1%}"
        self._bar.set_description(progress.phase, refresh=False)
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(progress.step - self._bar.n)

    def say(self, message: str) -> None:
        """A line above the bar."""
        tqdm.write(message, file=sys.stderr)

    def close(self) -> None:
        if self._bar:
            self._bar.close()


class StopRequest:
    """Asks the run to stop after its step: on the first SIGINT or SIGTERM, or when `max_time_s` are over.

    The second signal ends the process at once.
    """

    def __init__(self, max_time_s: float | None = None) -> None:
        self.signal: int | None = None
        self._deadline = None if max_time_s is None else time.monotonic() + max_time_s

    def reason(self) -> str | None:
        """Why to stop; None to go on."""
        if self.signal is not None:
            return "signal"
        return "max_time_s" if self._deadline is not None and time.monotonic() > self._deadline else None

    @contextmanager
    def listening(self):
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {s: signal.signal(s, self._receive) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number
        print("\nstopping after this step, with a checkpoint; once more to stop at once", file=sys.stderr)


def run_folder(config: TrainConfig) -> Storage:
    """STORAGE/RUN_NAME."""
    return Storage(config.storage) / (config.run_name or "train")


def announce(config: TrainConfig) -> str:
    """One line to print before training: where, what, how long."""
    dataset = open_dataset(config.data_path)
    plan = Plan.of(config, dataset.split("train"))
    run = run_folder(config)
    point = None if _starts_from_weights(config, dataset) else resume_point(config, run, dataset)
    if point and point.manifest.global_step >= plan.last_step:
        step = point.manifest.global_step
        return f"run {run} is finished at step {step}; run_name=NAME starts another"
    start = f"continues after step {point.manifest.global_step}" if point else "starts"
    return (
        f"run {run} {start}: {plan.last_step} steps of {config.global_batch_size} puzzles from "
        f"{config.data_path}, {_where(config)}{_changes(point, config)}"
    )


def _where(config: TrainConfig) -> str:
    scaling = config.scaling
    if scaling.mode == "local":
        return "in this process"
    if scaling.is_elastic:
        return f"on {scaling.min_workers} to {scaling.max_workers} Ray workers"
    return f"on {scaling.num_workers} Ray worker(s)"


def _starts_from_weights(config: TrainConfig, dataset: Dataset) -> bool:
    """Whether the run has a checkpoint that does not fit, of which only the weights are wanted."""
    if config.resume != "weights":
        return False
    checkpoints = finished(run_folder(config))
    return bool(checkpoints) and misfit(checkpoints[-1], config, dataset) is not None


def _changes(point: Checkpoint | None, config: TrainConfig) -> str:
    """What a continued run does otherwise than before, if anything."""
    if point is None:
        return ""
    now, before = config.model_dump(mode="json"), point.manifest.config
    ours = ("data_path", "storage", "device", "scaling")  # where it runs, not what it does
    changed = [f"{k} {before.get(k)} -> {v}" for k, v in now.items() if k not in ours and before.get(k) != v]
    return f"; changed: {', '.join(changed)}" if changed else ""


def train(config: TrainConfig, *, show_progress: bool = True) -> tuple[dict[str, Any], int | None]:
    """Train, or continue, the run that `config` describes.

    Returns:
        the summary, and the signal that stopped the run early, if one did.

    Raises:
        UserError: before anything starts, if the data or an earlier checkpoint does not fit.
        RunFailed: the loss is not finite, or more workers were lost than `failure.max_failures`.
    """
    dataset = open_dataset(config.data_path)
    plan = Plan.of(config, dataset.split("train"))
    run = run_folder(config)
    bar = ProgressBar(config.global_batch_size)
    if _starts_from_weights(config, dataset):
        check_weights_fit(finished(run)[-1], config, dataset)
        aside = set_aside(run)
        if show_progress:
            bar.say(f"the run before is kept as {aside}")
    point = resume_point(config, run, dataset)
    if point and point.manifest.global_step >= plan.last_step:
        summary = json.loads(run.read(SUMMARY_FILE) or b"{}")
        if summary.get("finished") and summary["global_step"] == point.manifest.global_step:
            return summary, None
    driver = Driver(config, bar if show_progress else None)
    with driver.stop.listening():
        try:
            result = (_train_here if config.scaling.mode == "local" else _train_on_ray)(config, driver)
        finally:
            bar.close()
    return result, driver.stop.signal if not result["finished"] else None


class Driver:
    """What a run tells its user, and what it is asked from outside.

    Args:
        config: the run.
        bar: shows progress and events; None: nothing is shown.
    """

    def __init__(self, config: TrainConfig, bar: ProgressBar | None = None):
        self.stop = StopRequest(config.max_time_s)
        self._bar = bar
        self.num_workers = 0  # at the last start
        self._starts = 0

    def progress(self, progress: Progress) -> None:
        if self._bar:
            self._bar.show(progress)

    def event(self, entry: dict[str, Any]) -> None:
        """Say what has happened, but for what is said anyway: the first start and the end."""
        if entry["event"] == "started":
            self.num_workers = entry["num_workers"]
            self._starts += 1
        usual = entry["event"] in ("finished", "stopped") or (
            entry["event"] == "started" and self._starts == 1
        )
        if self._bar and not usual:
            lost = "workers were lost or added; " if entry["event"] == "started" else ""
            self._bar.say(f"{lost}{entry['message']}")


def _train_here(config: TrainConfig, driver: Driver) -> dict[str, Any]:
    hooks = Hooks(progress=driver.progress, stop=driver.stop.reason, event=driver.event)
    return Trainer(config, run_folder(config), World(), hooks).train()


def _train_on_ray(config: TrainConfig, driver: Driver) -> dict[str, Any]:
    from hrm_ray.ray_session import ray_session

    with _environment(_ray_settings(config)), ray_session(), _receiving_again(driver.stop):
        channel = Channel(f"{config.run_name}-{uuid.uuid4().hex[:8]}")
        cpus, use_gpu = _resources(config)
        trainer = _ray_trainer(config, channel, cpus, use_gpu)
        outcome: dict[str, Any] = {}

        def fit() -> None:
            try:
                outcome["summary"] = trainer.fit().return_value
            except BaseException as error:  # handed to the main thread
                outcome["error"] = error

        # In a thread of its own, so that signals reach our handler and not Ray's, which kills the workers.
        thread = threading.Thread(target=fit, daemon=True)
        thread.start()
        look_ahead, ask_to_save = Every(LOOK_AHEAD_S), Every(SAVE_AHEAD_S)
        num_events = 0
        told_to_stop = False
        while thread.is_alive():
            thread.join(POLL_S)
            reason = driver.stop.reason()
            if reason is not None and not told_to_stop:
                channel.put("stop", reason)
                told_to_stop = True
            for entry in channel.added("events", num_events):
                driver.event(entry)
                num_events += 1
            failure = channel.get("failure")
            if failure is not None:
                raise (RunFailed if failure["exit_code"] == 1 else UserError)(failure["message"])
            progress = channel.get("progress")
            if progress is not None:
                driver.progress(Progress(**progress))
            if look_ahead() and _restart_is_ahead(config, cpus, driver.num_workers) and ask_to_save():
                channel.put("save", time.time())
        if "error" in outcome:
            raise RunFailed(
                f"Ray Train gave up: {_first_cause(outcome['error'])}; "
                "the same command goes on from the last checkpoint"
            ) from outcome["error"]
        return outcome["summary"]


def _ray_settings(config: TrainConfig) -> dict[str, str]:
    """Ray Train's environment variables; what the user has set stays."""
    settings = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
    if config.watchdog_s is not None:  # for a worker that is stopped as a whole, its own watchdog with it
        settings["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(config.watchdog_s)
    if config.scaling.is_elastic:
        settings["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(START_TIMEOUT_S)
    return {name: value for name, value in settings.items() if name not in os.environ}


@contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    """Inside, the environment has `settings`."""
    os.environ.update(settings)
    try:
        yield
    finally:
        for name in settings:
            os.environ.pop(name, None)


def _restart_is_ahead(config: TrainConfig, cpus: int, num_workers: int) -> bool:
    """Whether Ray is about to restart the workers: a node is being drained, or there is room for more of them."""
    import ray

    if ray._private.state.state.get_draining_nodes():
        return True
    if not config.scaling.is_elastic or not 0 < num_workers < config.scaling.max_workers:
        return False
    return ray.available_resources().get("CPU", 0) >= cpus


def _receiving_again(stop: StopRequest):
    """`ray.init` installs its own SIGTERM handler; ours comes back."""
    return stop.listening() if threading.current_thread() is threading.main_thread() else nullcontext()


def _ray_trainer(config: TrainConfig, channel: Channel, cpus: int, use_gpu: bool):
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    least, most = config.scaling.min_workers, config.scaling.max_workers
    workers = (least, most) if config.scaling.is_elastic else most
    values = config.model_dump(mode="json") | {"data_path": _absolute(config.data_path)}
    if not use_gpu:  # Ray hides no GPU from a worker that asked for none
        values["device"] = "cpu"
    storage = run_folder(config)
    storage.create()  # if that cannot be, it is said here and not by a worker
    return TorchTrainer(
        _worker,  # type: ignore[arg-type]  # what it returns becomes Result.return_value
        train_loop_config={
            "config": values,
            "storage": str(storage),
            "channel": channel.name,
            "cpus": cpus,
        },
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,  # type: ignore[arg-type]  # the types are of Ray's older version
            elastic_resize_monitor_interval_s=RESIZE_INTERVAL_S,  # type: ignore[call-arg]
            use_gpu=use_gpu,
            resources_per_worker={"CPU": cpus, "GPU": int(use_gpu)},
        ),
        # Ray's own notes on this attempt; ours decide where a run goes on.
        run_config=ray.train.RunConfig(
            name=f"attempt-{uuid.uuid4().hex[:8]}",
            storage_path=str(storage / "ray"),
            failure_config=ray.train.FailureConfig(max_failures=config.failure.max_failures),
        ),
    )


def _resources(config: TrainConfig) -> tuple[int, bool]:
    """CPUs of each worker, and whether each has a GPU.

    Raises:
        UserError: a private cluster, which does not grow, has too little.
    """
    import ray

    scaling = config.scaling
    least, most = scaling.min_workers, scaling.max_workers
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    total_cpus, total_gpus = (int(sum(node.get(kind, 0) for node in nodes)) for kind in ("CPU", "GPU"))
    use_gpu = total_gpus >= least if scaling.use_gpu == "auto" else scaling.use_gpu
    if config.device != "auto":
        use_gpu = config.device == "cuda"
    if scaling.cpus_per_worker != "auto":
        cpus = scaling.cpus_per_worker
    else:
        on_largest_node = int(max(node.get("CPU", 0) for node in nodes))
        cpus = 1 if use_gpu else max(1, min(total_cpus // most, on_largest_node))
    if not os.environ.get("RAY_ADDRESS"):
        wanted = [(least * cpus, total_cpus, "CPUs"), (least * use_gpu, total_gpus, "GPUs")]
        for needed, there, kind in wanted:
            if needed > there:
                raise UserError(
                    f"scaling.num_workers={least} needs {needed} {kind}, this machine has {there}; use fewer"
                )
    return cpus, use_gpu


def _absolute(path: str) -> str:
    """Workers have another working directory."""
    return path if "://" in path else os.path.abspath(path)  # noqa: PTH100 - a path may be a URI


def worker_hooks(channel: Channel, world: World) -> Hooks:
    """Hooks that talk to the driver through `channel`, most at most every `POLL_S`; only the first worker does."""
    due_progress, due_stop, due_save = Every(POLL_S), Every(POLL_S), Every(POLL_S)
    reason: str | None = None
    asked_to_save = channel.get("save") if world.is_first else None

    def progress(progress: Progress) -> None:
        if due_progress() or progress.step == progress.last_step:
            channel.put("progress", vars(progress))

    def stop() -> str | None:
        nonlocal reason
        if world.is_first and reason is None and due_stop():
            reason = channel.get("stop")
        return reason

    def save() -> bool:
        nonlocal asked_to_save
        before = asked_to_save
        if due_save():
            asked_to_save = channel.get("save")
        return asked_to_save != before

    return Hooks(progress=progress, stop=stop, save=save, event=lambda entry: channel.add("events", entry))


class Every:
    """Calling it says whether `seconds` have passed since it last said yes; the first call does."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._next = 0.0

    def __call__(self) -> bool:
        now = time.monotonic()
        due = now >= self._next
        if due:
            self._next = now + self._seconds
        return due


def _worker(parameters: dict[str, Any]) -> dict[str, Any]:
    """What each Ray Train worker runs."""
    import ray.train
    import torch

    channel = Channel(parameters["channel"])
    if channel.get("failure"):  # a restart cannot mend it
        return {}
    torch.set_num_threads(parameters["cpus"])
    context = ray.train.get_context()
    world = World(context.get_world_rank(), context.get_world_size(), context.get_local_rank())
    config = TrainConfig.model_validate(parameters["config"])
    try:
        hooks = worker_hooks(channel, world)
        return Trainer(config, Storage(parameters["storage"]), world, hooks).train()
    except UserError as error:
        channel.put("failure", {"message": str(error), "exit_code": error.exit_code})
        if isinstance(error, RunFailed):  # raised by every worker alike: end without a restart
            return {}
        raise


def _first_cause(error: BaseException) -> str:
    """The most telling line of Ray's nested exceptions."""
    failures = getattr(error, "worker_failures", None)
    cause = next(iter(failures.values())) if failures else error
    return str(cause).strip().splitlines()[-1] if str(cause).strip() else repr(cause)
