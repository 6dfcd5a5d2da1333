"""What the nodes of a Ray cluster have, and what an autoscaler can add. To be asked in a session (`ray_session`).

Ray itself tells which nodes are there, but not which could come: that stands in the configuration of its autoscaler,
which lies on the head. So it is read there.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hrm_ray.ray_session import cluster_address

Resources = Mapping[str, float]  # amounts by name: "CPU", "GPU", "memory", ...

ON_HEAD = "node:__internal_head__"  # a resource that the head alone has
ANSWER_S = 30.0  # how long the head may take to start a process that reads its files
REQUEST_S = 180.0  # after which a request that is not renewed is forgotten
RENEW_S = 20.0


@dataclass(frozen=True)
class NodeType:
    """Nodes of one kind, of which the autoscaler may start some.

    Attributes:
        name: in the configuration of the cluster.
        resources: of each.
        most: how many there may be at once.
    """

    name: str
    resources: Resources
    most: int


@dataclass(frozen=True)
class Growth:
    """How far a cluster can grow.

    Attributes:
        types: of nodes; empty if the cluster stays as it is.
        most: nodes of all types together, the head not counted.
    """

    types: Sequence[NodeType] = ()
    most: int = 0

    def bundles(self, bundle: Resources) -> int:
        """How many such bundles the nodes could hold at most, if no other were there."""
        left, found = self.most, 0
        for kind in sorted(self.types, key=lambda kind: -bundles_in(kind.resources, bundle)):
            count = min(kind.most, left)
            left -= count
            found += count * bundles_in(kind.resources, bundle)
        return found

    def describe(self) -> str:
        """For a person: "2 x cpu (1 CPU), 4 x gpu (4 CPU, 1 GPU)"."""
        return ", ".join(f"{k.most} x {k.name} ({amounts(k.resources)})" for k in self.types if k.most)


def amounts(resources: Resources) -> str:
    """For a person: "4 CPU, 1 GPU"; nothing else that a node may have."""
    return (
        ", ".join(f"{resources[name]:g} {name}" for name in ("CPU", "GPU") if resources.get(name)) or "no CPU"
    )


def bundles_in(resources: Resources, bundle: Resources) -> int:
    """How many such bundles fit in so much; of those that need nothing, as many as an index can count."""
    parts = [resources.get(name, 0) / needed for name, needed in bundle.items() if needed]
    return int(min(parts) + 1e-6) if parts else sys.maxsize  # 1 / 0.1 is a little less than 10


def fit(nodes: Iterable[Resources], bundle: Resources) -> int:
    """How many such bundles fit on `nodes`, each of them on one node."""
    return sum(bundles_in(node, bundle) for node in nodes)


def living() -> list[Resources]:
    """Of each node that is alive all that it has."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def living_names() -> set[str]:
    """Ray's names of the nodes that are alive."""
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def free() -> list[Resources]:
    """Of each node what nobody has taken."""
    from ray._private.state import available_resources_per_node

    return list(available_resources_per_node().values())


def growth(stop: Callable[[], object] = lambda: None) -> Growth | None:
    """How far the cluster can grow; None if that cannot be found out. A private Ray does not.

    On another node than the head this takes some seconds.

    Args:
        stop: why not to wait for the answer any longer; None to go on.
    """
    import ray

    if cluster_address() is None:
        return Growth()
    try:  # what cannot be read is no mistake: then nothing is known
        here = ray.get_runtime_context().get_node_id()
        if any(node["NodeID"] == here and ON_HEAD in node["Resources"] for node in ray.nodes()):
            return _read_configuration()
        task: Any = ray.remote(num_cpus=0, resources={ON_HEAD: 0.001}, max_retries=0)(_read_configuration)
        asked, deadline = task.remote(), time.monotonic() + ANSWER_S
        while not ray.wait([asked], timeout=0.25)[0]:
            if stop() is not None or time.monotonic() > deadline:
                ray.cancel(asked, force=True)
                return None
        return ray.get(asked)
    except Exception:  # of any kind: the file's, or of a head that is busy or has another hrm_ray
        return None


