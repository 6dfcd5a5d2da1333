"""Where Ray Train 2.60 is changed: its driver, its helpers, and what its controller does if a worker dies at its start.

`TorchTrainer.fit` waits in the calling thread. In the main one it replaces the handler of SIGINT, and nothing can be
told meanwhile; another still waits when the session is ended, and its next call then starts a new Ray, or ends the
whole process if it comes while the core shuts down. So here waiting is left to the caller.

If a worker dies while the group is formed, Ray 2.60 starts again but keeps what the failed start had reserved
(`WorkerGroup._start` cleans up only what is not yet marked as started): where the workers take the whole cluster, it
then waits for itself forever. And if one dies while it is told to train, or is killed by Ray's own monitor of memory,
or another worker says so first, whose connection to it broke, Ray ends the run, as if the controller had failed. Here
the reservation is given back, and each of these is a failure of a worker like others: the next start follows, up to
`max_failures` times.

A worker that is alone forms no process group, which would only open sockets. Several on a private Ray, which is one
machine, meet in a file and talk on loopback: torch's own meeting place would answer anybody in the network.

And workers may be started in a placement group that is lent to the run, such as a trial's of Ray Tune. It stays when
they end; of a lost node Ray itself moves its part elsewhere.
"""

import logging
import os
import tempfile
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray._common.network_utils import get_localhost_ip
from ray._raylet import RAY_NODE_ID_KEY  # type: ignore[attr-defined]
from ray.actor import ActorHandle
from ray.exceptions import OutOfMemoryError, RayActorError, RayError
from ray.train import WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import (
    _set_torch_distributed_env_vars,
    _setup_torch_process_group,
    _TorchBackend,
)
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import ENABLE_PREEMPTION_WATCHER_ENV_VAR, get_env_vars_to_propagate
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.execution.worker_group.placement_group_handle import (
    DefaultPlacementGroupHandle,
    PlacementGroupHandle,
)
from ray.util.placement_group import PlacementGroup, placement_group_table

from hrm_ray.errors import UserError, first_line
from hrm_ray.training.channel import Channel

logger = logging.getLogger(__name__)

# Of a worker, before its group is formed; out of memory, if Ray's monitor has killed it.
DEATHS = (RayActorError, OutOfMemoryError, WorkerGroupStartupFailedError)

# Each of Ray Train's helpers is a process that takes about a second of a CPU to start, while the workers start too.
NEVER_NEEDED = (DatasetsCallback,)  # starts what hands out Ray Data's datasets, of which there are none
# Starts what removes the reservation of a controller that was killed. The driver does that itself, and a lent group has
# to stay; without a dashboard this cleaner can do nothing, and delays the end of every run by 12 s.
NEEDED_AMONG_OTHERS = (PlacementGroupCleanerCallback,)


@dataclass
class Started:
    """What `fit` takes for a result."""

    controller: ActorHandle
    error: None = None


def group_of(group_id: str) -> PlacementGroup:
    """The placement group with this id, in hexadecimal."""
    return PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group_id)))


def is_reserved(group_id: str) -> bool:
    """Whether that placement group has all of its resources."""
    return placement_group_table(group_of(group_id)).get("state") == "CREATED"


