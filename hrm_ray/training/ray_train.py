"""Runs the loop in the workers of Ray Train.

Thin on purpose. Checkpoints and resuming belong to the loop (Ray's own snapshot may lag behind them), so a worker
that Ray restarts simply continues from the newest one. Progress, requests to stop and failures travel through the
cluster's key-value store, since `ray.train.report` is a barrier as slow as the controller's poll.

When Ray is about to restart the workers, because a node is being taken away or because there is room for more, the
driver asks for a checkpoint, so that little or no work is repeated.
"""

import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hrm_ray.config.schema import TrainConfig
from hrm_ray.data.tasks.base import TRUSTED
from hrm_ray.errors import (
    NonFiniteLoss,
    OutOfMemory,
    RayFailed,
    RunFailed,
    TransientError,
    Unseen,
    UserError,
)
from hrm_ray.every import Every
from hrm_ray.memory import ONE_ARENA
from hrm_ray.nodes import (
    Growth,
    Resources,
    amounts,
    cancel_request,
    fit,
    free,
    growth,
    living,
    most,
    room,
    waiting_for,
)
from hrm_ray.ray_metrics import RunMetrics
from hrm_ray.ray_session import cluster_address, environment, is_head, ray_session
from hrm_ray.storage.storage import Storage
from hrm_ray.training.channel import Channel
from hrm_ray.training.driver import Driver
from hrm_ray.training.hooks import Hooks, Progress
from hrm_ray.training.loop import TrainingLoop
from hrm_ray.training.shared import check_seen
from hrm_ray.worker_logs import last_words
from hrm_ray.world import World

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.util.placement_group import PlacementGroup

    from hrm_ray.training import ray_overrides

POLL_S = 0.25  # how often the driver and the first worker look at each other's messages
LOOK_AHEAD_S = 2.0  # how often the driver looks whether the workers will be restarted
SAVE_AHEAD_S = 10.0  # and how often it then asks for a checkpoint
SAVE_LAST_S = 6.0  # before a node is taken away, it asks once more
RESIZE_INTERVAL_S = 30.0  # how often Ray looks for room for more workers
START_TIMEOUT_S = 15.0  # how long it waits for lost ones to come back before it starts fewer
BEAT_S = 5.0  # how often the first worker says that it is there
COMING_S = 60.0  # beyond `watchdog_s`, how long there may be none
LINGER_S = 3.0  # how long to wait for Ray to end a run, in a session that the caller started, or on a cluster
WAIT_S = 5.0  # after so long without a first worker it is said what it waits for
SHUTDOWN_TIMEOUT_S = "5"  # and for workers that hang to leave their process group, before it kills them
STOP_TIMEOUT_S = 8.0  # how long to wait, in a borrowed group, for a worker that can act on a request to stop
LOST_S = 30.0  # the same on a cluster, where others may have taken the room of lost workers
NOTES = "ray"  # the folder for Ray's own notes on each attempt; ours decide where a run goes on
KINDS = {
    kind.__name__: kind for kind in (NonFiniteLoss, OutOfMemory, Unseen)
}  # of failures that a caller tells apart


class NoWorkers(Exception):
    """No worker has reported for this many seconds."""


def train_on_ray(
    config: TrainConfig, run: Storage, driver: Driver, group: "PlacementGroup | None" = None
) -> dict[str, Any]:
    """Train `config` in the folder `run`; returns the summary. For what is raised, see `launch.train`.

    Args:
        group: a placement group that has a bundle for each worker, and stays when the run has ended, with nothing in
            it; None: one is made.
    """
    with environment(_ray_settings(config)):
        while True:
            with ray_session() as is_ours:
                if driver.stop.signal is not None:  # that came while Ray was started
                    return driver.summary_without_workers("signal")
                try:
                    return _fit(config, run, driver, is_ours, group)
                except NoWorkers as wait:
                    driver.say(f"no worker for {wait} s although there is room: connecting to Ray again")


