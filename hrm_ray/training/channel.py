"""Messages between the driver, the controller and the workers of a run on Ray."""

import json
import time
from typing import Any


class Channel:
    """Those of one run, in the cluster's key-value store."""

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

    def taken(self, key: str) -> list[Any]:
        """The values added to `key` since it was last asked, oldest first; they are removed. For one reader."""
        from ray.experimental import internal_kv

        values = []
        for name in sorted(internal_kv._internal_kv_list(self._key(f"{key}/"))):
            values.append(json.loads(internal_kv._internal_kv_get(name)))
            internal_kv._internal_kv_del(name)
        return values

    def _key(self, key: str) -> bytes:
        return f"hrm_ray/{self.name}/{key}".encode()
