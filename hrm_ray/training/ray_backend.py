"""The process group of Ray Train's workers, without a leak.

If a worker dies while the group is formed, Ray 2.60 starts anew but keeps what the dead start had reserved
(`WorkerGroup._start` cleans up only what is not yet marked as started): where the workers take the whole cluster, it
then waits for itself for ever. Here the reservation is given back.
"""

from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayActorError
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend


class Backend(_TorchBackend):
    """Called in Ray Train's controller."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        try:
            super().on_start(worker_group, backend_config)
        except RayActorError:
            worker_group.shutdown()
            raise


@dataclass
class ProcessGroup(TorchConfig):
    """`TorchConfig` with that backend."""

    @property
    def backend_cls(self) -> type[Backend]:
        return Backend