class NonblockingTrainer(TorchTrainer):
    """`TorchTrainer` that does not wait. To be kept while it trains: the controller fetches from it.

    Where `train_loop_config["group"]` names a placement group, the workers are started in that one (see `Workers`).

    Args:
        is_private: whether nobody else wants the nodes, or the group is lent. Then no cleaner is started, and workers
            of a fixed number are not asked of the autoscaler.

    Attributes:
        requester: by which name its controller asks the autoscaler for nodes.
    """

    requester = ""

    def __init__(self, *positional: Any, is_private: bool = False, **named: Any):
        super().__init__(*positional, **named)
        self._is_private = is_private

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]
        left_out = NEVER_NEEDED + NEEDED_AMONG_OTHERS * self._is_private
        return [c for c in callbacks if not isinstance(c, left_out)]

    def start(self) -> ActorHandle:
        """The controller, on this node: `run` trains, then `get_result` has the result.

        It ends when no handle is left and its calls have finished.

        Raises:
            UserError: this Ray has no such hook.
        """
        if not hasattr(TorchTrainer, NonblockingTrainer._initialize_and_run_controller.__name__):
            raise UserError(f"ray {ray.__version__} starts runs in another way than ray 2.60; install that")
        return self.fit().controller  # type: ignore[attr-defined]

    def _initialize_and_run_controller(self, **parameters: Any) -> Started:
        policy = parameters["scaling_policy"]
        if self._is_private and isinstance(policy, FixedScalingPolicy):
            parameters["scaling_policy"] = FixedSizeWithoutRequests(policy.scaling_config)
        self._parameters = parameters
        self.requester = f"train-{parameters['train_run_context'].run_id}"
        node = {RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
        env_vars = {"RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0"}
        # A node that is alone takes the controller with it when it is taken away.
        if _is_on_loopback() and len(ray.nodes()) == 1:
            env_vars[ENABLE_PREEMPTION_WATCHER_ENV_VAR] = "0"
        environment = {"env_vars": env_vars | get_env_vars_to_propagate()}
        # By the default strategy it is in no placement group, and nor is what it starts for the whole cluster.
        controller: Any = ray.remote(
            num_cpus=0, label_selector=node, runtime_env=environment, scheduling_strategy="DEFAULT"
        )(Controller)
        return Started(controller.remote(**parameters))


def _is_on_loopback() -> bool:
    """Whether all nodes are on this machine, as those of a private Ray are."""
    return bool(ray.util.get_node_ip_address() == get_localhost_ip())


@dataclass
class Joined(TorchConfig):
    """How the workers are joined to a process group: as Ray Train does, unless they are alone or on a private Ray."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return JoinsWhereNeeded


class JoinsWhereNeeded(_TorchBackend):
    """In the controller."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        if len(worker_group) == 1:
            return
        if not _is_on_loopback():
            super().on_start(worker_group, backend_config)
            return
        node: Any = ray._private.worker._global_node
        meeting_point = tempfile.mkdtemp(
            prefix="store-", dir=node.get_session_dir_path()
        )  # new at each start
        worker_group.execute(_set_torch_distributed_env_vars)
        worker_group.execute(_talk_on_loopback)
        joining: list[Any] = [
            worker_group.execute_single_async(
                rank,
                _setup_torch_process_group,
                backend=backend_config.backend,
                world_rank=rank,
                world_size=len(worker_group),
                init_method=f"file://{meeting_point}/store",
                timeout_s=backend_config.timeout_s,
            )
            for rank in range(len(worker_group))
        ]
        ray.get(joining)


def _talk_on_loopback() -> None:
    """In each worker: also where the user has named another interface, for clusters."""
    here = get_localhost_ip()
    interfaces = psutil.net_if_addrs().items()
    name = next(name for name, addresses in interfaces if any(a.address == here for a in addresses))
    os.environ.update({"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name})


class FixedSizeWithoutRequests(FixedScalingPolicy):
    """For workers whose place is reserved already, or where no node can be added.

    Ray's own starts an actor that asks the autoscaler for all workers of all runs together, and for those of a
    controller that was killed for 180 s more: beside the run that follows it, an autoscaling cluster would grow for
    nothing.
    """

    def after_controller_start(self, train_run_context: Any) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass


class BorrowedPlacementGroup(DefaultPlacementGroupHandle):
    """A placement group that stays."""

    def shutdown(self) -> None:
        pass


class Workers(WorkerGroup):
    """Ray Train's, for which a start that fails is like any other failure of a worker; in the controller."""

    def _start(self) -> None:
        try:
            super()._start()
        except Exception as error:
            is_formed = self.has_started()
            if is_formed:
                self.shutdown()
            if isinstance(error, DEATHS) or (is_formed and isinstance(error, RayError)):
                # Whose it was is not known: the rank stands for any. Ray looks in the cause for whether its node was
                # taken away, which does not count.
                failures = {0: error.__cause__ if isinstance(error.__cause__, Exception) else error}
                raise WorkerGroupError("the workers could not be started", failures) from error
            raise

    def poll_status(self, timeout: float | None = None) -> Any:
        """Tells the driver where the log of a worker lies that has failed; of several, of one that died."""
        status = super().poll_status(timeout)
        # What others say of a dead one's connection is no reason; a UserError has told the driver itself.
        errors = {rank: e for rank, e in status.errors.items() if not isinstance(e, UserError)}
        dead = {rank for rank, error in errors.items() if isinstance(error, WorkerHealthCheckFailedError)}
        if errors:
            rank = min(dead or errors)
            at = self.get_workers()[rank].metadata
            loss = {"name": f"worker {rank}", "host": at.hostname, "ip": at.node_ip, "pid": at.pid}
            Channel(self._loop_config["channel"]).add("events", {"event": "lost", "worker": loss})
        return status

    @property
    def _loop_config(self) -> dict[str, Any]:
        loop_config: Any = self._train_run_context.train_loop_config
        return loop_config

    def shutdown(self) -> None:
        """Also where a worker is gone in a way that Ray Train does not expect, of which a callback says so."""
        try:
            super().shutdown()
        except RayError as error:
            logger.warning("a worker was gone at the end of its group: %s", first_line(error))
            if self._worker_group_state is not None:
                self._worker_group_state.shutdown()
                self._clear_state()

    def _create_placement_group(self, *parameters: Any) -> PlacementGroupHandle:
        """The borrowed one, or a new one. The driver gets its id, in case the controller dies."""
        if self._loop_config["group"]:
            return BorrowedPlacementGroup(group_of(self._loop_config["group"]))
        handle = super()._create_placement_group(*parameters)
        Channel(self._loop_config["channel"]).put("reservation", handle.placement_group.id.hex())
        return handle


class Controller(TrainController):
    """Ray Train's, with those workers."""

    worker_group_cls = Workers