def _fit(
    config: TrainConfig, run: Storage, driver: Driver, is_ours: bool, group: "PlacementGroup | None"
) -> dict[str, Any]:
    """Train in the present session of Ray; `is_ours` if it ends with this command."""
    import ray

    channel = Channel(f"{config.run_name}-{uuid.uuid4().hex[:8]}")
    # Nobody else uses what was lent, either.
    is_private = group is not None or (cluster_address() is None and is_head())
    grows = growth(driver.stop.reason) if group is None else Growth()
    if (reason := driver.stop.reason()) is not None:
        return driver.summary_without_workers(reason)
    cpus, use_gpu = resources_of(config, grows)
    trainer = _ray_trainer(config, run, channel, cpus, use_gpu, driver, group, is_private)
    with _ray_errors_as_ray_failed():
        controller = trainer.start()
        training: ObjectRef = controller.run.remote()
    limits = TimeLimits(
        none_s=config.watchdog_s + COMING_S if is_ours and config.watchdog_s is not None else None,
        stop_s=STOP_TIMEOUT_S if group is not None else None if is_private else LOST_S,
        end_s=0.0 if (is_ours and is_private) or group is not None else LINGER_S,
    )
    look_ahead = LookAhead(config, cpus, use_gpu, grows, is_private)
    driver.waits(look_ahead.waits())
    try:
        summary = _watch_run(training, channel, driver, look_ahead, limits)
        if summary is not None:
            return summary
        with _ray_errors_as_ray_failed():
            try:
                ray.get(training)
                result = ray.get(controller.get_result.remote())
                if result.error:
                    raise result.error
            except Exception:
                with suppress(Exception):
                    _release_reservation(channel)
                raise
        return result.return_value
    except RayFailed as error:
        if driver.last_words:
            error.add_note(driver.last_words)
        raise
    finally:
        if group is not None:
            ray.kill(controller)  # and with it the workers, of which the next run's would wait to be gone
        elif not is_private:
            if is_ours:
                with suppress(Exception):  # the cluster is lost, say, of which another error tells
                    ray.kill(controller)  # else it might ask for nodes once more
            cancel_request(trainer.requester)  # Ray would keep it, and the nodes, for 180 s more


def _release_reservation(channel: Channel) -> None:
    """What is reserved for the workers, if the controller did not: Ray keeps it until the driver's process ends.

    (On a cluster with a dashboard an actor of Ray Train's does the same after a controller that was killed.)
    """
    from ray.util.placement_group import remove_placement_group

    from hrm_ray.training.ray_overrides import group_of

    reservation = channel.get("reservation")
    if reservation is not None:
        remove_placement_group(group_of(reservation))


