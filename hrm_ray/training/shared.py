"""Whether this node sees the folders of a run, which all machines of a cluster have to share.

Else a worker would train into a folder of its own machine, which nobody looks at.
"""

import socket

from hrm_ray.errors import Unseen
from hrm_ray.storage.storage import Storage


def check_seen(key: str, path: str, inside: Storage | None = None) -> None:
    """Raise Unseen if this node does not have a folder that the driver's node has.

    Args:
        key: whose value the folder is, for the message.
        path: the folder. One at a URI is seen from everywhere.
        inside: another folder in it, which the driver has just made; None: none.
    """
    if "://" not in path and not (inside or Storage(path)).exists():
        raise Unseen(
            f"node {socket.gethostname()} does not see {key}={path}, which is on the machine where the command runs; "
            "give a URI (s3://BUCKET/FOLDER) or a folder that all machines of the cluster share"
        )
