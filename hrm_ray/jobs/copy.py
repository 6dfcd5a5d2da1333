"""The copy of a working directory in which a job runs, unless it was started where the cluster's head can see it."""

from itertools import pairwise
from pathlib import Path

from hrm_ray.errors import UserError, shown

OF_RAY = ("runtime_resources", "working_dir_files")  # the folder of a node in which Ray keeps such copies


def check_lasts(key: str, path: str) -> None:
    """Raise UserError if `path`, which is to be written, lies in a job's copy of its folder, which Ray deletes.

    Args:
        key: whose value it is, for the message.
        path: or a URI.
    """
    if "://" in path:
        return
    parts = Path(path).resolve().parts
    if OF_RAY in pairwise(parts):
        raise UserError(
            f"{key}={shown(path)} lies in the job's own copy of the working directory, which Ray deletes; give a URI "
            "(s3://BUCKET/FOLDER) or an absolute path that all machines of the cluster share"
        )