@contextmanager
def _ray_errors_as_ray_failed() -> Iterator[None]:
    """Inside, an error of Ray becomes a RayFailed."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise RayFailed(
            f"Ray Train failed: {_first_cause(error)}; the same command continues from the last checkpoint"
        ) from error


@dataclass(frozen=True)
class TimeLimits:
    """How many seconds to wait, and for what.

    Attributes:
        none_s: without a worker although the nodes have room for them; None: no limit.
        stop_s: for lost workers to come back after a request to stop; None: no limit.
        end_s: for Ray to end the run when its workers have; nothing, if all of it is ended anyway.
    """

    none_s: float | None
    stop_s: float | None
    end_s: float


def _watch_run(
    training: "ObjectRef",
    channel: Channel,
    driver: Driver,
    look_ahead: "LookAhead",
    limits: TimeLimits,
) -> dict[str, Any] | None:
    """Pass messages between the driver and the workers until `training` ends.

    Returns:
        the summary, if the run has ended before `training`, or was stopped while it had no workers; else None.

    Raises:
        UserError, RunFailed: what a worker failed of.
        NoWorkers: none has reported for `limits.none_s`.
    """
    import ray

    told_to_stop = False
    beat, heard_at = None, time.monotonic()
    has_ended = False
    while not has_ended:
        has_ended = bool(ray.wait([training], timeout=POLL_S)[0])
        summary = channel.get("summary")  # before the events and reports, of which the last comes first
        for entry in channel.taken("events"):
            if entry["event"] == "lost":
                driver.last_words = last_words(**entry["worker"])
            else:
                driver.event(entry)
        if driver.wants_reports:
            for record in channel.taken("reports"):
                driver.report(record)
        failure = channel.get("failure")
        if failure is not None:
            usual = RunFailed if failure["exit_code"] == RunFailed.exit_code else UserError
            raise KINDS.get(failure.get("kind"), usual)(failure["message"])
        progress = channel.get("progress")
        if progress is not None:
            driver.progress(Progress(**progress))
        if summary is not None:
            if limits.end_s:
                ray.wait([training], timeout=limits.end_s)
            return summary
        reason = driver.stop.reason()
        if reason is not None and not told_to_stop:
            channel.put("stop", reason)
            told_to_stop = True
        now, last_beat, beat = time.monotonic(), beat, channel.get("beat")
        if beat != last_beat:
            heard_at = now
        if now - heard_at > (WAIT_S if beat is None else 3 * BEAT_S) and not told_to_stop:
            driver.waits(look_ahead.still_waits(channel))
        if told_to_stop and (driver.num_workers == 0 or not look_ahead.has_room_for_least()):
            return driver.summary_without_workers(str(reason))  # no worker is there, or can be, to act on it
        if told_to_stop and limits.stop_s is not None and now - heard_at > limits.stop_s:
            return driver.summary_without_workers(str(reason))
        if look_ahead.asks_to_save(driver):
            channel.put("save", time.time())
        if limits.none_s is not None and now - heard_at > limits.none_s:
            if look_ahead.is_left_waiting():
                raise NoWorkers(f"{limits.none_s:g}")
            heard_at = now  # the cluster has to grow first
    return None


def _ray_settings(config: TrainConfig) -> dict[str, str]:
    """Ray Train's environment variables; what the user has set stays."""
    settings = {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": SHUTDOWN_TIMEOUT_S,  # heard of by private clusters only
    }
    if config.watchdog_s is not None:  # for a worker that is stopped as a whole, its own watchdog with it
        settings["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(config.watchdog_s)
    if config.scaling.is_elastic:
        settings["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(START_TIMEOUT_S)
    return where_not_set(settings)


def trusted_tasks() -> dict[str, str]:
    """The setting by which workers import the tasks that this process may import."""
    return {TRUSTED: os.environ[TRUSTED]} if TRUSTED in os.environ else {}


def where_not_set(settings: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in settings.items() if name not in os.environ}


class LookAhead:
    """Looks every `LOOK_AHEAD_S` whether Ray is about to restart the workers.

    Args:
        config: the run.
        cpus, use_gpu: what each worker takes.
        grows: how far the cluster can grow.
        is_private: whether nobody else uses it.
    """

    def __init__(self, config: TrainConfig, cpus: int, use_gpu: bool, grows: Growth | None, is_private: bool):
        self._scaling = config.scaling
        self._needs: Resources = {"CPU": cpus} | ({"GPU": 1} if use_gpu else {})
        self._grows, self._is_private = grows, is_private
        self._due_look, self._due_save = Every(LOOK_AHEAD_S), Every(SAVE_AHEAD_S)
        self._due_wait = Every(WAIT_S)
        self._room_since: float | None = None
        self._asked_last: set[str] = set()  # nodes for which the last possible checkpoint was asked for

    def asks_to_save(self, driver: Driver) -> bool:
        """Whether it is time for a checkpoint because of a restart, of which the driver's user is told."""
        if not self._due_look():
            return False
        draining = _draining_nodes()
        has_room = not draining and self._has_room_for_more(driver.num_workers)
        room = "there is room for more workers" if has_room else None
        driver.warn("a node is being taken away" if draining else room)
        now = time.time()
        last = {
            node for node, deadline in draining.items() if 0 < deadline - now < SAVE_LAST_S
        } - self._asked_last
        self._asked_last |= last
        return bool(last) or ((bool(draining) or has_room) and self._due_save())

    def has_room_for_least(self) -> bool:
        """Whether the living nodes could hold the fewest workers that the run may have."""
        return fit(living(), self._needs) >= self._scaling.min_workers

    def is_left_waiting(self) -> bool:
        """Whether the fewest workers could be started, but are not: there is room for them that nobody has taken."""
        nodes = living() if self._is_private else free()
        return fit(nodes, self._needs) >= self._scaling.min_workers

    def waits(self) -> str | None:
        """What the fewest workers wait for; None if there is room for them, or it is for this run alone."""
        if self._is_private:
            return None
        return waiting_for(self._needs, self._scaling.min_workers, self._grows)

    def still_waits(self, channel: Channel) -> str | None:
        """The same while they are started, at most every `WAIT_S`."""
        from hrm_ray.training.ray_overrides import is_reserved

        if not self._due_wait():
            return None
        reservation = channel.get("reservation")
        return None if reservation is not None and is_reserved(reservation) else self.waits()

    def _has_room_for_more(self, num_workers: int) -> bool:
        """Whether there is, and Ray has not left it unused for so long that it will not take it."""
        if not self._scaling.is_elastic or not 0 < num_workers < self._scaling.max_workers:
            return False
        now = time.monotonic()
        if not fit(free(), self._needs):
            self._room_since = None
        elif self._room_since is None:
            self._room_since = now
        return self._room_since is not None and now - self._room_since < 3 * RESIZE_INTERVAL_S


def _draining_nodes() -> dict[str, float]:
    """Nodes that are about to be taken away, with the time in epoch seconds; 0 if that is not known."""
    import ray

    return {node: ms / 1000 for node, ms in (ray._private.state.state.get_draining_nodes() or {}).items()}


def _ray_trainer(
    config: TrainConfig,
    run: Storage,
    channel: Channel,
    cpus: int,
    use_gpu: bool,
    driver: Driver,
    group: "PlacementGroup | None",
    is_private: bool,
) -> "ray_overrides.NonblockingTrainer":
    import ray.train.torch

    from hrm_ray.training import ray_overrides

    least, most = config.scaling.min_workers, config.scaling.max_workers
    workers = (least, most) if config.scaling.is_elastic else most
    values = config.model_dump(mode="json") | {"data_path": absolute(config.data_path)}
    if not use_gpu:  # Ray hides no GPU from a worker that asked for none
        values["device"] = "cpu"
    run.create()  # if that cannot be, it is said here and not by a worker
    return ray_overrides.NonblockingTrainer(
        _worker,  # what it returns becomes Result.return_value
        train_loop_config={
            "config": values,
            "storage": str(run),
            "channel": channel.name,
            "cpus": cpus,
            "reports": driver.wants_reports,
            "owner": driver.owner,
            "sweep": driver.sweep,
            "group": group and group.id.hex(),
        },
        torch_config=ray_overrides.Joined(backend="cpu:gloo,cuda:nccl" if use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,  # type: ignore[arg-type]  # the types are of Ray's older version
            elastic_resize_monitor_interval_s=RESIZE_INTERVAL_S,  # type: ignore[call-arg]
            use_gpu=use_gpu,
            resources_per_worker={"CPU": cpus, "GPU": int(use_gpu)},
        ),
        run_config=ray.train.RunConfig(
            name=f"attempt-{uuid.uuid4().hex[:8]}",
            storage_path=str(run / NOTES),
            failure_config=ray.train.FailureConfig(max_failures=config.failure.max_failures),
            # Ray lets them train in another thread than the first.
            worker_runtime_env={
                "env_vars": {**trusted_tasks(), **({} if use_gpu else where_not_set(ONE_ARENA))}
            },  # type: ignore[call-arg]
        ),
        is_private=is_private,
    )


def resources_of(config: TrainConfig, grows: Growth | None) -> tuple[int, bool]:
    """CPUs of each worker, and whether each has a GPU: by what the cluster can have when it has grown.

    Args:
        grows: how far it can; None if that is not known.

    Raises:
        UserError: it can never have enough.
    """
    scaling = config.scaling
    least, at_most = scaling.min_workers, scaling.max_workers
    there = living()

    def can_have(bundle: Resources) -> int:
        return most(bundle, grows or Growth(), there)

    total_cpus, total_gpus = can_have({"CPU": 1}), can_have({"GPU": 1})
    use_gpu = total_gpus >= least if scaling.use_gpu == "auto" else scaling.use_gpu
    if config.device != "auto":
        use_gpu = config.device == "cuda"
    if scaling.cpus_per_worker != "auto":
        cpus = scaling.cpus_per_worker
    else:
        cpus = 1 if use_gpu else max(1, total_cpus // at_most)
        while cpus > 1 and can_have({"CPU": cpus}) < at_most:  # each on one node
            cpus -= 1
    if grows is None:
        return cpus, use_gpu
    is_private = cluster_address() is None
    has = "this machine has" if is_private else "the cluster can have" if grows.types else "the cluster has"
    if least * use_gpu > total_gpus:
        wanted, instead = "scaling.use_gpu=true", "scaling.use_gpu=false (or auto)"
        if config.device == "cuda":
            wanted, instead = "device=cuda", "device=auto"
        raise UserError(
            f"{wanted} needs a GPU for each of scaling.num_workers={least}, {has} {total_gpus}; give "
            f"{instead}{f', or scaling.num_workers={total_gpus}' if total_gpus else ''}"
        )
    if is_private and least * cpus > total_cpus:
        fewer = "fewer" if least > 1 else f"scaling.cpus_per_worker={total_cpus}"
        raise UserError(
            f"scaling.num_workers={least} needs {least * cpus} CPUs, {has} {total_cpus}; use {fewer}"
        )
    bundle = {"CPU": cpus, "GPU": int(use_gpu)}
    if (can := can_have(bundle)) < least:
        raise UserError(
            f"scaling.num_workers={least} needs {least} x ({amounts(bundle)}), each on one node, {has} room for {can}: "
            f"{room(grows, there)}; lower scaling.num_workers or scaling.cpus_per_worker"
        )
    return cpus, use_gpu


def absolute(path: str) -> str:
    """Workers have another working directory."""
    return path if "://" in path else os.path.abspath(path)  # noqa: PTH100 - a path may be a URI


def worker_hooks(
    channel: Channel, world: World, owner: str | None = None, wants_reports: bool = False
) -> Hooks:
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

    def report(record: dict[str, Any]) -> None:
        if wants_reports:
            channel.add("reports", record)

    return Hooks(
        progress=progress,
        report=report,
        stop=stop,
        save=save,
        event=lambda entry: channel.add("events", entry),
        owner=owner,
    )


def _worker(parameters: dict[str, Any]) -> dict[str, Any]:
    """What each Ray Train worker runs."""
    import ray.train
    import torch

    channel = Channel(parameters["channel"])
    if channel.get("failure"):  # a restart cannot mend it
        return {}
    torch.set_num_threads(parameters["cpus"])
    context = ray.train.get_context()
    if context.get_world_rank() == 0:
        threading.Thread(target=_beat, args=(channel,), daemon=True).start()
    world = World(context.get_world_rank(), context.get_world_size(), context.get_local_rank())
    config = TrainConfig.model_validate(parameters["config"])
    run = Storage(parameters["storage"])
    try:
        check_seen("data", config.data_path)
        check_seen("storage", str(run.parent), run / NOTES / context.get_experiment_name())
        with ExitStack() as stack:
            hooks = worker_hooks(channel, world, parameters.get("owner"), parameters.get("reports", False))
            if world.is_first:
                metrics = RunMetrics(config, parameters.get("sweep", ""), _num_starts(channel) - 1)
                hooks = stack.enter_context(metrics).heard_by(hooks)
            summary = TrainingLoop(config, run, world, hooks).train()
        if world.is_first:
            channel.put("summary", summary)
        return summary
    except TransientError:  # Ray starts the workers again
        raise
    except UserError as error:
        failure = {"message": str(error), "exit_code": error.exit_code}
        kind = type(error).__name__
        channel.put("failure", failure | ({"kind": kind} if kind in KINDS else {}))
        raise  # also where this worker is the only one that fails; whoever is started again finds the message


def _num_starts(channel: Channel) -> int:
    """How often the workers of this command have started; for the first one, once a start."""
    count = int(channel.get("starts") or 0) + 1
    channel.put("starts", count)
    return count


def _beat(channel: Channel) -> None:
    """Say that there is a worker, whatever it does: from before the data are checked until its process ends."""
    while True:
        channel.put("beat", time.time())
        time.sleep(BEAT_S)


def _first_cause(error: BaseException) -> str:
    """The most telling line of Ray's nested exceptions."""
    failures = getattr(error, "worker_failures", None)
    rank, cause = min(failures.items(), key=_is_alive) if failures else (None, error)
    text = str(cause).strip()
    if "Worker exit type: SYSTEM_ERROR" in text:  # Ray guesses at length what it may have been
        what = "its controller" if rank is None else f"worker {rank}"
        return f"{what} died without an exception (killed, or a crash of native code)"
    return text.splitlines()[-1] if text else repr(cause)


def _is_alive(failure: tuple[int, Exception]) -> bool:
    """Whether a worker that failed is there; the others' errors may be that a connection to a dead one broke."""
    return not hasattr(failure[1], "health_check_failure")