def most(bundle: Resources, growth: Growth, there: Sequence[Resources] | None = None) -> int:
    """How many such bundles the cluster can hold when it has grown.

    Args:
        there: what `living` has answered; None: it is asked.
    """
    nodes = living() if there is None else there
    heads = [node for node in nodes if ON_HEAD in node]
    return max(fit(nodes, bundle), fit(heads, bundle) + growth.bundles(bundle))


def room(growth: Growth | None, there: Sequence[Resources] | None = None) -> str:
    """What is there and what may come, for a person: "it has 2 nodes (4 CPU) and may start 2 x gpu (4 CPU, 1 GPU)".

    Args:
        there: what `living` has answered; None: it is asked.
    """
    nodes = living() if there is None else there
    total = {name: sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU")}
    has = f"it has {len(nodes)} node{'s' * (len(nodes) > 1)} ({amounts(total)})"
    more = growth.describe() if growth else ""
    return f"{has} and may start {more}" if more else has


def waiting_for(bundle: Resources, count: int, growth: Growth | None) -> str | None:
    """Why so many bundles cannot be had yet, for a person; None if they can."""
    wanted = f"waiting for {count} x ({amounts(bundle)})"
    there, left = fit(living(), bundle), fit(free(), bundle)
    if left >= count:
        return None
    if there >= count:
        return f"{wanted}: the cluster has room for {there}, others have taken {there - left}"
    return f"{wanted}: the cluster has room for {there} now; {room(growth)}"


def _read_configuration() -> Growth | None:
    """On the head: what the file says that its autoscaler was given; None if no autoscaler runs here."""
    import psutil
    import yaml
    from ray._private import worker

    node: Any = worker._global_node
    logs = f"--logs-dir={node.get_logs_dir_path()}"
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if logs in words and any(word.endswith("monitor.py") for word in words):
            option = "--autoscaling-config="
            paths = [word.removeprefix(option) for word in words if word.startswith(option)]
            if not paths:
                return Growth()
            return parsed(yaml.safe_load(Path(os.path.expanduser(paths[0])).read_text()))  # noqa: PTH111
    return None


def parsed(configuration: dict[str, Any]) -> Growth | None:
    """What a cluster's YAML says of its workers; None if it does not say what they have, as for one's own machines."""
    head = configuration.get("head_node_type")
    most = int(configuration.get("max_workers", 2))  # Ray's default
    kinds = {
        name: kind for name, kind in (configuration.get("available_node_types") or {}).items() if name != head
    }
    if not kinds or not all(kind.get("resources") for kind in kinds.values()):
        return None
    types = [
        NodeType(name, kind["resources"], min(int(kind.get("max_workers", most)), most))
        for name, kind in kinds.items()
    ]
    return Growth(types, most)


@dataclass
class Request:
    """Asks the autoscaler for nodes, beside what others ask for, until it is cancelled or not renewed.

    Args:
        name: who asks.
    """

    name: str
    _bundles: list[Resources] = field(default_factory=list, init=False)
    _asked_at: float = field(default=0.0, init=False)

    def ask(self, bundles: list[Resources]) -> None:
        """For nodes that hold `bundles` in all, those in use counted.

        To be called often: it is passed on if something has changed, or as a renewal.
        """
        now = time.monotonic()
        if bundles == self._bundles and (not bundles or now - self._asked_at < RENEW_S):
            return
        if not bundles:
            self.close()
            return
        self._bundles, self._asked_at = bundles, now
        coordinator = _coordinator(create=True)
        coordinator.request_resources.remote(
            requester_id=self.name, resources=[dict(b) for b in bundles], expire_after_s=REQUEST_S
        )

    def close(self) -> None:
        """What was asked for is not wanted any more."""
        if self._bundles:
            cancel_request(self.name)
        self._bundles = []


def cancel_request(name: str) -> None:
    """Cancel what `name` has asked for; Ray Train's controllers ask too, and are not always there to do it."""
    import ray

    with suppress(Exception):  # a cluster that is lost keeps no request, and any other forgets it by itself
        coordinator = _coordinator(create=False)
        if coordinator is not None:
            ray.wait([coordinator.cancel_request.remote(name)], timeout=5.0)


def _coordinator(create: bool) -> Any:
    """Ray's actor that merges the requests of Ray Train, Ray Data and others."""
    import ray
    from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as module

    if create:
        return module.get_or_create_autoscaling_coordinator()
    try:
        return ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
    except ValueError:
        return None
